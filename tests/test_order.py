"""Weights whose columns are in an order of their own (act-order): on every kernel, in a layer, compiled and on disk."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import nybble
from nybble import layouts, native
from nybble.dispatch import reference
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS, Problem
from nybble.experts import why_not
from nybble.nn import Linear, SparseLinear
from nybble.testing.oracle import SHAPES, expected_output, random_weight, run, served_by
from nybble.weights.activations import ActScale
from nybble.weights.rounding import QuantizedWeight, dequantize_weight
from nybble.weights.scheme import Scheme

SPECS = [spec for spec in specs() if spec.ordered and spec.device != "cuda"]
CASES = [
    pytest.param(spec, Scheme.parse(f"{scheme}order"), id=f"{spec.name}-{scheme}order")
    for spec in SPECS
    for scheme in served_by(spec)
    if scheme.sparsity is None and scheme.group_size in (None, 32)
]
NAMES = ("w4a16g32order", "w4a8g32asymorder", "w8a8order", "w4a8g32staticorder")


def layer_of(scheme: str, n: int = 24, k: int = 37, dtype: torch.dtype = torch.float32) -> Linear:
    parsed = Scheme.parse(scheme)
    act = ActScale.of_range(-2.5, 3.0, parsed.act_type) if parsed.static else None
    weight, bias = random_weight(parsed, n, k, seed=3), nn.Parameter(torch.randn(n, dtype=dtype))
    return Linear.from_quantized(weight, k, bias, parsed, dtype, act)


def in_natural_order(quantized: QuantizedWeight) -> QuantizedWeight:
    return replace(quantized, order=None)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("spec", "scheme"), CASES)
def test_the_product_has_the_bits_of_permuted_activations(spec, scheme: Scheme) -> None:
    reason = spec.why_not(Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout))
    if reason is not None:
        pytest.skip(f"{spec.name}: {reason}")
    plain = Scheme.parse(str(scheme).removesuffix("order"))
    for i, (m, n, k) in enumerate(SHAPES.values()):
        quantized, bias = random_weight(scheme, n, k, i), torch.randn(n)
        x = torch.randn(m, k).to(spec.act_dtypes[i % len(spec.act_dtypes)])
        got = run(spec, quantized, scheme, x, bias)
        permuted = run(spec, in_natural_order(quantized), plain, x[:, quantized.order.long()].contiguous(), bias)
        expected, bound = expected_output(spec, scheme, x, quantized, bias)
        assert ((got.double() - expected).abs() <= bound).all(), (m, n, k)
        if spec.target != "torch":  # float64 sums in another order
            assert torch.equal(got, permuted), (m, n, k)


def test_dequantizing_gives_the_order_of_the_inputs() -> None:
    scheme = Scheme.parse("w4a16g32order")
    quantized = random_weight(scheme, 5, 70)
    stored = dequantize_weight(in_natural_order(quantized), Scheme.parse("w4a16g32"), 70)
    weight = dequantize_weight(quantized, scheme, 70)
    for j, column in enumerate(quantized.order.tolist()):
        assert torch.equal(weight[:, column], stored[:, j])
    layer = Linear.from_quantized(quantized, 70, None, scheme, torch.float32)
    assert torch.equal(layer.dequantize().weight, weight)
    assert torch.equal(layer.weight.dequantize(), weight)


@pytest.mark.parametrize("layout", ["n16k8", "n16k4", "plain"])
def test_packing(layout: str) -> None:
    scheme = Scheme.parse("w8a8order" if layout == "n16k4" else "w4a8g32asymorder")
    quantized = random_weight(scheme, 33, 70)
    packed = layouts.pack(quantized, layout, scheme, 70)
    assert packed.numel() == layouts.packed_nbytes(layout, scheme, 33, 70)
    found = [layouts.unpack(packed, layout, scheme, 33, 70)]
    if layout != "plain":
        assert torch.equal(packed, native.pack(quantized, scheme, 70, layout))
        found.append(native.unpack(packed, scheme, 33, 70, layout))
    for weight in found:
        for name, tensor in quantized.tensors().items():
            assert torch.equal(weight.tensors()[name], tensor), name


@pytest.mark.parametrize("wrong", [[0, 1, 2, 2], [0, 1, 2, 4], [-1, 0, 1, 2]])
def test_the_compiled_library_packs_permutations_alone(wrong: list[int]) -> None:
    scheme = Scheme.parse("w8a8order")
    quantized = random_weight(scheme, 2, 4)
    bad = QuantizedWeight(quantized.qweight, quantized.scale, None, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"order=(2|4|-1): must be a permutation"):
        native.pack(bad, scheme, 4, "n16k4")


@pytest.mark.parametrize("scheme", NAMES)
def test_a_layer_is_what_its_tensors_say(scheme: str) -> None:
    layer, x = layer_of(scheme), torch.randn(5, 37)
    state = layer.state_dict()
    assert state["order"].dtype == torch.int32
    expected = reference.linear(x, layer.quantized(), layer.bias, layer.scheme, torch.float64, layer.act())
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    again = Linear(37, 24, scheme=scheme)
    again.load_state_dict(state)
    packed = layer.packed.clone()
    layer.unpack()
    assert isinstance(layer.order, nn.Parameter)
    layer.pack()
    assert torch.equal(layer.packed, packed)
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 its own bytes
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.order, state["order"])


def test_a_new_layer_has_the_order_of_its_inputs() -> None:
    layer = Linear(7, 3, scheme="w8a8order")
    assert layer.order.tolist() == list(range(7))
    assert torch.equal(layer(torch.randn(2, 7)), layer.bias.expand(2, 3))
    dense = nn.Linear(64, 8)
    for method in ("rtn", "mse"):
        x = torch.randn(3, 64)
        ordered, plain = (Linear.from_dense(dense, name, method) for name in ("w4a16g32order", "w4a16g32"))
        assert torch.equal(ordered(x), plain(x))


def test_meta_and_dtypes() -> None:
    layer = Linear(37, 24, scheme="w4a16g32order", device="meta")
    assert layer(torch.randn(2, 37, device="meta")).shape == (2, 24)
    assert layer.to_empty(device="cpu").order.dtype == torch.int32
    for dtype in FLOATS:
        moved = layer_of("w4a16g32order").to(dtype)
        order = moved.order.clone()
        moved.unpack()
        assert torch.equal(moved.to(torch.float32).order, order)
        assert moved.to(dtype)(torch.randn(2, 37, dtype=dtype)).dtype == dtype


def test_compiled_and_with_gradients() -> None:
    layer, x = layer_of("w4a16g32order"), torch.randn(3, 37, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized_weight().sum(0).expand(3, 37), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a16g32order", "w4a8g32order"])
def test_threads_and_numbers_of_rows_change_nothing(scheme: str) -> None:
    layer, x = layer_of(scheme, 300, 257), torch.randn(70, 257)
    whole, before = layer(x), torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), whole)
    torch.set_num_threads(before)
    found: list[torch.Tensor] = []
    several = [threading.Thread(target=lambda: found.append(layer(x))) for _ in range(4)]
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert all(torch.equal(one, whole) for one in found)
    if "a8" in scheme:
        assert torch.equal(torch.cat([layer(row[None]) for row in x]), whole)


@pytest.mark.parametrize("scheme", NAMES)
def test_checkpoint_round_trip(scheme: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    model, x = nn.Sequential(layer_of(scheme)), torch.randn(5, 37)
    nybble.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(37, 24))
    nybble.load(fresh, tmp_path)
    assert fresh[0].scheme == Scheme.parse(scheme)
    assert torch.equal(fresh[0].order, model[0].order)
    assert torch.equal(fresh(x), model(x))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)


WRONG = {
    "twice": (lambda order: order.index_fill(0, torch.tensor([3]), int(order[0])), "each number from 0 to 36 once"),
    "beyond": (lambda order: order + 1, "each number from 0 to 36 once"),
    "negative": (lambda order: order - 1, "each number from 0 to 36 once"),
    "short": (lambda order: order[1:], r"order: \(36,\)"),
    "long": (lambda order: order.long(), r"torch\.int64"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_permutation_is_refused_by_name(change, words: str, tmp_path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    layer = layer_of("w4a16g32order")
    with pytest.raises(RuntimeError, match=f"order: .*{words}|{words}"):
        layer.load_state_dict({**layer.state_dict(), "order": change(layer.order)})
    nybble.save(nn.Sequential(layer), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "0.order": change(tensors["0.order"]).contiguous()}, file)
    with pytest.raises(nybble.checkpoint.CheckpointError):
        nybble.load(nn.Sequential(nn.Linear(37, 24)), tmp_path)


def test_states_without_order_are_refused() -> None:
    ordered, plain = layer_of("w4a16g32order"), Linear(37, 24, scheme="w4a16g32")
    with pytest.raises(RuntimeError, match="order"):
        ordered.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="order"):
        plain.load_state_dict(ordered.state_dict())


def test_who_takes_no_order_says_so() -> None:
    with pytest.raises(ValueError, match="ordered=True: sparse weights"):
        Scheme.parse("sp50w8a8order")
    for module in (
        lambda: nybble.nn.Embedding(10, 32, scheme="w4a16g32order"),
        lambda: nybble.nn.Conv1d.on_meta(8, 12, "w8a8order", torch.float32),
        lambda: SparseLinear(8, 4, scheme="w8a8order"),
    ):
        with pytest.raises(ValueError, match=r"ordered columns are for nybble.nn.Linear|needs a sparse scheme"):
            module()
    assert "order of the inputs of its own" in str(why_not(Scheme.parse("w4a16g32order")))
    gpu = [spec for spec in specs() if spec.device == "cuda"]
    scheme = Scheme.parse("w4a16g32order")
    assert gpu
    assert all(spec.why_not(Problem(scheme, 1, 8, 64, device="cuda")) is not None for spec in gpu)


def test_the_order_has_no_part_in_what_a_name_means_otherwise() -> None:
    for name in NAMES:
        scheme = Scheme.parse(name)
        assert str(scheme) == name
        assert scheme.ordered
        assert scheme.family == Scheme.parse(name.removesuffix("order")).family


@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_keep_the_order_of_their_inputs_are_quantized_without_one(tied: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.image = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Conv1d(32, 32, 3)
            self.head = nn.Linear(32, 64, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.image(self.inner(self.table(ids)).transpose(1, 2)).transpose(1, 2))

    model, ids = Model(), torch.randint(0, 64, (2, 9))
    before = model(ids)
    nybble.quantize(model, "w4a16g32order", goal="memory", calibration=[ids])
    found = {name: str(module.scheme) for name, module in model.named_modules() if hasattr(module, "scheme")}
    head = "w4a16g32" if tied else "w4a16g32order"
    assert found == {"table": "w4a16g32", "inner": "w4a16g32order", "image": "w4a16g32", "head": head}
    assert (model(ids) - before).norm() < 0.25 * before.norm()
