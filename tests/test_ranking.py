"""Which scores are the smallest: the compiled library against sorting."""

from __future__ import annotations

import pytest
import torch

from nybble import native
from nybble.compiled import ranking

# Rows that are ranked by pairs, and by digits; several pieces of work.
SHAPES = [(1, 1), (7, 4), (5, 32), (5, 33), (3, 130), (2, 2048), (300, 700), (2, 70_000)]


def scores(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    normal = torch.randn(shape, generator=generator).abs()
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=generator).float()
    if kind == "octaves":
        return torch.exp(30 * torch.randn(shape, generator=generator)).clamp(max=3e38)
    if kind == "neighbours":  # that differ in the last bits
        return (torch.randint(0, 4000, shape, generator=generator) + (1 << 30)).to(torch.int32).view(torch.float32)
    return normal * float(kind)


@pytest.mark.parametrize("kind", ["1", "0", "1e-42", "ties", "octaves", "neighbours"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_count_of_any_row_equals_sorting(shape: tuple[int, int], kind: str) -> None:
    values, (n, k) = scores(kind, shape), shape
    for most in (0, 1, k // 2, k - 1, k, k + 1):
        counts = torch.full((n,), most)
        assert torch.equal(ranking.smallest(values, counts), ranking.by_sorting(values, counts)), most
    counts = torch.randint(-1, k + 2, (n,), generator=torch.Generator().manual_seed(n))
    assert torch.equal(ranking.smallest(values, counts), ranking.by_sorting(values, counts))


def test_strides_other_dtypes_and_counts() -> None:
    values = scores("1", (40, 60))
    counts = torch.full((60,), 11)
    for view in (values.t(), values.t().double(), values.t().bfloat16()):
        for each in (counts, counts.int(), counts.repeat(2)[::2]):
            assert torch.equal(ranking.smallest(view, each), ranking.by_sorting(view, counts))
    assert ranking.smallest(values[:, :0], counts[:40]).shape == (40, 0)


def test_nan_is_the_largest_and_minus_zero_is_zero() -> None:
    for k in (5, 50):
        values = torch.ones(1, k)
        values[0, :4] = torch.tensor([torch.nan, -torch.nan, -0.0, 0.0])
        assert ranking.smallest(values, torch.tensor([1])).nonzero().tolist() == [[0, 2]]
        assert ranking.smallest(values, torch.tensor([k - 2])).logical_not().nonzero().tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_only_what_is_kept_stays(dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (3, 77), (130, 1024)):
        weight = torch.randn(n, k).to(dtype)
        weight[0, 0] = torch.inf
        for view in (weight, weight.t(), torch._neg_view(weight)):
            keep = torch.rand(view.shape) < 0.5
            found = ranking.keep_only(view, keep)
            assert torch.equal(found, torch.where(keep, view, 0))
            assert not torch.signbit(found[~keep]).any()


def test_spans_that_are_too_small_are_refused() -> None:
    values, counts, chosen = torch.ones(4, 8), torch.ones(4, dtype=torch.int64), torch.ones(4, 8, dtype=torch.bool)
    spans = [native.memory(tensor) for tensor in (values, counts, chosen)]
    for i, name in enumerate(("scores", "counts", "chosen")):
        short = [(address, size - 1) if i == j else (address, size) for j, (address, size) in enumerate(spans)]
        with pytest.raises(ValueError, match=rf"{name}: has \d+ bytes, needs"):
            native._C.choose_smallest(short[0], short[1], 4, 8, short[2], 1)
    with pytest.raises(ValueError, match="k=0"):
        native._C.choose_smallest(spans[0], spans[1], 4, 0, spans[2], 1)
