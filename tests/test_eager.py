"""An eager call goes straight to the kernel: with the op's results, and only where nobody must see the op."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nybble import ops
from nybble.nn import Linear

from .op_arguments import arguments

N, K = 33, 70
OP = torch.ops.nybble.linear.default


def make(scheme="w8a8", n=N, k=K):
    """A layer that wants no gradient."""
    torch.manual_seed(7)
    return Linear.from_dense(nn.Linear(k, n), scheme).requires_grad_(False)


def watched(layer, x):
    return ops._watched(x, layer.packed, layer.bias)


# --- nobody watches


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__
)
def test_a_plain_call_is_not_watched(mode):
    with mode():
        assert not watched(make(), torch.randn(3, K))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_nor_is_it_after_every_watcher_has_left():
    layer, x = make(), torch.randn(3, K)
    with Ops(), Functions(), forward_ad.dual_level(), profile(activities=[ProfilerActivity.CPU]):
        assert watched(layer, x)
    torch.jit.trace(layer, x)
    make_fx(layer)(x)
    torch.func.vmap(layer)(x)
    assert not watched(layer, x)


INPUTS = {
    "contiguous": lambda: torch.randn(5, K),
    "1-d": lambda: torch.randn(K),
    "3-d": lambda: torch.randn(2, 3, K),
    "M = 0": lambda: torch.randn(0, K),
    "a sequence of 0": lambda: torch.randn(2, 0, K),
    "rows apart": lambda: torch.randn(5, K + 31)[:, :K],
    "every second column": lambda: torch.randn(5, 2 * K)[:, ::2],
    "transposed": lambda: torch.randn(K, 5).t(),
    "batch and sequence swapped": lambda: torch.randn(4, 3, K).transpose(0, 1),
    "one row expanded": lambda: torch.randn(1, K).expand(5, K),
    "one value expanded": lambda: torch.randn(1, 1).expand(5, K),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8g32", "w4a16g64asym"])
@pytest.mark.parametrize("given", INPUTS)
def test_the_direct_path_gives_what_the_op_gives(given, scheme, dtype, bias):
    layer = make(scheme)
    x = INPUTS[given]().to(dtype)
    values = arguments(layer, x, **({} if bias else {"bias": None}))
    assert not ops._watched(*values[:3])
    direct, op = ops.linear(*values), OP(*values)
    assert (direct.shape, direct.stride(), direct.dtype) == (op.shape, op.stride(), op.dtype)
    assert torch.equal(direct, op)
    assert not direct.requires_grad


BAD = {
    "x 0-d": lambda layer: {"x": torch.tensor(1.0)},
    "x too wide": lambda layer: {"x": torch.randn(3, K + 1)},
    "x empty": lambda layer: {"x": torch.randn(0)},
    "x float64": lambda layer: {"x": torch.randn(3, K).double()},
    "x int8": lambda layer: {"x": torch.ones(3, K, dtype=torch.int8)},
    "x sparse": lambda layer: {"x": torch.eye(3, K).to_sparse()},
    "no x": lambda layer: {"x": None},
    "bias too long": lambda layer: {"bias": torch.zeros(N + 1)},
    "bias 2-d": lambda layer: {"bias": torch.zeros(1, N)},
    "bias float64": lambda layer: {"bias": torch.zeros(N, dtype=torch.float64)},
    "bias a list": lambda layer: {"bias": [0.0] * N},
    "packed too short": lambda layer: {"packed": layer.packed[:64]},
    "packed of floats": lambda layer: {"packed": layer.packed.float()},
    "packed strided": lambda layer: {"packed": layer.packed.repeat_interleave(2)[::2]},
    "packed elsewhere": lambda layer: {"packed": layer.packed.to("meta")},
    "x elsewhere": lambda layer: {"x": torch.randn(3, K, device="meta")},
    "no scheme": lambda layer: {"scheme": "w8a9"},
    "no layout": lambda layer: {"layout": "n99k9"},
    "no outputs": lambda layer: {"bias": None, "out_features": 0},
}


@pytest.mark.parametrize("bad", BAD)
def test_both_paths_refuse_with_the_same_words(bad):
    layer = make()
    values = arguments(layer, **{"x": torch.randn(3, K), **BAD[bad](layer)})
    complaints = []
    for path in (ops.linear, OP):
        with pytest.raises((ValueError, RuntimeError, AttributeError)) as error:
            path(*values)
        complaints.append((error.type, str(error.value)))
    assert complaints[0] == complaints[1]


# --- somebody watches


class Ops(TorchDispatchMode):
    """Keeps the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Keeps the functions of torch's Python side that it sees."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass whose own memory is nothing: a kernel that took its pointer would read that."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*tree_map_only(cls, lambda wrapped: wrapped.inner, args), **(kwargs or {}))


@pytest.mark.parametrize("mode", [Ops, Functions])
def test_a_mode_sees_the_op(mode):
    layer, x = make(), torch.randn(3, K)
    with mode() as seeing:
        y = layer(x)
    assert OP in seeing.seen
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("name", ["x", "packed", "bias"])
def test_a_subclass_is_unwrapped_by_its_own_code(name):
    layer, x = make(), torch.randn(3, K)
    inner = {"x": x, "packed": layer.packed, "bias": layer.bias.detach()}[name]
    assert torch.equal(ops.linear(*arguments(layer, **{"x": x, name: Wrapped(inner)})), layer(x))


def test_a_profiler_lists_the_op():
    layer, x = make(), torch.randn(3, K)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer(x)
    assert "nybble::linear" in {event.key for event in profiler.key_averages()}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_jit_trace_records_the_op_and_not_its_result():
    layer = make()
    traced = torch.jit.trace(layer, torch.randn(3, K))
    assert "nybble::linear" in {node.kind() for node in traced.inlined_graph.nodes()}
    other = torch.randn(5, K)
    assert torch.equal(traced(other), layer(other))


@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
def test_make_fx_records_the_op(kind):
    layer = make()
    graph = make_fx(layer, tracing_mode=kind, _allow_non_fake_inputs=True)(torch.randn(3, K))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [OP]
    other = torch.randn(3, K)
    assert torch.equal(graph(other), layer(other))


def test_symbolic_trace_records_the_op():
    model = nn.Sequential(make(), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert OP in {node.target for node in traced.graph.nodes}
    x = torch.randn(3, K)
    assert torch.equal(traced(x), model(x))


def test_fake_tensors_and_tensors_without_memory_stay_what_they_are():
    layer, x = make(), torch.randn(3, K)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for given in (x, mode.from_tensor(x)):
            assert isinstance(layer(given), torch._subclasses.FakeTensor)
    fake = mode.from_tensor(layer.bias.detach())
    assert isinstance(ops.linear(*arguments(layer, mode.from_tensor(x), bias=fake)), torch._subclasses.FakeTensor)
    y = ops.linear(*arguments(layer, x.to("meta"), packed=layer.packed.to("meta"), bias=None))
    assert (y.shape, y.dtype, y.is_meta) == ((3, N), torch.float32, True)


def test_vmap_maps_the_op():
    layer, x = make(), torch.randn(4, 3, K)
    assert torch.equal(torch.func.vmap(layer)(x), layer(x))


def test_functionalize_gives_the_same():
    layer, x = make(), torch.randn(3, K)
    assert torch.equal(torch.func.functionalize(layer)(x), layer(x))


@pytest.mark.parametrize("wants", ["x", "bias"])
def test_a_gradient_is_recorded_where_one_is_wanted(wants):
    layer, x = make(), torch.randn(3, K)
    tensor = {"x": x, "bias": layer.bias}[wants].requires_grad_()
    layer(x).sum().backward()
    expected = {"x": layer.dequantized_weight().sum(0).expand(3, K), "bias": torch.full((N,), 3.0)}[wants]
    torch.testing.assert_close(tensor.grad, expected)
    with torch.no_grad():
        assert not watched(layer, x)


@pytest.mark.parametrize("name", ["x", "bias"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_a_tangent_is_refused_rather_than_dropped(mode, name):
    layer, x = make(), torch.randn(3, K)
    primal = {"x": x, "bias": layer.bias.detach()}[name]
    with mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(primal, torch.ones_like(primal))
        with pytest.raises(NotImplementedError, match=f"^{name}: has a tangent"):
            ops.linear(*arguments(layer, **{"x": x, name: dual}))
        assert torch.equal(layer(x), ops._linear(*arguments(layer, x)))


def test_the_forward_transforms_refuse_too():
    layer, x = make(), torch.randn(K)
    with pytest.raises(NotImplementedError, match=r"^x: has a tangent"):
        torch.func.jvp(layer, (x,), (torch.ones(K),))
    with pytest.raises(NotImplementedError, match=r"^x: has a tangent"):
        torch.func.jacfwd(layer)(x)


@pytest.mark.parametrize("name", ["x", "bias"])
def test_a_lazily_negated_tensor_is_read_with_its_sign(name):
    layer, x = make(), torch.randn(3, K)
    tensor = {"x": x, "bias": layer.bias.detach()}[name]
    negated = torch._neg_view(-tensor)
    assert negated.is_neg()
    assert negated.is_contiguous()
    assert torch.equal(ops.linear(*arguments(layer, **{"x": x, name: negated})), layer(x))
