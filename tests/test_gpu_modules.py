"""Layers and models on a GPU: graphs, torch.compile, streams, devices, no waiting, and what is saved there. Without one
each test is skipped; those of data alone run on the CPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble import ops
from nybble.nn import Linear, SparseLinear
from nybble.testing.models import Stack, token_batches

# One of each family and layout.
SCHEMES = ("w8a8", "w8a16", "w4a8g64", "w4a16g128", "w4a16g32asym", "bs32x32w8a8", "sp24w8a16", "sp24w4a16g64")
# Tokens on both sides of every border between kernels.
ROWS = (1, 8, 9, 64, 65)
N, K = 257, 320

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
DEVICES = [pytest.param("cuda", marks=needs_gpu), "cpu"]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(scheme: str, device: str = "cuda", n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16) -> Linear:
    torch.manual_seed(3)
    dense = nn.Linear(k, n, dtype=dtype)
    if scheme.startswith("bs"):  # a block in four is zero
        with torch.no_grad():
            dense.weight.view(n, -1, 32)[: 32 * (n // 32)].view(n // 32, 32, -1, 32)[::2, :, ::2] = 0
    if scheme.startswith("sp24"):
        with torch.no_grad():
            dense.weight.view(-1, 4)[:, 1:3] = 0
    kind = SparseLinear if scheme.startswith(("bs", "sp")) else Linear
    return kind.from_dense(dense, scheme).to(device)


def inputs(m: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, k: int = K) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).to(device)


def same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, but where cuBLAS multiplies: how may depend on its workspace."""
    if len(got) <= 64:
        assert torch.equal(got, expected)
    else:
        close(got, expected, 0.01)


def close(got: Tensor, expected: Tensor, share: float = 0.03) -> None:
    """In norm: rounding activations or sums to bfloat16 comes to less."""
    assert (got.float() - expected.float()).norm() <= share * expected.float().norm()


def warm(layer: Linear) -> None:
    """First calls compile, check kernels and allocate."""
    for m in ROWS:
        layer(inputs(m))
    torch.cuda.synchronize()


# --- graphs


@needs_gpu
@each_scheme
@pytest.mark.parametrize("m", ROWS)
def test_a_captured_graph_replays_on_new_inputs(scheme: str, m: int) -> None:
    layer = make(scheme)
    x = inputs(m)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in (1, 2):
            other = torch.randn(m, K, generator=torch.Generator().manual_seed(seed)).to(x)
            x.copy_(other)
            graph.replay()
            same(y, layer(other))


@needs_gpu
@each_scheme
def test_compiled_with_graphs_gives_the_same_bits(scheme: str, fresh_dynamo: None) -> None:
    model = nn.Sequential(make(scheme), nn.ReLU()).eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for m in (1, 8, 64):
            x = inputs(m)
            expected = model(x)
            for _ in range(4):  # records, then replays
                assert torch.equal(compiled(x).clone(), expected), m


# --- streams and devices


@needs_gpu
@each_scheme
@pytest.mark.parametrize("m", [1, 64])
def test_streams_do_not_share_scratch(scheme: str, m: int) -> None:
    """Two streams of one layer at once, each with inputs of its own, many times."""
    layer = make(scheme, n=1024, k=2048)
    both = [inputs(m, k=2048), inputs(m + 1, k=2048)[:m] * 3]
    with torch.no_grad():
        expected = [layer(x) for x in both]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in both]
        got: list[list[Tensor]] = [[], []]
        for _ in range(50):
            for stream, x, ys in zip(streams, both, got, strict=True):
                with torch.cuda.stream(stream):
                    ys.append(layer(x))
        torch.cuda.synchronize()
    for right, ys in zip(expected, got, strict=True):
        assert all(torch.equal(y, right) for y in ys)


@needs_gpu
@each_scheme
def test_a_side_stream_orders_the_kernel_after_its_input(scheme: str) -> None:
    layer, x = make(scheme), inputs(8)
    with torch.no_grad():
        expected = layer(x)
        torch.cuda.synchronize()
        late = torch.zeros_like(x)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # some ten milliseconds: a kernel on another stream would see zeros
            late.copy_(x)
            y = layer(late)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(y, expected)


@needs_gpu
@needs_two
@each_scheme
def test_a_second_device(scheme: str) -> None:
    """Whichever is current."""
    first = make(scheme)
    second = make(scheme, "cuda:1")
    with torch.no_grad():
        for m in ROWS:
            x = inputs(m)
            expected = first(x)
            for current in (0, 1):
                with torch.cuda.device(current):
                    y = second(x.to("cuda:1"))
                assert y.device == torch.device("cuda:1")
                close(y.to("cuda:0"), expected, 0.01)  # another kind of GPU splits K otherwise
        with pytest.raises(ValueError, match="packed: on cuda:0, x is on cuda:1"):
            first(inputs(1).to("cuda:1"))


@needs_gpu
@each_scheme
def test_a_forward_never_waits_for_the_device(scheme: str) -> None:
    layer = make(scheme)
    with torch.no_grad():
        warm(layer)
        xs = [inputs(m) for m in ROWS] + [inputs(40)[::2], inputs(3).view(1, 3, K)]
        for x in xs:
            layer(x)  # Triton compiles for strides too
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x in xs:
                layer(x)
        finally:
            torch.cuda.set_sync_debug_mode(before)


# --- layers


@pytest.mark.parametrize("device", DEVICES)
@each_scheme
def test_leading_dimensions_and_strides(scheme: str, device: str) -> None:
    layer = make(scheme, device)
    wide = inputs(24, device, k=K + 9)
    with torch.no_grad():
        for x in (wide[::2, 3 : K + 3], wide[:, :K].view(2, 12, K), wide[0, :K]):
            y, plain = layer(x), layer(x.contiguous())
            assert y.shape == (*x.shape[:-1], N)
            assert torch.equal(y, plain)
        assert layer(wide[:0, :K]).shape == (0, N)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16g128"])
def test_the_gradient_of_the_input(scheme: str, device: str) -> None:
    layer = make(scheme, device, dtype=torch.float32)
    x = inputs(4, device, torch.float32).requires_grad_()
    layer(x).sum().backward()
    expected = torch.ones(4, N) @ layer.dequantized_weight().float().cpu()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.cpu(), expected, rtol=1e-3, atol=1e-3)


@needs_gpu
@each_scheme
def test_the_weight_moves_without_loss(scheme: str) -> None:
    """CPU, GPU and back: the same tensors; on the GPU in a GPU's layout, and close to the CPU's outputs."""
    layer = make(scheme, "cpu")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = inputs(5, "cpu")
    with torch.no_grad():
        expected = layer(x).float()
        layer.cuda()
        y = layer(x.cuda())
    assert layer.packed is not None and layer.packed.is_cuda  # noqa: PT018
    assert nybble.explain(layer).kernel in {row["name"] for row in nybble.kernels() if row["target"] != "torch"}
    close(y.cpu(), expected)
    assert all(tensor.is_cuda for tensor in layer.state_dict().values())
    layer.cpu()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@needs_gpu
@each_scheme
def test_the_op_is_whole(scheme: str) -> None:
    layer = make(scheme)
    layer.pack()
    arguments = (inputs(5), layer.packed, layer.bias, scheme, layer.layout, N, K)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.nybble.linear.default, arguments, test_utils=tests)
    assert ops.linear(*arguments).shape == (5, N)


# --- models


def small(device: str) -> Stack:
    torch.manual_seed(5)
    return Stack(depth=2, width=64).to(device).eval()


@pytest.mark.parametrize("there", [pytest.param("cuda", marks=needs_gpu), "cpu"])
@pytest.mark.parametrize("way", ["w8a8", "w4a16g32", "bs16x4:50%"])
def test_a_model_made_on_one_device_is_saved_and_loaded_on_the_other(way: str, there: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="saving needs the extra `save`")
    model, ids = small(there), token_batches(1)[0]
    if way.startswith("bs"):
        nybble.sparsify(model, way, method="magnitude", scheme="w8a8", goal="memory")
    else:
        nybble.quantize(model, way, goal="memory")
    changed = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(changed) >= 4
    assert {layer.device.type for layer in changed} == {there}
    with torch.no_grad():
        expected = model(ids.to(there)).cpu()
    nybble.save(model, tmp_path / "first")
    here = small("cpu")
    nybble.load(here, tmp_path / "first")
    same_tensors(here, model)
    with torch.no_grad():
        close(here(ids), expected)
        here.to(there)
        close(here(ids.to(there)).cpu(), expected)
    nybble.save(here, tmp_path / "second")
    again = small(there)
    nybble.load(again, tmp_path / "second")
    same_tensors(again, model)


def same_tensors(model: nn.Module, other: nn.Module) -> None:
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.cpu(), second[name].cpu()), name
