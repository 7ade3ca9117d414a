"""Quantized layers on several ranks of torch.distributed: what each check of the scripts beside this file gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.fusion.block import fused_modules
from nybble.parallel import keep_portable

from .ranks import FOLDER, OK, Group, checks


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Runs the checks of a script on so many ranks, once."""
    known: dict[tuple[str, int], Group] = {}

    def run(script: str, ranks: int) -> Group:
        if (script, ranks) not in known:
            known[script, ranks] = Group(FOLDER / script, ranks, tmp_path_factory.mktemp("ranks"))
        return known[script, ranks]

    return run


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("check", checks("ranks_tensor_parallel.py"))
def test_tensor_parallel(groups, check, ranks) -> None:
    assert groups("ranks_tensor_parallel.py", ranks).outcome(check) == OK


@pytest.mark.full
@pytest.mark.parametrize("check", checks("ranks_transformers.py"))
def test_tp_plan(groups, check) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    pytest.importorskip("safetensors")
    assert groups("ranks_transformers.py", 2).outcome(check) == OK


@pytest.mark.full
@pytest.mark.parametrize("check", checks("ranks_fsdp.py"))
def test_fsdp(groups, check) -> None:
    pytest.importorskip("peft")
    assert groups("ranks_fsdp.py", 2).outcome(check) == OK


class Block(nn.Module):
    """An MLP with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def model_of(scheme: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 64), Block(), Block(), nn.Linear(64, 32)).eval()
    if scheme.startswith("sp"):
        nybble.sparsify(model, "50%", method="magnitude", goal="memory")
    else:
        nybble.quantize(model, scheme, calibration=[TOKENS] if "static" in scheme else None, goal="memory")
    return model


def _to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate().cpu_offload(model, execution_device="cpu")


def _to_disk(model: nn.Module, folder: Path) -> nn.Module:
    accelerate().disk_offload(model, folder, execution_device="cpu")
    return model


def _by_map(model: nn.Module, folder: Path) -> nn.Module:
    places = {"0": "cpu", "1": "disk", "2": "cpu", "3": "disk"}
    return accelerate().dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def accelerate():
    return pytest.importorskip("accelerate")


@torch.no_grad()
@pytest.mark.parametrize("portable", [False, True], ids=["packed", "portable"])
@pytest.mark.parametrize("offload", [_to_cpu, _to_disk, _by_map])
def test_accelerate_offloads(offload, portable, tmp_path) -> None:
    """Bit for bit, call after call. Weights that stay portable go away between calls."""
    for scheme in ("w8a8", "w4a16g32asym", "w4a8g32static", "w4nfa16g32", "sp50w8a8"):
        model = model_of(scheme)
        wanted = model(TOKENS)
        if portable:
            keep_portable(model)
        placed = offload(model, tmp_path / scheme)
        for _ in range(2):
            assert torch.equal(placed(TOKENS), wanted), scheme
        if offload is not _by_map:
            assert (model[1].up.device.type == "meta") is portable, scheme


@torch.no_grad()
def test_keep_portable() -> None:
    model = model_of("w8a8")
    nybble.fuse(model, [TOKENS], goal="always")
    layer, wanted = model[1].up, model[1].up(torch.ones(2, 64))
    assert keep_portable(model) == 6
    for _ in range(2):
        assert torch.equal(layer(torch.ones(2, 64)), wanted)
        assert layer.packed is None
    layer.load_state_dict(layer.state_dict())
    assert layer.packed is None
    assert not fused_modules(model)
    assert keep_portable(model, keep=False) == 6
    assert torch.equal(layer(torch.ones(2, 64)), wanted)
    assert layer.packed is not None
    with pytest.raises(ValueError, match="no quantized layers"):
        keep_portable(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model=int: must be"):
        keep_portable(3)


@torch.no_grad()
def test_experts_and_recurrent_layers_that_keep_portable_tensors() -> None:
    lstm = nn.Sequential(nn.LSTM(32, 32, batch_first=True))
    nybble.quantize(lstm, "w8a8", goal="memory")
    x = torch.randn(2, 3, 32)
    wanted = lstm(x)[0]
    assert keep_portable(lstm) == 2
    assert torch.equal(lstm(x)[0], wanted)
