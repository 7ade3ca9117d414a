"""sp24w16a16: bfloat16 weights of which two in four are kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.layouts.portable import from_portable, to_portable
from nybble.nn import SparseLinear
from nybble.testing.oracle import random_weight
from nybble.weights.rounding import dequantize_weight
from nybble.weights.scheme import Scheme

SCHEME = Scheme.parse("sp24w16a16")


def pruned(n: int, k: int) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(k, n)
    kept = torch.rand(n, -(-k // 4), 4).argsort(-1).lt(2).flatten(1)[:, :k]
    layer.weight.data *= kept
    return layer


@pytest.mark.parametrize(("n", "k"), [(1, 1), (70, 101), (64, 128), (3, 6)])
def test_the_weight_is_kept_as_bfloat16(n: int, k: int) -> None:
    dense = pruned(n, k)
    layer = SparseLinear.from_dense(dense, SCHEME)
    assert torch.equal(layer.dequantized_weight(), dense.weight.detach().bfloat16().float())
    held = layer.state_dict()
    assert held["values"].dtype == torch.bfloat16
    assert held["values"].numel() == int((dense.weight != 0).sum())
    assert (held["scale"] == 1).all()
    x = torch.randn(5, k)
    expected = x.double() @ layer.dequantized_weight().double().t() + dense.bias.double()
    assert (layer(x).double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    fresh = SparseLinear(k, n, scheme=SCHEME)
    fresh.load_state_dict(held)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (70, 101), (64, 128)])
def test_portable_tensors_are_inverted_exactly(n: int, k: int) -> None:
    quantized = random_weight(SCHEME, n, k)
    back = from_portable(to_portable(quantized, SCHEME, k), SCHEME, n, k)
    assert torch.equal(back.qweight, quantized.qweight)
    assert torch.equal(dequantize_weight(back, SCHEME, k), quantized.qweight.float())


def more_than_two(mask: Tensor, values: Tensor) -> None:
    mask[0, 0], mask[1, 0] = 0b111, 0


def beyond(mask: Tensor, values: Tensor) -> None:
    mask[0, -1] |= 0x80


def another_count(mask: Tensor, values: Tensor) -> None:
    mask[0, 0] = 0


def not_finite(mask: Tensor, values: Tensor) -> None:
    values[0] = torch.inf


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (more_than_two, "keeps more than 2 of 4"),
        (beyond, "beyond the last input"),
        (another_count, "values: 8, but the mask keeps 4"),
        (not_finite, "qweight: must be finite"),
    ],
)
def test_damaged_tensors_are_refused(damage, why: str) -> None:
    weight = torch.tensor([[1.0, 2, 0, 0, 3, 0, 4], [5, 0, 0, 6, 0, 7, 8]])
    layer = nn.Linear(7, 2)
    layer.weight.data = weight
    tensors = to_portable(SparseLinear.from_dense(layer, SCHEME).quantized(), SCHEME, 7)
    damage(tensors["mask"], tensors["values"])
    if damage is more_than_two:  # as many as there are values
        tensors["values"] = tensors["values"][: sum(byte.bit_count() for byte in tensors["mask"].flatten().tolist())]
    with pytest.raises(ValueError, match=why):
        from_portable(tensors, SCHEME, 2, 7)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_pruned_model_is_saved_and_recovered(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    model, data = copy.deepcopy(reference), [torch.randn(64, 64) for _ in range(8)]
    nybble.sparsify(model, "2:4", method=method, scheme="w16a16", goal="memory", calibration=data)
    assert all(layer.scheme == SCHEME for layer in model if isinstance(layer, SparseLinear))
    nybble.save(model, tmp_path / "saved")
    loaded = copy.deepcopy(reference)
    nybble.load(loaded, tmp_path / "saved")
    assert torch.equal(loaded(data[0]), model(data[0]))
    zeros = model[0].dequantized_weight() == 0
    done = nybble.recover(model, reference, data)
    assert done.after < done.before
    assert not model[0].dequantized_weight()[zeros].any()


@pytest.mark.parametrize("name", ["sp50w16a16", "sp24w16a8", "w16a16g32", "bs32x32w16a16"])
def test_other_combinations_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"16|blocks"):
        Scheme.parse(name)
