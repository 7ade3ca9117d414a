"""What leaf modules compute: linear layers, norms, activations, embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.eligible import is_linear_like
from . import recognize
from .compare import integers
from .forms import NotUnderstood
from .nodes import IDENTITY, Activate, Linear, Lookup, Norm, NormKind, Ref
from .seen import Seen
from .tables import looks_up, table_of
from .watch import MODULE, Event


class Modules(Seen):
    """Explains calls of leaf modules."""

    def module(self, event: Event) -> Ref | None:
        layer, x, out = event.what, event.argument(0, "input"), event.outputs[0]
        if isinstance(x, Tensor) and not x.is_floating_point():
            return self.lookup(layer, x, out)
        if not isinstance(x, Tensor):
            x = next((value for value in event.kwargs.values() if isinstance(value, Tensor)), None)
            if x is None:
                return None
        if is_linear_like(layer):
            return self.linear(layer, x, out, event)
        if x.shape != out.shape:
            return None
        act = recognize.activation_of(layer, x)
        if act == IDENTITY:
            return self.value(x, event.first)
        if act is not None:
            return self.add(Activate(rows=self.rows(out), x=self.value(x, event.first), act=act))
        norm = recognize.norm_of(layer, x)
        if norm is None:
            return None
        return self.norm(norm, x, out, event.first)

    def lookup(self, layer: nn.Module, ids: Tensor, out: Tensor) -> Ref | None:
        """Explains the rows of an embedding."""
        table, given = table_of(layer), self.path_of(ids)
        if given is None or table is None or not integers(ids):
            return None
        return self.add(Lookup(rows=self.rows(out), table=table, path=given)) if looks_up(ids, table, out) else None

    def positions(self, tensor: Tensor, before: int) -> Ref:
        """Explains a value that is the same in each text, (1, length, width), as rows of an embedding by position.

        The positions must come from a buffer, so that they do not depend on the call.
        """
        for event in self.call.events[:before]:
            if event.name == MODULE and event.outputs[0] is tensor and isinstance(event.args[0], Tensor):
                ids, table = event.args[0], table_of(event.what)
                held = {buffer.untyped_storage().data_ptr() for buffer in self.call.module.buffers()}
                if ids.untyped_storage().data_ptr() not in held or table is None:
                    continue
                first = int(ids.reshape(-1)[0])
                in_order = torch.equal(ids.reshape(-1), torch.arange(first, first + self.length))
                if in_order and looks_up(ids, table, tensor):
                    rows = tensor.reshape(self.length, -1).repeat(self.batch, 1)
                    return self.add(Lookup(rows=rows, table=table, path=None, first=first))
        raise NotUnderstood(f"a value of shape {tuple(tensor.shape)} is added to all texts")

    def linear(self, layer: nn.Module, x: Tensor, out: Tensor, event: Event) -> Ref:
        if layer not in self.names:
            raise NotUnderstood(f"a {type(layer).__name__} that is not inside it")
        ref = self.value(x, event.first)
        return self.add(Linear(rows=self.rows(out), x=ref, layer=layer, name=self.names[layer]))

    def norm(self, norm: NormKind, x: Tensor, out: Tensor, before: int) -> Ref:
        rows, ref = self.rows(out), self.value(x, before)
        return self.add(Norm(rows=rows, x=ref, norm=norm, heads=rows.shape[1] // x.shape[-1]))
