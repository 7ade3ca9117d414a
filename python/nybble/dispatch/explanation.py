"""Which kernel runs a problem and why each other does not, as data and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..text import Items, Part, Shown
from .spec import FLOATS, Problem


@dataclass(frozen=True)
class Explanation(Shown):
    """Which kernel runs, and why each other does not.

    ``rejected`` maps each other kernel to its reason; ``others`` are those of them that compute another family of schemes,
    which are printed only if ``verbose``. ``notes`` says what the chosen kernel does to the activations, and when it is
    compiled or checked.
    """

    problem: Problem
    kernel: str | None
    rejected: dict[str, str]
    others: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    verbose: bool = False

    def reasons(self) -> list[str]:
        """Each reason of the layer's own family once, after its kernels: "a, b: not built"."""
        return _grouped(self.rejected, [name for name in self.rejected if name not in self.others])

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        p = self.problem
        title = f"{p.scheme} m={p.m} n={p.n} k={p.k} {_name(p.dtype)} on {p.device}"
        kernel = self.kernel or "nothing: no kernel accepts this"
        reasons = _grouped(self.rejected, self.rejected) if self.verbose else self.reasons()
        if self.others and not self.verbose:
            count = f"{len(self.others)} kernels" if len(self.others) > 1 else "1 kernel"
            reasons.append(f"{count} of other schemes: explain(..., verbose=True) shows them")
        runs = Items(title, [("runs: ", ", ".join((kernel, *self.notes)))])
        return [runs, Items("does not run:", [("", reason) for reason in reasons])] if reasons else [runs]


class NoKernelError(RuntimeError):
    """No kernel solves the problem. The message has the reason of each kernel of the scheme, and what to do."""

    @classmethod
    def of(cls, explanation: Explanation) -> NoKernelError:
        """The error that an explanation without a kernel stands for."""
        return cls(f"{explanation}\n  to do: {_remedy(explanation.problem)}")


def _grouped(reasons: dict[str, str], names: Iterable[str]) -> list[str]:
    """Kernels with one reason together, in the order of the first."""
    kernels: dict[str, list[str]] = {}
    for name in names:
        kernels.setdefault(reasons[name], []).append(name)
    return [f"{', '.join(group)}: {reason}" for reason, group in kernels.items()]


def _remedy(problem: Problem) -> str:
    """What lets a kernel run the problem."""
    if problem.dtype not in FLOATS:
        return f"convert the activations from {_name(problem.dtype)} to {', '.join(map(_name, FLOATS))}"
    if problem.layout is not None:
        return "layer.unpack(), so that the next call packs the weight again for this machine"
    return "`nybble kernels` lists what each kernel needs; w8a8, w8a16, w4a8 and w4a16 run on every CPU"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
