"""A compiled chain bound to the tensors of its layers, and its run on the values of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..dispatch.selection import compiled_plan
from ..nn.module import QuantizedModule
from .nodes import NormKind, Run
from .steps import Plan, Segment, Slot, Step, Weight, number


class BoundChain:
    """The compiled steps of a segment for a number of rows, and for others that the same kernels serve."""

    def __init__(self, segment: Segment, rows: int) -> None:
        plan = Plan(segment)
        self._rows, self._dtype = rows, segment.nodes[0].rows.dtype
        self._held: list[tuple[Tensor, int]] = []  # tensors whose memory the chain reads, and where it was
        self._layers: list[tuple[dict[str, Any], Tensor]] = []  # buffers of layers, and their packed weights
        elsewhere, widths = number(plan)
        self._values = [slot.node for slot in elsewhere]
        self._outputs = set(segment.outputs)
        self._tables = plan.tables
        self._chain = native.chain(self._dtype, widths, len(elsewhere))
        for step in plan.steps:
            self._add(step)

    def stale(self) -> bool:
        """Whether a tensor that the chain reads was replaced or moved."""
        for buffers, packed in self._layers:
            if buffers["packed"] is not packed:
                return True
        return any(tensor.data_ptr() != address for tensor, address in self._held)

    def run(self, run: Run) -> None:
        """Computes the values of the segment's outputs, from values and tables of the run."""
        rows, external = run.batch * run.length, []
        values = run.values
        for node in self._values:
            if node in self._outputs:
                values[node] = torch.empty(rows, node.width, dtype=self._dtype)
            value = values[node]
            external.append((*native.memory(value), value.stride(0)))
        tables = [native.table(_table(key, run)) for key in self._tables]
        self._chain.run(run.batch, run.length, external, tables, torch.get_num_threads())

    def _add(self, step: Step) -> None:
        options = {key: one.number if isinstance(one, Slot) else one for key, one in step.options.items()}
        norm = options.pop("norm", None)
        if isinstance(norm, NormKind):
            options["norm" if step.method != "add_norm" else "kind"] = None
        if step.method == "add_norm":
            options |= _norm_options(self, norm)
        elif step.method in ("add_linears", "add_rotate"):
            options["norm"] = None if norm is None else _norm_options(self, norm)
        if step.weights:
            options["weights"] = [self._weight(weight) for weight in step.weights]
        getattr(self._chain, step.method)(**options)

    def _weight(self, weight: Weight) -> dict[str, Any]:
        layer = weight.linear.layer
        assert isinstance(layer, QuantizedModule)  # noqa: S101
        packed, layout = layer._pack()
        self._layers.append((layer._buffers, packed))
        size = (layer.out_features, layer.in_features)
        plan = compiled_plan(str(layer.scheme), layout, size, self._dtype, self._rows)
        assert plan is not None  # noqa: S101
        slots = {"y": weight.y.number, "other": _number(weight.other), "residual": _number(weight.residual)}
        return {
            "plan": plan.compiled,
            "packed": self._hold(packed)[:2],
            "bias": self._hold(layer.bias),
            "act": weight.act,
            **slots,
        }

    def _hold(self, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        self._held.append((tensor, tensor.data_ptr()))
        return (*native.memory(tensor), native.DTYPES.get(tensor.dtype, 0))
