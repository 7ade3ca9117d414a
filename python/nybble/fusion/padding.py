"""Rows of padding are not computed: sequences of about one length run together, each without the padding at its end.

Only attention mixes the rows of a sequence. A key that the masks hide from all queries has the weight 0, so the rows that
stay are what they would have been, but for the order of attention's sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .nodes import Attend, Lookup, Mask, Node, Rotate, Run
from .program import Program

# What a group costs beside its rows, in rows: entering the chain, and reading the weights anew. Measured on MiniLM: 24.
_GROUP_ROWS = 32
# Sequences of a group are a multiple, for equal work on 2 or 4 threads. Not of the threads that there are, since attention
# sums in another order in other groups: no result may depend on their number.
_SEQUENCES = 4
# A gain of less than this share of all rows is not worth the copies.
_LEAST_SHARE = 1 / 8


@dataclass(frozen=True)
class Group:
    """Sequences of a call, and how many of their tokens run."""

    of: Tensor  # indexes of sequences, int64
    length: int


def groups(program: Program, run: Run) -> list[Group]:
    """The groups in which a call runs without padding; none where it has too little, or something looks at it."""
    attends = [node for node in program.explanation.nodes if isinstance(node, Attend)]
    if run.batch < 2 or not attends or any(node.mask is None or node.cache is not None for node in attends):
        return []
    masks = {node.mask for node in attends if node.mask is not None}
    lengths = torch.stack([seen(run.mask(mask), run) for mask in masks]).amax(0)
    ordered, order = lengths.sort(descending=True, stable=True)
    found = _grouped(ordered.tolist(), order)
    rows = sum(len(one.of) * one.length + _GROUP_ROWS for one in found)
    return found if rows <= run.batch * run.length * (1 - _LEAST_SHARE) else []


def seen(mask: Tensor, run: Run) -> Tensor:
    """For each sequence, 1 + the last key that a query attends to. All, where a query among these attends to none: it
    might then attend to all."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[:, :, :1] if mask.stride(2) == 0 else mask
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.expand(run.batch, -1, -1, run.length)
    numbers = torch.arange(1, run.length + 1, device=mask.device)
    lengths = (visible.flatten(1, 2).any(1) * numbers).amax(-1)
    blind = ~visible.any(-1).all(1)  # (batch, queries or 1)
    return torch.where(
        (blind & (numbers[: blind.shape[1]] <= lengths[:, None].clamp_min(1))).any(-1), run.length, lengths
    )


def _grouped(ordered: list[int], order: Tensor) -> list[Group]:
    """Sequences from the longest to the shortest, in the groups that cost least."""
    count = len(ordered)
    best = {0: (0, 0)}  # end of a group -> cost of all up to it, and where it begins
    for end in (*range(_SEQUENCES, count, _SEQUENCES), count):
        best[end] = min((cost + (end - at) * ordered[at] + _GROUP_ROWS, at) for at, (cost, _) in best.items())
    found, end = list[Group](), count
    while end > 0:
        begin = best[end][1]
        found.append(Group(order[begin:end], ordered[begin]))
        end = begin
    return found


def taken(program: Program, run: Run, group: Group) -> Run:
    """The run of a group."""

    def cut(table: Tensor, *dimensions: int) -> Tensor:
        """Of a tensor with the sequences first, and the tokens in these dimensions; a size of 1 stands for all."""
        for at in dimensions:
            table = table if table.shape[at] == 1 else table.narrow(at, 0, group.length)
        return table if table.shape[0] == 1 else table.index_select(0, group.of)

    values = {node: cut(_sequences(value, run), 1).reshape(-1, value.shape[1]) for node, value in run.values.items()}
    tables, masks = dict(run.tables), dict[Mask, Tensor]()
    for node in program.explanation.nodes:
        if isinstance(node, Lookup) and node.path is not None:
            tables[node.path] = cut(run.tables[node.path], 1)
        if isinstance(node, Rotate):
            tables |= {path: cut(run.tables[path], 1) for path in (node.cos, node.sin)}
        if isinstance(node, Attend) and node.mask is not None and node.mask not in masks:
            mask = run.mask(node.mask)
            masks[node.mask] = cut(mask[(None,) * (4 - mask.dim())], 2, 3)
    return Run(len(group.of), group.length, values, tables, masks)


def put(values: dict[Node, Tensor], run: Run, group: Group, part: Run, outputs: tuple[Node, ...]) -> None:
    """Puts the outputs of a group where they belong; what is not computed is 0."""
    for node in outputs:
        rows = part.values[node]
        if node not in values:
            values[node] = rows.new_zeros(run.batch * run.length, rows.shape[1])
        to = _sequences(values[node], run).narrow(1, 0, group.length)
        to.index_copy_(0, group.of, _sequences(rows, part))


def _sequences(rows: Tensor, run: Run) -> Tensor:
    """Rows as (batch, length, width)."""
    found: Tensor = rows.unflatten(0, (run.batch, run.length))
    return found
