"""Linear layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..weights.form import USUAL, Form
from ..weights.scheme import Scheme
from .base import DTYPES, NOTHING, memory
from .weights import shape_fields, weight_shape


class KernelNames(NamedTuple):
    """What runs a product together; "" where there is none.

    linear multiplies, prepare makes its panel, expand makes its lines from the mask layout, few serves a few rows of the
    mask layout in place of both; layout is the weight's.
    """

    linear: str
    prepare: str
    layout: str
    expand: str = ""
    few: str = ""


class LinearPlan:
    """Compiled kernels bound to a scheme and a weight shape."""

    def __init__(
        self,
        kernels: KernelNames,
        scheme: Scheme,
        out_features: int,
        in_features: int,
        form: Form = USUAL,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """rows: begin, a multiple of 16, and end: of a weight in a tiled layout only these outputs are computed."""
        self._made_of = (kernels, scheme, out_features, in_features, form)
        begin, end = rows or (0, out_features)
        shape = weight_shape(scheme, end - begin, in_features, kernels.layout, form)
        act = scheme.act_type
        plan = _C.LinearPlan(
            kernels.linear,
            kernels.prepare,
            kernels.expand,
            kernels.few,
            shape,
            static_activations=scheme.static,
            act_steps=act.steps if act.quantized else 0,
            first_row=begin,
            all_rows=0 if rows is None else out_features,
        )
        self.compiled, self._run = plan, plan.run
        self._in_features = in_features

    def words(self) -> str:
        """What it is made of, as the words that csrc/plan.h names: kernels, activations, then the shape in order."""
        kernels, scheme, n, k, form = self._made_of
        names = [name or "-" for name in (kernels.linear, kernels.prepare, kernels.expand, kernels.few)]
        steps = scheme.act_type.steps if scheme.act_type.quantized else 0
        shape = shape_fields(scheme, n, k, kernels.layout, form).values()
        numbers = [value if isinstance(value, str) else str(int(value)) for value in (scheme.static, steps, *shape)]
        return " ".join([*names, *numbers])

    def of_rows(self, begin: int, end: int) -> LinearPlan:
        """The same kernels for the outputs [begin, end) of the weight."""
        return LinearPlan(*self._made_of, rows=(begin, end))

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N) = x (..., K) w^T + bias.

        x is contiguous, or (M, K) with unit stride along K; out is contiguous, of x's dtype, or int32 for the
        accumulators of w8a8.

        Raises:
            ValueError: a tensor is smaller than its shape says.
        """
        dtype, k = DTYPES[x.dtype], self._in_features
        if x.is_contiguous():
            span, stride = (x.data_ptr(), x.nbytes), k
        else:
            span, stride = memory(x), x.stride(0)
        self._run(
            span,
            dtype,
            x.numel() // k,
            stride,
            (packed.data_ptr(), packed.nbytes),
            NOTHING if bias is None else (bias.data_ptr(), bias.nbytes),
            dtype if bias is None else DTYPES[bias.dtype],
            (out.data_ptr(), out.nbytes),
            dtype if out.dtype is x.dtype else DTYPES[out.dtype],
            torch.get_num_threads(),
        )
