"""The libraries that the bench for GPUs compares with: called as they want it, and what they refuse or break is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.bench import gpu_measure, gpu_peers
from nybble.bench.gpu_goals import PEERS_OF, W4A16
from nybble.bench.gpu_peers import PEERS, GpuPeer
from nybble.bench.gpu_wheels import WHEELS


def test_peers_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.bench.gpu_peers.find_spec", lambda name: None)
    for peer in PEERS:
        reason = gpu_measure.peer(peer, 1, 16, 16).get("reason") if peer.needs else "is not installed"
        assert "is not installed" in reason


@pytest.mark.parametrize("name", ["torch bf16", "torch int_mm"])
def test_peers_that_run_anywhere_compute_the_product(name: str) -> None:
    peer = next(peer for peer in PEERS if peer.name == name)
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    expected = x.float() @ weight.float().t()
    gpu_measure._check(peer.make(weight)(x), expected, gpu_measure.SANE_PEER[peer.weight_bits])


# What gemlite 0.6.0.post2 and humming-kernels 0.1.19 accept, read in their sources.


class Gemlite:
    """gemlite.helper: each converter as its class, which computes with the weight that it was given."""

    class A16W8_INT8:
        def __init__(self, device="cuda:0", dtype=None, fp32_scale=True, post_scale=False):
            self.made = (device, dtype)

        def from_weights(self, weight, bias=None, scales=None):
            assert weight.dtype is self.made[1] is torch.bfloat16
            return lambda x: x @ weight.t()

    class A8W8_INT8_dynamic(A16W8_INT8):
        def __init__(self, device="cuda:0", dtype=None, block_quant=False):
            self.made = (device, dtype)

    class A16W4_HQQ_INT:
        def __init__(self, device="cuda:0", dtype=None):
            self.dtype = dtype

        def from_weights(self, W_q, scales, zeros, bias=None):
            assert W_q.dtype is torch.uint8
            assert scales.dtype is zeros.dtype is self.dtype
            assert W_q.numel() // scales.numel() == 128
            held = (W_q.float().view(*scales.shape, 128) - zeros[..., None]) * scales[..., None]
            return lambda x: (x.float() @ held.view(W_q.shape).t()).to(x.dtype)


class HummingLayer(torch.nn.Module):
    """humming.layer.HummingLayer: empty, then loaded, then transformed, then called."""

    def __init__(self, shape_n, shape_k, weight_config, input_config=None, pad_n_to_multiple=1, pad_k_to_multiple=1,
                 num_experts=None, has_bias=False, torch_dtype=None):  # fmt: skip
        super().__init__()
        assert weight_config["dtype"] in ("uint4", "uint8")
        assert weight_config.get("group_size", 0) in (0, 128)
        assert input_config is None or input_config["dtype"] == "int8"
        self.shape, self.dtype, self.ready = (shape_n, shape_k), torch_dtype, False
        weight_config["quant_method"] = "humming"  # it keeps, and changes, what it is given

    def load_from_unquantized(self, tensor):
        assert tensor.shape == self.shape
        assert tensor.dtype is self.dtype
        self.weight = tensor

    def transform(self):
        assert self.weight is not None
        self.ready = True

    def forward(self, inputs, outputs=None, input_scale=None):
        assert self.ready
        return inputs @ self.weight.t()


@pytest.mark.parametrize("peer", [p for p in PEERS if p.needs in ("gemlite", "humming")], ids=lambda peer: peer.name)
def test_peers_are_called_as_they_want_it(peer: GpuPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    humming = ModuleType("humming.layer")
    humming.HummingLayer = HummingLayer
    monkeypatch.setattr(
        "nybble.bench.gpu_peers.import_module", {"gemlite.helper": Gemlite, "humming.layer": humming}.get
    )
    weight, x = torch.randn(64, 256).bfloat16(), torch.randn(4, 256).bfloat16()
    for _ in range(2):
        layer = peer.make(weight)
        gpu_measure._check(layer(x), x.float() @ weight.float().t(), gpu_measure.SANE_PEER[peer.weight_bits])


def test_a_peer_that_fails_in_any_way_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Exception):
        pass

    def fails(*_: object) -> None:
        raise Own("no such GPU\nand more")

    monkeypatch.setattr(gpu_measure, "_peer", fails)
    assert gpu_measure.peer(PEERS[0], 1, 16, 16) == {"peer": PEERS[0].name, "reason": "Own: no such GPU"}


def test_a_four_bit_peer_refuses_half_groups() -> None:
    with pytest.raises(ValueError, match="K=100: must be a multiple of 128"):
        gpu_peers._four_bits(torch.randn(2, 100))


def test_peers_are_carried_or_come_with_torch() -> None:
    for peer in PEERS:
        assert peer.travels, f"{peer.name}: {peer.needs} is not among gpu_wheels.WHEELS"
    assert {wheel.module for wheel in WHEELS if wheel.module} == {peer.needs for peer in PEERS if peer.needs}
    assert not replace(PEERS[0], needs="another").travels


class Marlin:
    """vllm's ops of Marlin, 0.20.2: the order of the words and of the scales is undone, and the product is of floats."""

    def gptq_marlin_repack(self, b_q_weight, perm, size_k, size_n, num_bits, is_a_8bit):
        assert (b_q_weight.shape, b_q_weight.dtype) == ((size_k // 8, size_n), torch.int32)
        assert (perm.numel(), num_bits, is_a_8bit) == (0, 4, False)
        return b_q_weight

    def marlin_gemm(self, a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, g_idx, perm, workspace,
                    b_type_id, size_m, size_n, size_k, is_k_full, use_atomic_add, use_fp32_reduce, is_zp_float):  # fmt: skip
        assert a.shape == (size_m, size_k)
        assert b_type_id == 1125899907892224, "uint4b8"
        assert (is_k_full, use_atomic_add, use_fp32_reduce, is_zp_float) == (True, False, True, False)
        assert workspace.dtype is torch.int32
        assert {c, b_bias, a_scales, global_scale, b_zeros, g_idx, perm} == {None}
        codes = torch.stack([b_q_weight >> 4 * i & 15 for i in range(8)], 1).view(size_k, size_n)
        scales = (
            b_scales.view(-1, 8, 8).transpose(1, 2).reshape(b_scales.shape)
        )  # an 8 x 8 transposed is its own inverse
        weight = (codes - 8).float() * scales.float().repeat_interleave(size_k // len(scales), 0)
        return (a.float() @ weight).to(a.dtype)


def test_marlin_is_called_as_it_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "_vllm_ops", Marlin)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    marlin = next(peer for peer in PEERS if peer.needs == "vllm")
    weight, x = torch.randn(128, 512).bfloat16(), torch.randn(4, 512).bfloat16()
    gpu_measure._check(marlin.make(weight)(x), x.float() @ weight.float().t(), gpu_measure.SANE_PEER[4])


def test_the_library_of_marlin_is_loaded_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_C.abi3.so").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    gpu_peers._vllm_ops()
    assert loaded == [str(tmp_path / "vllm" / "_C.abi3.so")]


def test_the_fastest_is_of_peers_that_exist() -> None:
    names = {peer.name for peer in PEERS}
    assert all(names.issuperset(group) for group in PEERS_OF.values())
    assert any("marlin" in name for name in PEERS_OF[W4A16])
