"""Weights that are drawn where they are used: of their scheme, packed as the layouts say, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from nybble import layouts
from nybble.bench import gpu_weights
from nybble.bench.weights import WeightKind
from nybble.dispatch.registry import all_specs
from nybble.testing.oracle import served_by
from nybble.weights.rounding import check_portable, dequantize_weight
from nybble.weights.sparsity import Block

KINDS = sorted(
    {
        (spec.layout, str(scheme))
        for spec in all_specs()
        if spec.device == "cuda" and spec.op == "linear"
        for scheme in served_by(spec)
    }
)


@pytest.mark.parametrize(("layout", "scheme"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(72, 1096), (130, 515), (64, 128)])
def test_weights_are_of_their_scheme_and_packed_as_the_layout_says(layout: str, scheme: str, n: int, k: int) -> None:
    kind = WeightKind.parse(scheme)
    packed, quantized = gpu_weights.packed(kind, layout, n, k, "cpu")
    check_portable(quantized, kind.scheme, n, k)
    weight = dequantize_weight(quantized, kind.scheme, k)
    assert 0.3 < float(weight.std() * k**0.5) < 3, "outputs of inputs of variance 1 are about 1"
    if not isinstance(kind.scheme.sparsity, Block):
        unpacked = layouts.unpack(packed, layout, kind.scheme, n, k)
        assert torch.equal(dequantize_weight(unpacked, kind.scheme, k), weight)
        sums = layouts.views(packed, layout, kind.scheme, n, k).get("weight_sum")
        if sums is not None:
            assert torch.allclose(sums[:n].double(), weight.double().sum(1), atol=1e-5)


def test_codes_fill_their_range() -> None:
    eight = gpu_weights.draw(WeightKind.parse("w8a8"), 64, 1024, "cpu").qweight
    assert (int(eight.min()), int(eight.max())) == (-127, 127)
    four = gpu_weights.draw(WeightKind.parse("w4a16g32asym"), 64, 1024, "cpu")
    assert len(four.qweight.unique()) == 256
    assert four.zero_point is not None
    assert len(four.zero_point.unique()) == 16


@pytest.mark.parametrize(("text", "share"), [("bs64x64w8a8:75%", 0.75), ("bs64x64w8a8:90%", 0.9), ("bs64x64w8a8", 0.5)])
def test_a_share_of_the_blocks_is_zero(text: str, share: float) -> None:
    codes = gpu_weights.draw(WeightKind.parse(text), 640, 640, "cpu").qweight
    zero = (codes.view(10, 64, 10, 64) == 0).transpose(1, 2).flatten(2)
    assert zero.all(-1).float().mean() == pytest.approx(share)
    assert (zero.all(-1) == zero.any(-1)).all(), "no code that is kept is zero"


@pytest.mark.parametrize("scheme", ["sp24w8a16", "sp24w4a16g128", "sp24w16a16"])
def test_two_of_four_are_kept_in_every_way(scheme: str) -> None:
    weight = dequantize_weight(
        gpu_weights.draw(WeightKind.parse(scheme), 64, 256, "cpu"), WeightKind.parse(scheme).scheme, 256
    )
    kept = (weight.view(-1, 4) != 0).int()
    assert (kept.sum(1) == 2).all()
    assert len(kept.unique(dim=0)) == 6


def test_the_seed_chooses() -> None:
    kind = WeightKind.parse("w4a16g128asym")
    one, same, other = (gpu_weights.packed(kind, "frag4", 64, 256, "cpu", seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_zeros_that_no_kernel_for_gpus_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="scheme=sp50w8a8: sparsity must be 2:4 or blocks"):
        gpu_weights.draw(WeightKind.parse("sp50w8a8"), 8, 8, "cpu")
