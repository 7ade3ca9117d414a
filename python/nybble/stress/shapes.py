"""Every shape in [1..64]^3 by every linear kernel with integer sums, each run by itself, whatever dispatch would choose.

A weight of whole numbers is made once for all kernels of its scheme. The outputs of 1 to 64 rows lie in one tensor, rows of poison
between them, and are compared at once with what they must be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dispatch import reference, registry, targets
from ..dispatch.spec import KernelSpec
from ..testing.oracle import pack_for, random_weight, served_by
from ..weights.form import Form
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .children import in_children, slices
from .figure import Tally, Trial

SIDE = 64
_POISON = 12345.0


def kernels_here() -> list[KernelSpec]:
    """The linear kernels that this machine can run, without the reference."""
    here = targets.detect().targets
    return [spec for spec in registry.specs() if spec.built and spec.target in here and spec.target != "torch"]


def exact_kernels() -> list[tuple[KernelSpec, list[Scheme]]]:
    """The kernels with integer sums, dense and sparse, each with its schemes."""
    return [(spec, schemes) for spec in kernels_here() if spec.exact and (schemes := served_by(spec))]


def cube(trial: Trial) -> Tally:
    """[1..64]^3 shapes of every kernel of integers, in a random order; ``count``: shapes of each kernel."""
    pairs = [(n, k) for n in range(1, SIDE + 1) for k in range(1, SIDE + 1)]
    random.Random(0).shuffle(pairs)  # noqa: S311
    mine = Trial(max(trial.count // SIDE, 1), trial.seed).part(len(pairs))
    pairs = pairs[mine.start : mine.stop]
    found = in_children(_cube, [(pairs[begin:end],) for begin, end in slices(len(pairs))])
    found.on = {"kernels": len(exact_kernels())}
    return found


def _cube(pairs: list[tuple[int, int]], say: Callable[[Tally], None]) -> None:
    found, kernels = Tally(), exact_kernels()
    for n, k in pairs:
        made: dict[Scheme, Products] = {}
        drawn = random.Random(n * SIDE + k).random()  # noqa: S311 a scheme of each kernel, the same of those that share it
        for spec, schemes in kernels:
            scheme = schemes[int(drawn * len(schemes))]
            if scheme not in made:
                made[scheme] = Products(scheme, n, k)
            found.add(made[scheme].wrong_of(spec), sum(map(spec.takes, range(1, SIDE + 1))))
    say(found)


def _whole_activations(scheme: Scheme, k: int) -> Tensor:
    """Rows (64, k) of integers whose codes are they themselves, since each row has the whole range; of K = 1, the ends."""
    act = scheme.act_type
    draw = torch.Generator().manual_seed(k)
    if k == 1:
        return (torch.randint(0, 2, (SIDE, 1), generator=draw) * 2.0 - 1) * act.steps
    x = torch.randint(act.lowest, act.highest + 1, (SIDE, k), generator=draw).float()
    x[:, k // 2], x[:, k // 2 - 1] = act.highest, act.lowest
    return x


@dataclass
class _Sheet:
    """Outputs of several numbers of rows in one tensor, and a row of poison before each and after the last.

    Attributes:
        counts: the numbers of rows, ascending.
        right: what ``held`` must hold.
        held: the tensor.
        calls: activations and the place of the output of each; the most rows first, so that what a call writes
            behind its output is not written again.
    """

    counts: list[int]
    right: Tensor
    held: Tensor = field(init=False)
    calls: list[tuple[Tensor, Tensor]] = field(init=False)

    @classmethod
    def of(cls, counts: list[int], x: Tensor, right: Tensor) -> _Sheet:
        """Given the activations and outputs of the most rows."""
        poison = len(right)
        places = [poison] + [row for m in counts for row in (*range(m), poison)]
        extended = torch.cat([right, torch.full((1, right.shape[1]), _POISON)])
        sheet = cls(counts, extended[torch.tensor(places)])
        sheet.held = torch.empty_like(sheet.right)
        sheet.calls = [(x[:m], sheet.held[begin : begin + m]) for begin, m in sheet.places()][::-1]
        return sheet

    def places(self) -> list[tuple[int, int]]:
        """Where each output begins, and its number of rows."""
        begin, found = 1, []
        for m in self.counts:
            found.append((begin, m))
            begin += m + 1
        return found

    def wrong(self) -> str:
        """The first thing that is wrong."""
        differ = self.held != self.right
        row = int(differ.any(1).nonzero()[0])
        begin, m = next(place for place in reversed(self.places()) if place[0] <= row or place[0] == 1)
        if not begin <= row < begin + m:
            return f"m={m}: writes beyond its output"
        return f"m={m}: {int(differ[begin : begin + m].sum())} outputs are wrong"


class Products:
    """Products of 1 to 64 rows with a weight (n, k) of whole numbers, and what they must be."""

    def __init__(self, scheme: Scheme, n: int, k: int) -> None:
        self._made_of = scheme, n, k
        self._quantized: QuantizedWeight = random_weight(scheme, n, k, n * SIDE + k, unit_scale=True)
        self._x = _whole_activations(scheme, k)
        self._bias = torch.arange(n).float() - n // 2 if (n + k) % 2 else None
        right = reference.linear(self._x, self._quantized, self._bias, scheme, torch.float64)
        self._largest, self._right = float(right.abs().max()), right.float()
        self._packed: dict[str, Tensor] = {}
        self._sheets: dict[Sequence[int | None], _Sheet] = {}

    def _sheet(self, spec: KernelSpec) -> _Sheet:
        if spec.m_range not in self._sheets:
            counts = [m for m in range(1, SIDE + 1) if spec.takes(m)]
            self._sheets[spec.m_range] = _Sheet.of(counts, self._x, self._right)
        return self._sheets[spec.m_range]

    def wrong_of(self, spec: KernelSpec) -> str | None:
        """What is wrong in the products of a kernel, for each number of rows that it takes; None: all are exact."""
        scheme, n, k = self._made_of
        if self._largest >= 1 << 24:
            return f"{spec.name} {scheme} n={n} k={k}: float32 cannot hold the sums"
        if spec.layout not in self._packed:
            self._packed[spec.layout] = pack_for(spec, self._quantized, scheme, k)
        packed, sheet = self._packed[spec.layout], self._sheet(spec)
        plan = spec.plan(scheme, n, k, Form.of(self._quantized.tensors(), scheme))
        sheet.held.fill_(_POISON)
        for x, out in sheet.calls:
            plan(x, packed, self._bias, out)
        return None if torch.equal(sheet.held, sheet.right) else f"{spec.name} {scheme} n={n} k={k} {sheet.wrong()}"
