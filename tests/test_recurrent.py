"""LSTM and GRU: the ops against an oracle in float64, and the modules against torch's."""

import fnmatch
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nybble
from nybble import native, ops, recurrent
from nybble.dispatch import registry
from nybble.nn.recurrent import GRU, LSTM
from nybble.recurrent import GATES
from nybble.testing.chains import layer

CELLS = ("lstm", "gru")
OPS = {"lstm": recurrent.lstm, "gru": recurrent.gru}
MODULES = {"lstm": (nn.LSTM, LSTM), "gru": (nn.GRU, GRU)}
STATES = {"lstm": 2, "gru": 1}
# inputs, units, directions, rows of each step
SHAPES = (
    (5, 1, 1, [1]),
    (1, 7, 2, [3] * 4),
    (33, 19, 2, [5, 5, 3, 1]),
    (40, 33, 1, [17] * 3),
    (64, 64, 1, [1] * 9),
    (16, 48, 2, [2, 2, 1]),
    (24, 384, 1, [2] * 3),  # threads share each step: 1.2 million products
    (24, 390, 2, [3, 3, 2]),  # likewise, with columns of several gates in a tile
    (9, 32, 1, [40] * 13),  # more rows than a chunk of products with the input
    (9, 32, 2, [300, 200, 90, 7]),
)
# The result of a step is within this of the oracle's, which starts from the same state.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


class Layer:
    """Random weights of a layer, its input and its first states."""

    def __init__(self, cell, inputs, units, directions, sizes, scheme="w8a8", dtype=torch.float32, bias=True):
        self.cell, self.units, self.directions, self.sizes = cell, units, directions, sizes
        columns = GATES[cell] * units
        sides = (inputs, units) * directions
        self.members = [layer(scheme, columns, side, bias, seed, dtype) for seed, side in enumerate(sides)]
        packed, layouts = zip(*(member._pack() for member in self.members), strict=True)
        self.weights = packed, [m.bias for m in self.members], [scheme] * len(packed), list(layouts)
        torch.manual_seed(7)
        self.x = torch.randn(sum(sizes), inputs, dtype=dtype)
        self.states = [torch.randn(directions, sizes[0], units, dtype=dtype) for _ in range(STATES[cell])]

    @torch.no_grad()
    def run(self):
        return OPS[self.cell](self.x, self.sizes, *self.states, *self.weights)

    def product(self, member, x):
        """The exact product in float64 of what nybble::linear gives in float32: its integer parts are its own."""
        packed, layout = member._pack()
        size = member.out_features, member.in_features
        with torch.no_grad():
            return ops.linear(x.float(), packed, member.bias, str(member.scheme), layout, *size).double()

    def expected(self, y):
        """What each step gives in float64 from the state that y has before it; the last cells."""
        outputs, cells = torch.zeros(y.shape, dtype=torch.float64), []
        offsets = [0, *itertools.accumulate(self.sizes)]
        for d in range(self.directions):
            at = slice(d * self.units, (d + 1) * self.units)
            c = self.states[1][d].double() if self.cell == "lstm" else None
            h = self.states[0][d].clone()
            order = range(len(self.sizes))
            for t in reversed(order) if d else order:
                rows = slice(offsets[t], offsets[t + 1])
                n = self.sizes[t]
                sums = (self.product(self.members[2 * d], self.x[rows]), self.product(self.members[2 * d + 1], h[:n]))
                if c is None:
                    outputs[rows, at] = gru_cell(*sums, h[:n].double())
                else:
                    outputs[rows, at], c[:n] = lstm_cell(sums[0] + sums[1], c[:n])
                h[:n] = y[rows, at]
            cells.append(c)
        return outputs, None if cells[0] is None else torch.stack(cells)

    def last(self, y):
        """The last state of each sequence, from the outputs."""
        offsets = [0, *itertools.accumulate(self.sizes)]
        found = self.states[0].clone()
        for row in range(self.sizes[0]):
            step = sum(size > row for size in self.sizes) - 1
            found[0, row] = y[offsets[step] + row, : self.units]
            if self.directions == 2:
                found[1, row] = y[row, self.units :]
        return found


def lstm_cell(sums, c):
    i, f, g, o = sums.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x, h, before):
    (rx, zx, nx), (rh, zh, nh) = x.chunk(3, 1), h.chunk(3, 1)
    z, n = (zx + zh).sigmoid(), (nx + (rx + rh).sigmoid() * nh).tanh()
    return (1 - z) * n + z * before


def check(made, dtype=torch.float32):
    y, last, *cells = made.run()
    expected, expected_cells = made.expected(y)
    assert y.dtype is last.dtype is dtype
    # States of a GRU keep of what they began with, which may be above 1.
    away = (y.double() - expected).abs() / expected.abs().clamp(min=1)
    assert away.max() <= TOLERANCE[dtype]
    assert torch.equal(last, made.last(y))
    for cell in cells:
        torch.testing.assert_close(cell.double(), expected_cells, atol=8 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_each_step_is_the_oracles(cell, shape):
    check(Layer(cell, *shape))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a8", "w4a8g32", "w4a8g64asym", "w4a16g32", "sp24w8a8"])
@pytest.mark.parametrize("cell", CELLS)
def test_schemes(cell, scheme):
    check(Layer(cell, 64, 40, 2, [6, 6, 2], scheme, bias=scheme != "w4a8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32"])
@pytest.mark.parametrize("cell", CELLS)
def test_other_dtypes(cell, scheme, dtype):
    check(Layer(cell, 64, 40, 2, [6, 6, 2], scheme, dtype), dtype)


@pytest.mark.parametrize("rows", [row["name"] for row in registry.kernels() if row["op"] == "rows" and row["usable"]])
@pytest.mark.parametrize("cell", CELLS)
def test_targets(cell, rows, monkeypatch):
    monkeypatch.setattr(recurrent, "_kernel", lambda: rows)
    check(Layer(cell, 20, 43, 2, [3, 2]))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16g32", "sp24w8a8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_change_no_bit(cell, shape, scheme, threads):
    if scheme == "sp24w8a8":
        shape = (max(shape[0] // 4 * 4, 4), max(shape[1] // 4 * 4, 4), *shape[2:])
    made, found = Layer(cell, *shape, scheme), []
    for count in (1, 2, 3):
        threads(count)
        found.append(made.run())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_with_nan_spoils_its_sequence_alone(cell, value):
    made = Layer(cell, 8, 16, 1, [3] * 4)
    wanted = made.run()[0].view(4, 3, 16)
    made.x.view(4, 3, 8)[1, 2, 5] = value
    found = made.run()[0].view(4, 3, 16)
    assert torch.equal(found[:, :2], wanted[:, :2])
    assert torch.equal(found[0], wanted[0])
    assert found[1:, 2].isnan().all()


@pytest.mark.parametrize("cell", CELLS)
def test_large_sums_saturate(cell):
    made = Layer(cell, 8, 16, 1, [2] * 3)
    made.x *= 1e30
    y, last, *cells = made.run()
    assert all(torch.isfinite(tensor).all() for tensor in (y, last, *cells))
    assert y.abs().max() <= max(1, made.states[0].abs().max())


@pytest.mark.parametrize("cell", CELLS)
def test_without_a_compiled_kernel(cell, monkeypatch):
    made = Layer(cell, 24, 16, 2, [3, 3, 1])
    wanted = made.run()
    monkeypatch.setattr(recurrent, "compiled_plan", lambda *_: None)
    for a, b in zip(made.run(), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell):
    made = Layer(cell, 12, 16, 2, [3, 2, 2], "w8a16")
    leaves = [made.x, *made.states, *made.weights[1]]
    for leaf in leaves:
        leaf.requires_grad_(True)
    outputs = OPS[cell](made.x, made.sizes, *made.states, *made.weights)
    sum((output * (i + 1)).sum() for i, output in enumerate(outputs)).backward()
    found = [leaf.grad.clone() for leaf in leaves]
    dense = MODULES[cell][0](12, 16, bidirectional=True)
    with torch.no_grad():
        for member, parameter in zip(
            made.members, [p for n, p in dense.named_parameters() if "weight" in n], strict=True
        ):
            parameter.copy_(member.dequantize().weight)
        for bias, parameter in zip(
            made.weights[1], [p for n, p in dense.named_parameters() if "bias" in n], strict=True
        ):
            parameter.copy_(bias)
    x, states = made.x.detach().requires_grad_(True), [s.detach().requires_grad_(True) for s in made.states]
    packed = nn.utils.rnn.PackedSequence(x, torch.tensor(made.sizes))
    y, last = dense(packed, tuple(states) if len(states) > 1 else states[0])
    outputs = [y.data, *(last if len(states) > 1 else [last])]
    sum((output * (i + 1)).sum() for i, output in enumerate(outputs)).backward()
    wanted = [x.grad, *(s.grad for s in states), *(p.grad for n, p in dense.named_parameters() if "bias" in n)]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_products_given(cell, dtype):
    made = Layer(cell, 12, 21, 2, [300, 3, 3, 1], dtype=dtype)
    wanted, products, weights = made.run(), [], []
    for i, (packed, bias, scheme, layout) in enumerate(zip(*made.weights, strict=True)):
        weights.append((packed, bias, scheme, layout) if i % 2 else (torch.empty(0, dtype=torch.uint8), None, "", ""))
        if i % 2 == 0:
            size = GATES[cell] * 21, 12
            product = torch.empty(len(made.x), size[0])
            recurrent.compiled_plan(scheme, layout, size, dtype, len(made.x))(made.x, packed, bias, product)
            products.append(product)
    wide = torch.cat([*products, torch.zeros(len(made.x), 5)], 1)[:, :-5]  # rows with gaps
    weights = [list(column) for column in zip(*weights, strict=True)]
    with torch.no_grad():
        found = OPS[cell](wide, made.sizes, *made.states, *weights)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        with pytest.raises(ValueError, match="columns"):
            OPS[cell](wide[:, 1:], made.sizes, *made.states, *weights)
        weights[2][0] = "w8a8"
        with pytest.raises(ValueError, match="all directions"):
            OPS[cell](wide, made.sizes, *made.states, *weights)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, padded, grad):
    made = Layer(cell, 12, 16, 2, [3, 3], "w8a16")
    x = made.x.view(2, 3, 12) if padded else made.x
    args = (x.requires_grad_(grad), None if padded else made.sizes, *made.states, *made.weights)
    torch.library.opcheck(getattr(torch.ops.nybble, cell).default, args)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(6, 40)}, "directions: the weights|bytes"),
        ({"x": torch.zeros(6, 12, dtype=torch.float64)}, "x: torch.float64"),
        ({"x": torch.zeros(2, 3, 12)}, "x: shape"),
        ({"sizes": [3, 1, 2]}, r"sizes\[2\]=2"),
        ({"sizes": [3, 3, 0]}, r"sizes\[2\]=0"),
        ({"sizes": [3, 2]}, "sizes: sum to 5"),
        ({"h": torch.zeros(1, 2, 16)}, "h: "),
        ({"h": torch.zeros(1, 3, 16, dtype=torch.bfloat16)}, "h: .*bfloat16"),
        ({"h": torch.zeros(2, 3, 16)}, "must have two for each"),
        ({"bias": [torch.zeros(3), None]}, "bias: "),
        ({"packed": [torch.zeros(5, dtype=torch.uint8)] * 2}, "packed: has 5 bytes"),
    ],
    ids=str,
)
def test_bad_arguments(change, match):
    made = Layer("gru", 12, 16, 1, [3, 3])
    packed, bias, scheme, layout = made.weights
    args = {"x": made.x, "sizes": made.sizes, "h": made.states[0], "packed": packed, "bias": bias}
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        recurrent.gru(**{**args, "scheme": scheme, "layout": layout, **change})


def test_the_binding_checks_sizes():
    made = Layer("lstm", 12, 16, 1, [3, 3])
    weights = list(zip(*made.weights, strict=True))
    args = [recurrent._compiled(one, torch.zeros(3, k), 64) for one, k in zip(weights, (12, 16), strict=True)]
    for wrong in range(4):
        tensors = [made.x, torch.empty(6, 16), torch.zeros(1, 3, 16), torch.zeros(1, 3, 16)]
        tensors[wrong] = tensors[wrong].flatten()[:-1].unsqueeze(0)
        with pytest.raises(ValueError, match="xyhc"[wrong] + ": has"):
            native.recurrent(registry.fastest("rows"), "lstm", [tuple(args)], [3, 3], tuple(tensors))


def opened(cell, **how):
    torch.manual_seed(0)
    dense = MODULES[cell][0](12, 16, **how).eval()
    return dense, MODULES[cell][1](dense)


HOW = (
    {},
    {"num_layers": 3, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "dropout": 0.5},
)


def assert_same(found, wanted):
    (y, last), (y2, last2) = found, wanted
    if not isinstance(y, torch.Tensor):
        assert torch.equal(y.batch_sizes, y2.batch_sizes)
        y, y2 = y.data, y2.data
    pairs = [(y, y2), *zip(last, last2, strict=True)] if isinstance(last2, tuple) else [(y, y2), (last, last2)]
    for a, b in pairs:
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def calls(dense):
    """Inputs and first states of every form."""
    count, states = dense.num_layers * (2 if dense.bidirectional else 1), STATES[dense.mode.lower()]
    batched = torch.randn(3, 5, 12)
    batch = 3 if dense.batch_first else 5

    def first(*shape):
        given = tuple(torch.randn(count, *shape, 16) for _ in range(states))
        return given if states > 1 else given[0]

    packed = pack_padded_sequence(torch.randn(4, 3, 12), [2, 4, 1], enforce_sorted=False)
    return [
        (batched,),
        (batched, first(batch)),
        (torch.randn(4, 12),),
        (torch.randn(4, 12), first()),
        (packed,),
        (packed, first(3)),
    ]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_dense_members_compute_as_torch(cell, how):
    dense, module = opened(cell, **how)
    for args in calls(dense):
        assert_same(module(*args), dense(*args))


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_watched_members_are_called(cell, how):
    dense, module = opened(cell, **how)
    seen = {name: [] for name in module._names}
    for name, rows in seen.items():
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
    for args in calls(dense):
        assert_same(module(*args), dense(*args))
    assert all(rows and all(x.dim() == 2 for x in rows) for rows in seen.values())


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_quantized_members(cell, how):
    dense, _ = opened(cell, **how)
    module = MODULES[cell][1].from_dense(dense, "w8a16")
    closed = module.close()
    assert type(closed) is type(dense)
    for args in calls(dense):
        found, wanted = module(*args), closed(*args)
        torch.testing.assert_close(
            torch.as_tensor(getattr(found[0], "data", found[0])),
            getattr(wanted[0], "data", wanted[0]),
            atol=1e-5,
            rtol=1e-5,
        )
        torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantized", ["*_l0*", "weight_ih_l0", "weight_hh_l1*", "weight_hh_l0"], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_some_members_quantized(cell, bidirectional, quantized):
    dense, module = opened(cell, num_layers=2, bidirectional=bidirectional)
    for name in fnmatch.filter(module._names, quantized):
        module.add_module(name, nybble.nn.Linear.from_dense(module.get_submodule(name), "w8a16"))
    for args in calls(dense):
        found, wanted = module(*args), module.close()(*args)
        torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_opening_and_closing_share_the_parameters(cell):
    dense, module = opened(cell, num_layers=2, bidirectional=True)
    assert {id(p) for p in module.parameters()} == {id(p) for p in dense.parameters()}
    closed = module.close()
    assert {name: id(p) for name, p in closed.named_parameters()} == {
        name: id(p) for name, p in dense.named_parameters()
    }
    assert (closed.num_layers, closed.bidirectional, closed.training) == (2, True, False)


@pytest.mark.parametrize("cell", CELLS)
def test_trained_while_dense(cell):
    dense, module = opened(cell)
    module(torch.randn(3, 2, 12))[0].sum().backward()
    assert all(p.grad is not None for p in dense.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_between_layers_in_training(cell):
    dense, _ = opened(cell, num_layers=2, dropout=1.0)
    module, x = MODULES[cell][1].from_dense(dense, "w8a16").train(), torch.randn(3, 2, 12)
    with torch.no_grad():
        found = module(x)[0]
        assert torch.equal(module(2 * x)[0], found)  # the second layer sees zeros
        assert not torch.equal(module.eval()(x)[0], found)


def test_what_stays_dense_is_told():
    model = nn.Sequential(nn.LSTM(8, 16, proj_size=4), nn.Linear(4, 4))
    report = nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    assert type(model[0]) is nn.LSTM
    assert "proj_size=4" in str(report)
    with pytest.raises(ValueError, match="proj_size=4"):
        LSTM(model[0])
    with pytest.raises(TypeError, match="GRU, got LSTM"):
        GRU(nn.LSTM(8, 16))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.zeros(3, 2, 11),), "input_size=12"),
        ((torch.zeros(0, 2, 12),), "input: "),
        ((torch.zeros(12),), "input: "),
        ((torch.zeros(3, 2, 12), torch.zeros(1, 3, 16)), r"h_0 is \(1, 3, 16\), must be \(1, 2, 16\)"),
        ((torch.zeros(3, 12), torch.zeros(1, 2, 16)), r"h_0 is .* must be \(1, 16\)"),
        ((torch.zeros(3, 2, 12), (torch.zeros(1, 2, 16),) * 2), "hx: has 2 tensors, must have 1"),
    ],
    ids=str,
)
def test_bad_inputs(args, match):
    dense, _ = opened("gru")
    with pytest.raises(ValueError, match=match):
        GRU.from_dense(dense, "w8a8")(*args)


@pytest.mark.parametrize("cell", CELLS)
def test_calibrated_methods(cell):
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": MODULES[cell][0](32, 32, 2, batch_first=True)}).eval()
    model.forward = lambda x: model["rnn"](x)[0]
    batches = [torch.randn(2, 9, 32) for _ in range(4)]
    with torch.no_grad():
        wanted = model(batches[0])
        report = nybble.quantize(model, "w4a16g32", goal="memory", method="gptq", calibration=batches, fuse=False)
        assert report.coverage >= 95
        assert {layer.name for layer in report.swapped} == {
            f"rnn.weight_{side}_l{i}" for side in ("ih", "hh") for i in (0, 1)
        }
        assert torch.cosine_similarity(model(batches[0]).flatten(), wanted.flatten(), dim=0) > 0.99


def test_packed_sequences_come_back_in_order():
    dense, _ = opened("lstm", bidirectional=True)
    module, x, lengths = LSTM.from_dense(dense, "w8a16"), torch.randn(4, 3, 12), [2, 4, 1]
    with torch.no_grad():
        y, (h, _) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        padded, _ = pad_packed_sequence(y)
        for i, length in enumerate(lengths):
            alone, (h_alone, _) = module(x[:length, i])
            torch.testing.assert_close(padded[:length, i], alone, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(h[:, i], h_alone, atol=1e-6, rtol=1e-6)
