"""What a kernel is: one row of the table of kernels. What it accepts is data, so one `why_not` serves all kernels, and
the tests derive their cases from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import layouts
from ..weights.form import USUAL, Form, split_layout
from ..weights.scheme import Scheme, numbers_of
from ..weights.sparsity import Block, Sparsity
from . import targets

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Of the 4-bit weights that kernels for GPUs take.
GPU_GROUP_SIZES = (None, 32, 64, 128)

# Kernels that disagreed with the reference on this machine, and how: see selfcheck.py.
DISTRUSTED: dict[str, str] = {}

# (x, packed, bias, out): out (..., N), contiguous, = x (..., K) w^T + bias. x is contiguous, or (M, K) with unit stride
# along K.
Plan = Callable[[Tensor, Tensor, "Tensor | None", Tensor], None]


@dataclass(frozen=True)
class Problem:
    """One product: y (m, n) = x (m, k) w (n, k)^T. layout None: the weight is not packed yet.

    A layout whose name ends in a form sets `form`, and is kept without it.
    """

    scheme: Scheme
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str | None = None
    out_dtype: torch.dtype | None = None
    form: Form = USUAL

    def __post_init__(self) -> None:
        if self.layout is not None:
            base, form = split_layout(self.layout)
            object.__setattr__(self, "layout", base)
            object.__setattr__(self, "form", form if form != USUAL else self.form)


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, and what it accepts.

    Args:
        name: unique in the table.
        scheme: the family that it computes, see Scheme.family; "" for ops other than linear.
        target: the hardware that it is written for.
        layout: of the packed weight that it reads.
        make: (scheme, out_features, in_features) -> a Plan; None for ops other than linear. For a weight of another
            form than the usual one, that is the fourth argument.
        op: "linear", or the step of a linear layer that it takes.
        device: the type of device that its tensors are on; None: any.
        group_sizes: of the weights; None: all of the family.
        act_dtypes, out_dtypes: of the activations and of the output.
        m_range: the fewest and the most rows of activations; None: no upper limit.
        panel: number of the format of the activations, csrc/abi.h.
        block_rows: number of rows of activations that it multiplies at once.
        exact: whether sums are int32, so that the result is bitwise equal on every target and for every thread count.
        fixed_order: whether it adds floats in one order for every number of rows, so that the result of a row is bitwise
            equal alone and in a small batch.
        least_zeros: the share of zeros from which a weight is packed for it.
        flushes_subnormals: whether products of bfloat16 pairs below 2^-126 count as 0.
        rounds: the dtype that it rounds float32 activations to; None: it does not.
        rounds_weight: whether it multiplies with the weight rounded to the dtype of the activations.
        rounds_book: whether it multiplies with the values of a book rounded to bfloat16.
        sparsity: the only pattern of zeros that it takes; None: all of the family.
        built: whether the compiled extension has it.
        static: whether it takes activations with a static scale.
        ordered: whether it takes weights whose columns are in an order of their own.
        scales: dtypes of scales that it reads, besides that of the weight type.
        minimum: whether it takes weights with float minimums.
        from_plugin: whether a plug-in brings it, so that it is compared with the reference before its first use. The
            registry sets it.
    """

    name: str
    scheme: str
    target: str
    layout: str
    make: Callable[..., Plan] | None = None
    op: str = "linear"
    device: str | None = "cpu"
    group_sizes: tuple[int | None, ...] | None = None
    act_dtypes: tuple[torch.dtype, ...] = FLOATS
    out_dtypes: tuple[torch.dtype, ...] = FLOATS
    m_range: tuple[int, int | None] = (1, None)
    panel: int = 0
    block_rows: int = 0
    exact: bool = False
    fixed_order: bool = False
    least_zeros: float = 0.0
    flushes_subnormals: bool = False
    rounds: torch.dtype | None = None
    rounds_weight: bool = False
    rounds_book: bool = False
    sparsity: Sparsity | None = None
    built: bool = True
    static: bool = False
    ordered: bool = False
    scales: tuple[torch.dtype, ...] = ()
    minimum: bool = False
    from_plugin: bool = field(default=False, compare=False)

    def why_not(self, problem: Problem) -> str | None:
        """The first reason that this kernel cannot solve the problem here; None if it can."""
        if self.scheme != problem.scheme.family:  # so of most kernels: making all the texts below would take longer
            return f"computes {self.scheme}, not {problem.scheme.family}"
        out_dtype, size = problem.out_dtype or problem.dtype, problem.scheme.group_size
        machine, zeros = targets.detect(), _zeros(problem.scheme)
        checks = (
            (self.static or not problem.scheme.static, "finds a scale for each token, takes no static ones"),
            (self.ordered or not problem.scheme.ordered, "multiplies columns in the order of the inputs"),
            (
                self.sparsity in (None, problem.scheme.sparsity),
                f"is for {self.sparsity}, not {problem.scheme.sparsity}",
            ),
            (self.built and self.make is not None, "not built"),
            (self.target in machine.targets, machine.missing.get(self.target, "")),
            (self.name not in DISTRUSTED, DISTRUSTED.get(self.name, "")),
            (self.device in (None, problem.device), f"runs on {self.device}, not on {problem.device}"),
            (problem.layout in (None, self.layout), f"reads layout {self.layout}, the weight is {problem.layout}"),
            (problem.dtype in self.act_dtypes, f"takes {_names(self.act_dtypes)}, not {_names((problem.dtype,))}"),
            (out_dtype in self.out_dtypes, f"gives {_names(self.out_dtypes)}, not {_names((out_dtype,))}"),
            (self.takes(problem.m), f"is for {_rows(self.m_range)}, not {problem.m}"),
            (self.group_sizes is None or size in self.group_sizes, f"has no group_size {size}"),
            (not (rule := layouts.find(self.layout).why_not(problem.scheme)), f"{rule}"),
            (problem.form.scale in (None, *self.scales), f"reads no scales of {_names((problem.form.scale,))}"),
            (self.minimum or not problem.form.minimum, "takes no float minimums in place of zero points"),
            (
                problem.layout is not None or self.least_zeros <= zeros,
                f"packed from {self.least_zeros:.0%} zeros on, {problem.scheme} has {zeros:.0%}",
            ),
        )
        return next((reason for holds, reason in checks if not holds), None)

    def plan(self, scheme: Scheme, n: int, k: int, form: Form = USUAL) -> Plan:
        """What computes products with a weight (n, k). Raises ValueError if the kernel is of another op than linear."""
        if self.make is None:
            raise ValueError(f"kernel={self.name!r}: must be a linear kernel")
        return self.make(scheme, n, k) if form == USUAL else self.make(scheme, n, k, form)

    def takes(self, m: int) -> bool:
        """Whether it serves m rows of activations; no rows count as one."""
        least, most = self.m_range
        return least <= max(m, 1) and (most is None or m <= most)

    def serves(self, scheme: Scheme) -> bool:
        """Whether it takes the groups, zero points and pattern of zeros of a scheme of its family."""
        alike = self.sparsity in (None, scheme.sparsity) and scheme.group_size in self.sizes()
        return alike and layouts.find(self.layout).why_not(scheme) is None

    def sizes(self) -> tuple[int | None, ...]:
        """The group sizes that it takes; None stands for one group of all inputs."""
        if self.group_sizes is not None:
            return self.group_sizes
        kind = numbers_of(self.scheme)[0]
        has_groups = kind.sparse_groups or self.scheme.startswith(kind.name)  # sparse families have letters before it
        return kind.sizes if has_groups and not layouts.find(self.layout).a_scale_a_row else (None,)


def _zeros(scheme: Scheme) -> float:
    """The share of zeros in the name of a scheme; the name of a block-sparse one has none."""
    return 0.0 if scheme.sparsity is None or isinstance(scheme.sparsity, Block) else scheme.sparsity.zeros


def _rows(m_range: tuple[int, int | None]) -> str:
    least, most = m_range
    return f"{least} to {most} rows" if most else f"{least} rows and more"


def _names(dtypes: tuple[torch.dtype | None, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
