"""Scores and masks: which weights a pattern keeps, with exact counts and ties broken by index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...compiled.ranking import smallest
from ...compiled.rounding import all_finite
from ...weights.sparsity import Block, NofM, Pattern, Unstructured


def keep_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of kept weights, bool (N, K), for scores (N, K) that are finite and not negative.

    * Unstructured: the floor(K * zeros) smallest scores of each row are removed.
    * n:m: the n largest of each m consecutive inputs of a row are kept; of a short last group of r, ceil(n * r / m).
    * Blocks: the floor(blocks * zeros) blocks with the smallest sum are removed; partial edge blocks count as blocks.

    Of equal scores, those with the larger index are kept.

    Raises:
        ValueError: scores are not a matrix, not finite, or negative.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: must be a matrix (N, K)")
    if not all_finite(scores) or scores.min() < 0:
        raise ValueError("scores: must be finite and not negative")
    form = pattern.sparsity
    if isinstance(form, Unstructured):
        return ~smallest(scores, scores.new_full((len(scores),), share(scores.shape[1], pattern.zeros)).long())
    if isinstance(form, NofM):
        return n_of_m(scores, form)
    blocks = block_sums(scores, form)
    gone = smallest(blocks.view(1, -1), torch.tensor([share(blocks.numel(), pattern.zeros)])).view_as(blocks)
    return ~spread_blocks(gone, form, scores.shape)


def n_of_m(scores: Tensor, form: NofM) -> Tensor:
    """The mask of kept weights for scores (N, K) whose first column starts a group of m."""
    n, k = scores.shape
    whole = k // form.m * form.m
    groups = scores[:, :whole].reshape(-1, form.m)
    gone = smallest(groups, torch.full((len(groups),), form.m - form.n)).view(n, whole)
    if rest := k - whole:
        removed = torch.full((n,), rest - form.kept(rest))
        gone = torch.cat((gone, smallest(scores[:, whole:], removed)), dim=1)
    return ~gone


def block_sums(scores: Tensor, form: Block) -> Tensor:
    """The sum over each block of scores (N, K): (ceil(N / rows), ceil(K / columns)); edge blocks may be short."""
    n, k = scores.shape
    rows, columns = -(-n // form.rows), -(-k // form.columns)
    padded = pad(scores, (0, columns * form.columns - k, 0, rows * form.rows - n))
    return padded.view(rows, form.rows, columns, form.columns).sum((1, 3))


def spread_blocks(blocks: Tensor, form: Block, shape: torch.Size | tuple[int, int]) -> Tensor:
    """Expand one value per block to one per weight (N, K)."""
    full = blocks.repeat_interleave(form.rows, 0).repeat_interleave(form.columns, 1)
    return full[: shape[0], : shape[1]]


def share(units: int, zeros: float) -> int:
    """floor(units * zeros) for a decimal fraction ``zeros``, without binary rounding."""
    # 0.29 * 100 is 28.999999999999996 in binary.
    return int(units * zeros + 1e-9)


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W| in float32."""
    return weight.detach().float().abs()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, for the norms (K,) of the inputs (Sun et al., arXiv:2306.11695)."""
    return magnitude_scores(weight) * norms.float()
