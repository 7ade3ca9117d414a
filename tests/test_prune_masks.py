"""Masks: exact counts, ties by index, and what is recognized in a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.passes.prune.masks import keep_mask, magnitude_scores, wanda_scores
from nybble.passes.prune.recognize import recognize, satisfies
from nybble.weights.sparsity import Block, NofM, Pattern, Unstructured

PATTERNS = ["1%", "29%", "50%", "70%", "99%", "2:4", "4:8", "1:3", "32:128", "16:128", "bs16x4:30%", "bs32x32:75%"]


def scores(n: int, k: int) -> Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("percent", [1, 29, 50, 58, 99])
@pytest.mark.parametrize("k", [1, 7, 100, 130])
def test_unstructured_removes_the_floor_of_each_row(percent: int, k: int) -> None:
    values = scores(5, k)
    keep = keep_mask(values, Pattern.parse(f"{percent}%"))
    gone = percent * k // 100
    assert (~keep).sum(1).tolist() == [gone] * 5
    for row, kept in zip(values, keep, strict=True):
        assert row[~kept].amax() < row[kept].amin() if gone else kept.all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (5, 7), (32, 128)])
@pytest.mark.parametrize("rest", [0, 1, 3])
def test_n_of_m_counts_are_exact(n: int, m: int, rest: int) -> None:
    k = 2 * m + rest
    keep = keep_mask(scores(6, k), Pattern(NofM(n, m), 1 - n / m))
    assert (keep[:, : 2 * m].view(6, 2, m).sum(-1) == n).all()
    assert (keep[:, 2 * m :].sum(-1) == -(-n * rest // m)).all()


def test_n_of_m_keeps_the_largest() -> None:
    keep = keep_mask(torch.tensor([[3.0, 1, 2, 4, 1, 1, 9, 0]]), Pattern.parse("2:4"))
    assert keep.tolist() == [[True, False, False, True, False, True, True, False]]


@pytest.mark.parametrize("shape", [(64, 64), (50, 70), (16, 4), (1, 1)])
def test_blocks_go_as_a_whole_and_in_number(shape: tuple[int, int]) -> None:
    form = Block(16, 4)
    keep = keep_mask(scores(*shape), Pattern(form, 0.3))
    blocks = [
        keep[i : i + 16, j : j + 4].float().mean().item() for i in range(0, shape[0], 16) for j in range(0, shape[1], 4)
    ]
    assert set(blocks) <= {0.0, 1.0}
    assert blocks.count(0.0) == int(0.3 * form.count(*shape))


def test_the_block_with_the_smallest_sum_goes() -> None:
    values = torch.ones(32, 8)
    values[16:, :4] = 0.9
    keep = keep_mask(values, Pattern(Block(16, 4), 0.25))
    assert not keep[16:, :4].any()
    assert keep.sum() == 32 * 8 - 64


@pytest.mark.parametrize("pattern", ["50%", "2:4", "3:8"])
def test_of_equal_scores_the_first_go(pattern: str) -> None:
    keep = keep_mask(torch.zeros(2, 8), Pattern.parse(pattern))
    gone = (~keep).sum(1)[0]
    if pattern == "2:4":
        assert keep.tolist() == [[False, False, True, True] * 2] * 2
    else:
        assert keep.tolist() == [[False] * int(gone) + [True] * (8 - int(gone))] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_scores_are_refused(bad: float) -> None:
    values = scores(3, 8)
    values[1, 2] = bad
    with pytest.raises(ValueError, match="scores: must be finite and not negative"):
        keep_mask(values, Pattern.parse("50%"))
    with pytest.raises(ValueError, match=r"scores has shape \(3,\): must be a matrix"):
        keep_mask(torch.ones(3), Pattern.parse("50%"))


@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_with_equal_norms_is_magnitude(text: str) -> None:
    weight = torch.randn(64, 256)
    pattern = Pattern.parse(text)
    wanda = keep_mask(wanda_scores(weight, torch.full((256,), 4.0)), pattern)
    assert torch.equal(wanda, keep_mask(magnitude_scores(weight), pattern))


@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_follows_scaled_inputs_and_magnitude_does_not(text: str) -> None:
    weight, norms, pattern = torch.randn(64, 256), torch.rand(256) + 0.5, Pattern.parse(text)
    scale = torch.exp2(torch.randint(-3, 4, (256,)).float())  # powers of 2: no rounding
    assert torch.equal(
        keep_mask(wanda_scores(weight * scale, norms / scale), pattern), keep_mask(wanda_scores(weight, norms), pattern)
    )
    before, after = (keep_mask(magnitude_scores(w), pattern) for w in (weight, weight * scale))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "text", ["50%", "70%", "95%", "2:4", "1:4", "4:8", "32:128", "8:128", "bs32x32:75%", "bs16x4:50%"]
)
def test_a_pruned_weight_is_recognized(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(256, 512)
    pruned = torch.where(keep_mask(weight.abs(), pattern), weight, 0)
    assert str(recognize(pruned)) == str(pattern)
    assert satisfies(pruned, pattern)
    assert not satisfies(weight, pattern)
    assert recognize(weight) is None


def test_zeros_that_only_happen_to_fit_are_no_pattern_of_groups() -> None:
    weight = torch.randn(8, 256)
    weight[:, 100:] = 0
    found = recognize(weight)
    assert found is not None
    assert not isinstance(found.sparsity, NofM)
    assert recognize(torch.zeros(4, 4)) is None
    assert recognize(torch.where(torch.rand(100, 100) < 0.24, 0, torch.ones(100, 100))).sparsity != Unstructured(50)  # type: ignore[union-attr]


def test_padding_is_no_pattern() -> None:
    weight = torch.ones(8, 96)
    weight[:, 48:] = 0
    found = recognize(weight)
    assert found is not None
    assert found.zeros == 0.5
