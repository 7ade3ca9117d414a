"""torch.func and torch's counters: grad, vjp, jacrev, hessians, and vmap of every op, against loops and dense layers."""

import subprocess
import sys
import warnings
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import nybble
from nybble import attention, conv, experts, flops, rows
from nybble.nn import Linear

N, K, BATCH = 33, 70, 3
OPS = torch.ops.nybble


@pytest.fixture(autouse=True)
def _no_slow_loop():
    """torch warns where it has no batching rule and loops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def make(scheme="w8a8", n=N, k=K, seed=7):
    torch.manual_seed(seed)
    layer = Linear.from_dense(nn.Linear(k, n), scheme)
    layer.pack()
    return layer


@lru_cache
def weight(scheme="w8a8", n=N, k=K, seed=7):
    """packed, bias, scheme, layout, N, K"""
    layer = make(scheme, n, k, seed)
    return layer.packed, layer.bias.detach(), str(layer.scheme), layer.layout, n, k


# --- gradients


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16g64asym"])
def test_func_gradients_are_those_of_the_dequantized_weight(scheme):
    layer = make(scheme)
    dense = layer.dequantize().requires_grad_(False)
    x, bias = torch.randn(5, K), torch.randn(N)

    def loss(of, x, bias):
        return functional_call(of, {"bias": bias}, (x,)).square().sum()

    for argnums in (0, 1):
        found, wanted = (grad(loss, argnums + 1)(one, x, bias) for one in (layer, dense))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    seed = torch.randn(5, N)
    torch.testing.assert_close(vjp(layer, x)[1](seed), vjp(dense, x)[1](seed), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jacrev(layer)(x[0]), dense.weight, rtol=1e-5, atol=1e-5)
    found, wanted = (jacrev(jacrev(lambda x, one=one: one(x).square().sum()))(x[0]) for one in (layer, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_func_gradients_are_those_of_backward():
    """Straight through the rounding of activations, as backward() has it, bit for bit."""
    layer, x = make("w8a8"), torch.randn(5, K)
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    assert torch.equal(grad(lambda x: layer(x).square().sum())(x), leaf.grad)


def test_gradients_of_each_sample():
    layer, x = make("w8a8"), torch.randn(4, K)

    def loss(bias, x):
        return functional_call(layer, {"bias": bias}, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(layer.bias.detach(), x)
    assert torch.equal(found, torch.stack([grad(loss)(layer.bias.detach(), one) for one in x]))
    assert found.abs().max() > 0


def test_func_grad_through_compile():
    layer, x = make("w8a8"), torch.randn(5, K)
    function = grad(lambda x: layer(x).square().sum())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


def test_outer_gradients_reach_through_func_grad():
    layer, x = make("w8a16"), torch.randn(5, K, requires_grad=True)
    grad(lambda x: layer(x).square().sum())(x).sum().backward()
    dense = layer.dequantize().weight
    torch.testing.assert_close(x.grad, (2 * dense.sum(1) @ dense).expand(5, K), rtol=1e-4, atol=1e-4)


MODULES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 8)),
    "lstm": (lambda: nn.LSTM(12, 16, bidirectional=True), (4, 2, 12)),
    "gru": (lambda: nn.GRU(12, 16), (4, 2, 12)),
}


@pytest.mark.parametrize("name", MODULES)
def test_func_gradients_of_other_modules(name):
    build, shape = MODULES[name]
    torch.manual_seed(7)
    model = nn.ModuleDict({"layer": build()})
    nybble.quantize(model, "w8a16", goal="memory")
    layer = model["layer"].requires_grad_(False)
    assert type(layer).__module__.startswith("nybble.")
    x = torch.randn(BATCH, *shape)

    def loss(x):
        out = layer(x)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    leaf = x[0].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(grad(loss)(x[0]), leaf.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vmap(grad(loss))(x), torch.stack([grad(loss)(one) for one in x]), rtol=1e-4, atol=1e-5)


def test_func_gradients_of_attention():
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    given, wanted = (
        grad(lambda q, k, v, one=one: one(q, k, v).square().sum(), (0, 1, 2))(q, k, v)
        for one in (attention.attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused():
    x = torch.randn(3, K)
    for transform in (lambda: torch.func.jvp(make(), (x,), (x,)), lambda: torch.func.jacfwd(make())(x)):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            transform()


def test_ops_without_gradients_say_so_under_func_grad():
    with pytest.raises(NotImplementedError, match="have no gradients"):
        grad(lambda x: rows.activate(x, None, "silu").sum())(torch.randn(3, 8))


# --- vmap


def recurrent_weights(gates, k=12, units=16):
    both = [weight("w8a8", gates * units, k, 1), weight("w8a8", gates * units, units, 2)]
    return [list(column) for column in list(zip(*both, strict=True))[:4]]


def vectors(*shape):
    return torch.randn(BATCH, *shape)


def ids(*shape, below=9):
    return torch.randint(0, below, (BATCH, *shape))


def experts_call(x, index, gate):
    sides = []
    for n, k, seed in ((2 * 24, K, 1), (N, 24, 50)):
        made = [weight("w8a8", n, k, seed + i) for i in range(9)]
        packed, bias, scheme, layout, *_ = zip(*made, strict=True)
        sides.append(experts.Side(list(packed), list(bias), scheme[0], layout[0], n, k))
    return experts.experts(x, index, gate, *sides, experts.Gate("silu"))


def conv_call(x, stride=2):
    geometry = conv.Geometry((3, 3), (stride, 1), (1, 0), (1, 1), 2)
    return conv.conv(x, *weight("w8a8", 6, 2 * 9)[:4], 6, geometry)


def linears_call(x, other, residual):
    packed, bias, scheme, layout, n, _ = zip(weight(seed=1), weight("w4a8g32", seed=2), strict=True)
    return rows.linears(
        x, packed, bias, scheme, layout, n, ["silu", ""], [other, None], [None, residual], "rms", torch.ones(K)
    )


TABLE = weight("w8a8", 9, K)
# (function, arguments): those that are lists have no batch.
BATCHED = {
    "linear": (lambda x: OPS.linear(x, *weight()), [vectors(4, K)]),
    "linear 1-d": (lambda x: OPS.linear(x, *weight()), [vectors(K)]),
    "linear part": (lambda x: OPS.linear_part(x, *weight(), 16, 20), [vectors(4, K)]),
    "linear, biases": (lambda x, bias: OPS.linear(x, weight()[0], bias, *weight()[2:]), [vectors(4, K), vectors(N)]),
    "linear, biases alone": (lambda bias: OPS.linear(torch.ones(2, K), weight()[0], bias, *weight()[2:]), [vectors(N)]),
    "norm": (lambda x: OPS.norm(x, None, torch.ones(K), None, "rms", 1e-5, 0.0)[0], [vectors(4, K)]),
    "norm, sum": (lambda x, r: OPS.norm(x, r, None, None, "layer", 1e-5, 0.0), [vectors(4, K), [torch.randn(4, K)]]),
    "norm, weights": (lambda x, w: OPS.norm(x, x, w, None, "rms", 1e-5, 0.0), [vectors(4, K), vectors(K)]),
    "activate": (lambda x, other: OPS.activate(x, other, "gelu"), [[torch.randn(4, K)], vectors(4, K)]),
    "linears": (linears_call, [vectors(4, K), vectors(4, N), [torch.randn(4, N)]]),
    "conv": (conv_call, [vectors(2, 4, 9, 8)]),
    "attention": (lambda q, k: OPS.attention(q, k, k, causal=True), [vectors(2, 4, 5, 8), vectors(2, 2, 7, 8)]),
    "attention, one mask": (lambda q, m: OPS.attention(q, q, q, m), [vectors(2, 4, 5, 8), [torch.randn(5, 5)]]),
    "attention, a mask each": (lambda q, m: OPS.attention(q, q, q, m), [vectors(2, 4, 5, 8), vectors(4, 1, 5)]),
    "attention, masks alone": (
        lambda q, m: OPS.attention(q, q, q, m),
        [[torch.randn(2, 4, 5, 8)], vectors(2, 1, 5, 5)],
    ),
    "attention, masks of samples": (
        lambda q, m: OPS.attention(q, q, q, m),
        [vectors(2, 4, 5, 8), [torch.randn(2, 1, 5, 5)]],
    ),
    "attention, slopes": (lambda q, s: OPS.attention(q, q, q, None, s), [vectors(2, 4, 5, 8), vectors(4)]),
    "embedding": (lambda i: OPS.embedding(i, TABLE[0], *TABLE[2:], torch.float32), [ids(4)]),
    "embedding_bag": (
        lambda i: OPS.embedding_bag(i, torch.tensor([0, 1, 4]), None, TABLE[0], *TABLE[2:], torch.float32, "sum", -1),
        [ids(4)],
    ),
    "experts": (experts_call, [vectors(5, K), ids(5, 2), vectors(5, 2)]),
    "lstm": (lambda x, h: OPS.lstm(x, None, h, h, *recurrent_weights(4)), [vectors(4, 2, 12), [torch.randn(1, 2, 16)]]),
    "gru": (lambda x, h: OPS.gru(x, None, h, *recurrent_weights(3)), [vectors(4, 2, 12), vectors(1, 2, 16)]),
    "gru, packed": (lambda x, h: OPS.gru(x, [2, 1], h, *recurrent_weights(3)), [vectors(3, 12), vectors(1, 2, 16)]),
    "dequantize": (
        lambda p: OPS.dequantize(p, *weight()[2:]),
        [torch.stack([weight(seed=i)[0] for i in range(BATCH)])],
    ),
}


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("name", BATCHED)
@torch.no_grad()
def test_vmap_gives_what_a_loop_gives(name, dim):
    function, given = BATCHED[name]  # its weights are made in the loop, before vmap
    args = [one[0] if isinstance(one, list) else one.movedim(0, dim) for one in given]
    dims = tuple(None if isinstance(one, list) else dim for one in given)
    loop = [function(*(one[0] if isinstance(one, list) else one[i] for one in given)) for i in range(BATCH)]
    found = vmap(function, dims)(*args)
    if isinstance(found, torch.Tensor):
        found, loop = [found], [[one] for one in loop]
    assert len(found) == len(loop[0])
    for tensor, parts in zip(found, zip(*loop, strict=True), strict=True):
        assert torch.equal(tensor, torch.stack(parts))


def test_every_op_has_a_rule_or_is_named_here():
    ops = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("FuncTorchBatched")
        if name.startswith("nybble::")
    }
    assert ops == {name.replace(" part", "_part").split(",")[0].split(" ")[0] for name in BATCHED}
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nybble::")}
    assert ops == defined


def test_vmap_of_a_vmap_and_no_items():
    layer, x = make(), torch.randn(2, 3, 4, K)
    assert torch.equal(vmap(vmap(layer, 1), 0)(x), layer(x.transpose(1, 2)).contiguous())
    assert vmap(layer)(torch.randn(0, 4, K)).shape == (0, 4, N)
    with pytest.raises(ValueError, match="nybble::dequantize: a batch of 0"):
        vmap(lambda packed: OPS.dequantize(packed, *weight()[2:]))(torch.zeros(0, 64, dtype=torch.uint8))


def test_an_ensemble_of_layers():
    layers = [make(seed=i) for i in range(BATCH)]
    x = torch.randn(4, K)
    parameters, buffers = stack_module_state(layers)
    found = vmap(lambda state: functional_call(layers[0], state, (x,)))({**parameters, **buffers})
    assert torch.equal(found, torch.stack([layer(x) for layer in layers]))


# --- counters


DENSE = {
    "linear": (
        lambda: OPS.linear(torch.randn(2, 3, K), *weight()),
        lambda: F.linear(torch.randn(6, K), torch.randn(N, K)),
    ),
    "linear_part": (
        lambda: OPS.linear_part(torch.randn(6, K), *weight(), 16, 20),
        lambda: F.linear(torch.randn(6, K), torch.randn(4, K)),
    ),
    "linears": (
        lambda: linears_call(torch.randn(4, K), torch.randn(4, N), torch.randn(4, N)),
        lambda: F.linear(torch.randn(4, K), torch.randn(2 * N, K)),
    ),
    "conv": (
        lambda: conv_call(torch.randn(2, 4, 9, 8)),
        lambda: F.conv2d(torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3), None, (2, 1), (1, 0), 1, 2),
    ),
    "attention": (
        lambda: OPS.attention(torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)),
        lambda: torch.randn(8, 5, 8) @ torch.randn(8, 8, 7) @ torch.randn(8, 7, 6),
    ),
    "experts": (
        lambda: experts_call(torch.randn(5, K), ids(5, 2)[0], torch.rand(5, 2)),
        lambda: [torch.randn(10, K) @ torch.randn(K, 48), torch.randn(10, 24) @ torch.randn(24, N)],
    ),
    "lstm": (
        lambda: OPS.lstm(torch.randn(4, 2, 12), None, *torch.randn(2, 1, 2, 16), *recurrent_weights(4)),
        lambda: torch.randn(8, 28) @ torch.randn(28, 64),
    ),
    "gru": (
        lambda: OPS.gru(torch.randn(4, 2, 12), None, torch.randn(1, 2, 16), *recurrent_weights(3)),
        lambda: torch.randn(8, 28) @ torch.randn(28, 48),
    ),
}


def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", flops.FORMULAS)
def test_the_counter_counts_what_it_counts_for_dense_ops(name):
    call, dense = DENSE[name]
    assert counted(call) == counted(dense) > 0


def test_the_counter_counts_a_training_step_and_names_modules():
    model = nn.Sequential(make("w8a16"), nn.ReLU(), nn.Linear(N, 5))
    dense = nn.Sequential(model[0].dequantize(), nn.ReLU(), model[2])
    totals = []
    for one in (model, dense):
        x = torch.randn(4, K, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            one(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]
    assert counter.get_flop_counts()


def test_the_counter_may_be_imported_before_or_after():
    """Importing it takes long, so nybble does not."""
    check = (
        "import sys, torch; {first}; {second}; from torch.utils.flop_counter import flop_registry;"
        "assert torch.ops.nybble.linear in flop_registry; assert torch.ops.aten.mm in flop_registry"
    )
    lazy = "import nybble; assert 'torch.utils.flop_counter' not in sys.modules"
    for order in (("import torch.utils.flop_counter", "import nybble"), (lazy, "import torch.utils.flop_counter")):
        subprocess.run([sys.executable, "-c", check.format(first=order[0], second=order[1])], check=True)


def test_the_profiler_sees_ops_and_shapes():
    layer = make()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        layer(torch.randn(4, K))
    (event,) = [one for one in profiler.events() if one.name == "nybble::linear"]
    assert event.input_shapes[0] == [4, K]
