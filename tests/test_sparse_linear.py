"""SparseLinear does what Linear does, and keeps the zeros."""

from __future__ import annotations

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import nn

import nybble
from nybble.nn import Linear, SparseLinear
from nybble.testing.oracle import random_mask
from nybble.weights.scheme import Scheme
from nybble.weights.sparsity import Block

SCHEMES = ["sp50w8a8", "sp90w8a8", "sp50w8a16", "sp24w4a8", "sp24w4a16g32", "sp50w4a8g128", "sp32of128w8a8"]
BLOCKS = ["bs32x32w8a8", "bs16x4w8a8"]
ALL = pytest.mark.parametrize("scheme", SCHEMES + BLOCKS)
N, K = 40, 150


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def dense_layer(scheme: str, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    """Of random weights, with the zeros that the scheme names."""
    layer = nn.Linear(K, N, bias, dtype=dtype)
    keep = random_mask(Scheme.parse(scheme), N, K, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.weight.mul_(keep)
    return layer


def sparse_layer(scheme: str, **kwargs) -> SparseLinear:
    return SparseLinear.from_dense(dense_layer(scheme, **kwargs), scheme)


def same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name
        assert left[name].dtype == right[name].dtype
    x = torch.randn(3, K)
    assert torch.equal(a(x), b(x))


@ALL
def test_it_has_the_output_of_the_dense_integers(scheme: str) -> None:
    dense = dense_layer(scheme)
    layer = SparseLinear.from_dense(dense, scheme)
    other = Linear.from_dense(dense, layer.scheme.dense)
    assert torch.equal(layer.dequantized_weight(), other.dequantized_weight())
    assert (layer.dequantized_weight()[dense.weight == 0] == 0).all(), "zeros stay"
    assert layer.bias is dense.bias
    for shape in ((K,), (0, K), (1, K), (2, 3, K), (30, K)):
        x = torch.randn(shape)
        if layer.scheme.act_bits == 8:
            assert torch.equal(layer(x), other(x))
        torch.testing.assert_close(layer(x), other(x))
    for dtype in (torch.bfloat16, torch.float16):
        assert layer(torch.randn(5, K, dtype=dtype)).dtype == dtype


@ALL
def test_the_state_is_portable(scheme: str) -> None:
    layer, parsed = sparse_layer(scheme), Scheme.parse(scheme)
    blocks, state = isinstance(parsed.sparsity, Block), layer.state_dict()
    codes = ["block_start", "block_index", "values"] if blocks else ["mask", "values"]
    assert sorted(state) == sorted([*codes, "scale", "bias"])
    weight = layer.dequantized_weight()
    if blocks:
        start, index = state["block_start"], state["block_index"]
        assert start[0] == 0
        assert start[-1] == len(index) == len(state["values"])
    else:
        bits = (state["mask"][..., None] >> torch.arange(8)) & 1
        assert torch.equal(bits.flatten(1)[:, :K].bool(), weight != 0)
        kept = int((weight != 0).sum())
        assert state["values"].numel() == (kept if parsed.weight_bits == 8 else (kept + 1) // 2)
        assert state["mask"].nbytes == N * -(-K // 8)
    for name in codes:
        assert torch.equal(getattr(layer, name), state[name])
    layer.unpack()
    assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)
    assert layer.nbytes == sum(tensor.nbytes for tensor in state.values())


@ALL
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_state_dict(scheme: str, assign: bool, device: str) -> None:
    layer = sparse_layer(scheme)
    empty = SparseLinear(K, N, scheme=scheme, device=device)
    if device == "meta":
        assert empty(torch.empty(2, K, device="meta")).shape == (2, N)
        if not assign:
            empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    same(layer, empty)
    # Another number of stored codes, twice: the first load has packed it.
    other = sparse_layer(scheme, seed=5)
    empty.load_state_dict(other.state_dict(), assign=assign)
    same(other, empty)
    with pytest.raises(RuntimeError, match="extra"):
        empty.load_state_dict({**other.state_dict(), "extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="values"):
        empty.load_state_dict({k: v for k, v in other.state_dict().items() if k != "values"})
    same(other, empty)


@ALL
@pytest.mark.parametrize("packed", [True, False])
def test_copies_and_pickles(scheme: str, packed: bool) -> None:
    layer = sparse_layer(scheme)
    if not packed:
        layer.unpack()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),  # noqa: S301
        torch.load(file, weights_only=False),
    ):
        assert type(other) is SparseLinear
        same(layer, other)


@pytest.mark.parametrize("scheme", ["sp50w8a8", "sp90w8a8", "bs16x4w8a8"])
def test_copies_share_what_was_shared(scheme: str) -> None:
    pair = nn.ModuleList([sparse_layer(scheme), sparse_layer(scheme, seed=1)])
    pair[1].tie_to(pair[0])
    assert pair[0].weight_id == pair[1].weight_id
    twin = copy.deepcopy(pair)
    assert twin[0].weight_id == twin[1].weight_id != pair[0].weight_id
    other = sparse_layer(scheme, seed=2)
    pair[0].load_state_dict(other.state_dict())
    assert torch.equal(pair[1].dequantized_weight(), other.dequantized_weight())
    x = torch.randn(2, K)
    torch.testing.assert_close(pair[1](x) - pair[1].bias, other(x) - other.bias)
    with pytest.raises(ValueError, match="other: is"):
        pair[0].tie_to(SparseLinear(K, N + 1, scheme=scheme))


def test_it_goes_to_another_process_with_its_packed_weight() -> None:
    layer = sparse_layer("sp90w8a8")
    sent = pickle.loads(ForkingPickler.dumps(layer))  # noqa: S301
    assert type(sent) is SparseLinear
    assert sent.layout == layer.layout
    assert torch.equal(sent.packed, layer.packed)
    same(sent, layer)


@ALL
def test_a_shared_layer_takes_another_weight(scheme: str) -> None:
    """Memory that processes share cannot grow, so a weight of another size must find its place otherwise."""
    layer, other = sparse_layer(scheme).share_memory(), sparse_layer(scheme, seed=3)
    layer.load_state_dict(other.state_dict())
    same(layer, other)


@ALL
def test_gradients_reach_the_input_and_the_bias(scheme: str) -> None:
    layer = sparse_layer(scheme)
    x = torch.randn(4, K, requires_grad=True)
    grad = torch.randn(4, N)
    layer(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ layer.dequantized_weight())
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("scheme", ["sp50w8a8", "sp90w8a8", "sp24w4a16g32", "bs32x32w8a8"])
def test_compile(scheme: str) -> None:
    layer, x = sparse_layer(scheme), torch.randn(3, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


@ALL
def test_dtypes_and_devices(scheme: str) -> None:
    layer = sparse_layer(scheme)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert layer.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.dequantize().dtype == torch.bfloat16
    after = layer.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state if name != "bias"), "codes and scales stay"
    layer.float().to("meta")
    assert layer.device.type == "meta"
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)


@ALL
def test_save_and_load(scheme: str, tmp_path: Path) -> None:
    model = nn.Sequential(sparse_layer(scheme), nn.ReLU(), nn.Linear(N, 3)).eval()
    nybble.save(model, tmp_path)
    loaded = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 3)).eval()
    nybble.load(loaded, tmp_path)
    assert type(loaded[0]) is SparseLinear
    assert str(loaded[0].scheme) == scheme
    same(loaded, model)
    again = nn.Sequential(sparse_layer(scheme, seed=9), nn.ReLU(), nn.Linear(N, 3)).eval()
    nybble.load(again, tmp_path)
    same(again, model)


def test_save_and_load_of_tied_layers(tmp_path: Path) -> None:
    model = nn.Sequential(sparse_layer("sp90w8a8"), sparse_layer("sp90w8a8", seed=1))
    model[1].tie_to(model[0])
    nybble.save(model, tmp_path)
    loaded = nn.Sequential(nn.Linear(K, N), nn.Linear(K, N))
    nybble.load(loaded, tmp_path)
    assert loaded[0].weight_id == loaded[1].weight_id
    assert torch.equal(loaded[1].dequantized_weight(), model[0].dequantized_weight())


@ALL
def test_the_dense_twin(scheme: str) -> None:
    layer = sparse_layer(scheme)
    dense = layer.dequantize()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, layer.dequantized_weight())
    same(SparseLinear.from_dense(dense, scheme), layer)
    assert layer.weight.shape == (N, K)
    assert torch.equal(torch.nn.functional.linear(torch.eye(K), layer.weight).t(), dense.weight)


@ALL
def test_what_it_says_of_itself(scheme: str) -> None:
    layer = sparse_layer(scheme)
    explanation = nybble.explain(layer, m=1)  # some kernels take over at more rows
    assert explanation.kernel in repr(layer)
    assert f"scheme={scheme}" in repr(layer)
    assert explanation.problem.layout == layer.layout


@pytest.mark.parametrize(
    ("kind", "scheme", "message"),
    [
        (Linear, "sp50w8a8", "scheme='sp50w8a8': a sparse scheme is for nybble.nn.SparseLinear"),
        (Linear, "bs32x32w8a8", "a sparse scheme is for nybble.nn.SparseLinear"),
        (SparseLinear, "w8a8", "scheme='w8a8': SparseLinear needs a sparse scheme such as 'sp50w8a8'"),
        (SparseLinear, "w4a16g32", "SparseLinear needs a sparse scheme"),
        (SparseLinear, "sp50w4a16asym", "symmetric=False"),
        (SparseLinear, "bs32x32w4a8", "blocks are for w8a8"),
        (SparseLinear, "bs17x32w8a8", "rows=17"),
        (SparseLinear, "sp4of4w8a8", "n=4, m=4"),
        (SparseLinear, "sp0w8a8", "percent=0"),
    ],
)
def test_schemes_of_the_other_kind_are_refused(kind: type[Linear], scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(K, N, scheme=scheme)
    with pytest.raises(ValueError, match=message):
        kind.from_dense(nn.Linear(K, N), scheme)


@pytest.mark.parametrize("scheme", ["sp24w8a8", "sp24w4a16g32", "sp32of128w8a8"])
def test_a_weight_that_breaks_its_pattern_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match="mask: row 0 keeps more than"):
        SparseLinear.from_dense(nn.Linear(K, N), scheme)


def test_a_dense_weight_may_be_stored_as_free_zeros_or_blocks() -> None:
    dense = nn.Linear(K, N)
    for scheme in ("sp50w8a8", "sp90w8a8", "sp50w4a16", "bs32x32w8a8"):
        layer = SparseLinear.from_dense(dense, scheme)
        plain = Linear.from_dense(dense, layer.scheme.dense)
        assert torch.equal(layer.dequantized_weight(), plain.dequantized_weight())
