"""A compiled chain bound to the tensors of its layers, and its run on the values of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..dispatch.registry import fastest
from ..dispatch.selection import compiled_plan
from ..nn.module import QuantizedModule
from .nodes import IDENTITY, Mask, NormKind, Run
from .outputs import empty
from .steps import Plan, Segment, Slot, Step, Weight, number


class BoundChain:
    """The compiled steps of a segment for a number of rows, and for others that the same kernels serve."""

    def __init__(self, segment: Segment, rows: int) -> None:
        plan = Plan(segment)
        self._rows, self._dtype = rows, segment.nodes[0].rows.dtype
        self._held: list[tuple[Tensor, int]] = []  # tensors whose memory the chain reads, and where it was
        self._layers: list[
            tuple[dict[str, Any], Tensor, int]
        ] = []  # buffers of layers, their packed weights, and where
        elsewhere, widths = number(plan)
        self._values = [(slot.node, slot.width, slot.node in segment.outputs) for slot in elsewhere]
        self._tables = plan.tables
        self._chain = native.chain(
            self._dtype, widths, len(elsewhere), rows=fastest("rows"), attention=fastest("attention")
        )
        for step in plan.steps:
            self._add(step)

    def stale(self) -> bool:
        """Whether a tensor that the chain reads was replaced or moved."""
        for buffers, packed, address in self._layers:
            if buffers["packed"] is not packed or packed.data_ptr() != address:
                return True
        return any(tensor.data_ptr() != address for tensor, address in self._held)

    def run(self, run: Run) -> None:
        """Computes the values of the segment's outputs, from values and tables of the run."""
        rows, values, external = run.batch * run.length, run.values, []
        for node, width, is_output in self._values:
            if is_output:
                value = values[node] = empty(rows, width, self._dtype)
            else:
                value = values[node]
            stride = value.stride(0)
            if stride == width:  # nothing between rows, as almost always
                external.append((value.data_ptr(), value.nbytes, width))
            else:
                external.append((*native.memory(value), stride))
        held = [_table(key, run) for key in self._tables]  # some exist for this run only
        tables = [native.table(one) for one in held]
        self._chain.run(run.batch, run.length, external, tables, torch.get_num_threads())

    def _add(self, step: Step) -> None:
        options = {key: one.number if isinstance(one, Slot) else one for key, one in step.options.items()}
        norm: Any = options.pop("norm", None)
        if step.method == "add_norm":
            kind, weight, bias, eps, offset = self._norm(norm)
            options |= {"kind": kind, "weight": weight, "bias": bias, "eps": eps, "weight_offset": offset}
        elif step.method == "add_linears":
            options["norm"] = None if norm is None else self._norm(norm)
        elif step.method == "add_rotate":
            options["norm"] = None if norm is None else (self._hold(norm.weight), norm.eps, norm.offset)
        elif step.method == "add_attention":
            options["int8"] = fastest("attention8") if options["int8"] else ""
        if step.weights:
            options["weights"] = [self._weight(weight) for weight in step.weights]
        getattr(self._chain, step.method)(**options)

    def _norm(self, norm: NormKind | None) -> tuple[Any, ...]:
        """Kind, weight, bias, eps and offset of the weight; None stands for the value itself."""
        if norm is None:
            return "none", None, None, 0.0, 0.0
        return norm.kind, self._hold(norm.weight), self._hold(norm.bias), norm.eps, norm.offset

    def _weight(self, weight: Weight) -> Any:
        layer = weight.linear.layer
        assert isinstance(layer, QuantizedModule)  # noqa: S101
        packed, layout = layer._pack()
        self._layers.append((layer._buffers, packed, packed.data_ptr()))
        size = (layer.out_features, layer.in_features)
        plan = compiled_plan(str(layer.scheme), layout, size, self._dtype, self._rows)
        assert plan is not None, "only such layers are in a segment"  # noqa: S101
        other, residual = (-1 if slot is None else slot.number for slot in (weight.other, weight.residual))
        act = "" if weight.act == IDENTITY else weight.act
        return native.ChainWeight(
            plan.compiled, native.memory(packed), self._hold(layer.bias), weight.y.number, act, other, residual
        )

    def _hold(self, tensor: Tensor | None) -> tuple[int, int, int] | None:
        """Address, bytes and dtype of a vector, which the chain reads at each run."""
        if tensor is None:
            return None
        self._held.append((tensor, tensor.data_ptr()))
        return native.vector(tensor)


def _table(key: Any, run: Run) -> Tensor | None:
    """A tensor of four dimensions that the steps read beside their matrices; None: a scale that this run does not have."""
    if isinstance(key, Mask):
        mask = run.mask(key)
        return mask[(None,) * (4 - mask.dim())]
    value: Tensor | None = run.tables[key]
    return value.unsqueeze(1) if value is not None and value.dim() == 3 else value
