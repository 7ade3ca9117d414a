"""torch.compile and torch.export: whole graphs, with any number of rows, with gradients and under autocast."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.decorators import mark_unbacked

from nybble.nn import Linear

N, K = 33, 70
SCHEMES = ["w8a8", "w4a8g32", "w4a16g64asym"]
ROWS = (1, 7, 64)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A compile backend that counts the graphs it is given."""

    def __init__(self, backend="aot_eager"):
        self.graphs = []
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)


def make(scheme="w8a8", bias=True):
    torch.manual_seed(7)
    return Linear.from_dense(nn.Linear(K, N, bias), scheme)


def just_loaded(layer):
    """A copy that has its weight, but has not been called yet."""
    fresh = Linear(layer.in_features, layer.out_features, layer.bias is not None, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def graphs_for(module, rows, any_rows):
    counter = Counter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for m in rows:
        x = torch.randn(m, K)
        if any_rows:
            mark_unbacked(x, 0)
        assert torch.equal(compiled(x), module(x))
    return len(counter.graphs)


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1]], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_graph_serves_every_number_of_rows(scheme, rows):
    # Unbacked: without it torch itself compiles a second graph for a size of 1, for any module.
    assert graphs_for(make(scheme), rows, any_rows=True) == 1


@pytest.mark.parametrize("rows", [(7, 64, 300), ROWS], ids=str)
def test_no_more_graphs_than_a_dense_layer(rows):
    dense = graphs_for(nn.Linear(K, N), rows, any_rows=False)
    assert graphs_for(make(), rows, any_rows=False) == dense
    assert dense == 1 + (1 in rows)


def test_the_graph_holds_the_op_itself():
    counter = Counter("eager")
    torch.compile(make(), fullgraph=True, backend=counter)(torch.randn(7, K))
    (graph,) = counter.graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.nybble.linear.default]


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_compiled_with_any_rank(rank):
    layer = make()
    x = torch.randn(*(2, 3, 5)[: rank - 1], K)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiling_a_layer_that_was_just_loaded(scheme):
    layer = make(scheme)
    fresh, counter = just_loaded(layer), Counter()
    compiled = torch.compile(fresh, fullgraph=True, dynamic=True, backend=counter)
    for m in (7, 64):
        x = torch.randn(m, K)
        assert torch.equal(compiled(x), layer(x))
    assert len(counter.graphs) == 1


def test_compile_in_place_of_a_model_that_was_just_loaded():
    torch.manual_seed(7)
    model = nn.Sequential(make(), nn.GELU(), Linear.from_dense(nn.Linear(N, K), "w4a16g32"))
    fresh = nn.Sequential(just_loaded(model[0]), nn.GELU(), just_loaded(model[2]))
    fresh.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    torch.testing.assert_close(fresh(x), model(x))


def test_a_change_of_the_weight_reaches_a_compiled_layer():
    layer, other = make(), Linear.from_dense(nn.Linear(K, N), "w8a8")
    x = torch.randn(7, K)
    compiled = torch.compile(layer, backend="aot_eager")
    assert not torch.equal(compiled(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and there is no g++ on PATH")
def test_inductor():
    layer = make("w4a16g64asym")

    def block(x):
        return torch.relu(layer(x * 2)) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for m in (7, 64):
        x = torch.randn(m, K)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_through_compile(scheme):
    layer = make(scheme)
    layer.bias.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    gradients = []
    for run in (layer, compiled):
        given = x.clone().requires_grad_()
        layer.bias.grad = None
        run(given).square().sum().backward()
        gradients.append((given.grad, layer.bias.grad))
    assert gradients[0][0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_through_compile(dtype):
    layer = make()
    counter = Counter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype):
        y = compiled(x)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x))
    assert compiled(x).dtype == torch.float32
    assert len(counter.graphs) == 2


@pytest.mark.parametrize("loaded", [False, True], ids=["packed", "just loaded"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_export(scheme, strict, loaded):
    layer = make(scheme)
    module = just_loaded(layer) if loaded else layer
    rows = torch.export.Dim("rows")
    program = torch.export.export(module, (torch.randn(4, K),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.nybble.linear.default in ops
    exported = program.module()
    for m in (2, 7, 64):
        x = torch.randn(m, K)
        assert torch.equal(exported(x), layer(x))


def test_export_of_a_model_and_its_decompositions():
    model = nn.Sequential(make(), nn.ReLU(), Linear.from_dense(nn.Linear(N, 5), "w4a16g32"))
    x = torch.randn(4, K)
    program = torch.export.export(model, (x,)).run_decompositions()
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.nybble.linear.default) == 2
    torch.testing.assert_close(program.module()(x), model(x))


def test_tracing_does_not_run_the_kernel():
    """A trace sees fake tensors alone: no kernel is given a pointer to nothing."""
    layer = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(7, K)))
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert (y.shape, y.dtype, y.device) == ((7, N), torch.float32, torch.device("cpu"))
