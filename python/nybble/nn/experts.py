"""The experts of transformers, whose weights are fused to three dimensions: a Linear layer for each weight of each expert.

What a module computes is proposed by its structure and proved on random numbers, see ``experts_form``. Its class does not
matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import experts as op
from .. import ops
from ..weights.scheme import Scheme
from .composite import CompositeKind, CompositeModule
from .experts_form import Form, between_of, form_of, looks_like_experts, names_of_arguments, with_parameters
from .linear import Linear
from .sparse import SparseLinear

if TYPE_CHECKING:
    from typing_extensions import Self


class Experts(CompositeModule):
    """Experts whose weights are Linear layers: ``gate_up_proj.3`` and ``down_proj.3`` are those of expert 3.

    While all are dense, the dense module's own forward runs on their memory. When all are nybble's layers of one scheme
    each, they run in one call, ``nybble::experts``, and the weights of experts that get no token are not read. Else, and
    where gradients are needed, the layers of each expert are called.

    Args:
        shell: the dense module, with parameters without values.
        form: what it computes.
        members: the Linear layers, in a ModuleList for each weight.
    """

    def __init__(self, shell: nn.Module, form: Form, members: dict[str, nn.ModuleList]) -> None:
        super().__init__(members)
        self._shell = (shell,)  # in a tuple: it is no submodule
        self._form = form
        self._takes = names_of_arguments(shell)
        self._last: _Last | None = None
        self.train(shell.training)

    @classmethod
    def from_dense(cls, dense: nn.Module) -> Self:
        """Experts on the memory of the dense module's parameters. The dense module does not change.

        Raises:
            ValueError: it is not known what the module computes; the message says why.
        """
        form = form_of(dense)
        if not isinstance(form, Form):
            raise ValueError(f"dense={type(dense).__name__}: {form}")  # noqa: TRY004
        held: dict[str, nn.Parameter] = {name: one for name, one in dense._parameters.items() if one is not None}
        members = {
            name: nn.ModuleList(_layers(held[name], held.get(f"{name}_bias"), form.transposed))
            for name in (form.up, form.down)
        }
        shell = with_parameters(
            dense,
            {name: nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad) for name, one in held.items()},
        )
        return cls(shell, form, members)

    @property
    def form(self) -> Form:
        """What the experts compute."""
        return self._form

    def close(self) -> nn.Module:
        """The dense module with the weights as they are now; those of quantized layers are dequantized."""
        parameters: dict[str, Tensor] = {}
        for name in self._names:
            layers = [self._as_dense(layer) for layer in self._all(name)]
            old = self._shell[0]._parameters
            for key, part in ((name, "weight"), (f"{name}_bias", "bias")):
                if old.get(key) is not None:
                    stacked = _stacked([layer._parameters[part] for layer in layers], self._turned(part))
                    grad = any(layer._parameters[part].requires_grad for layer in layers)
                    parameters[key] = nn.Parameter(stacked.detach(), requires_grad=grad)
        return with_parameters(self._shell[0], parameters).train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """hidden_states (T, K), top_k_index (T, top_k), top_k_weights (T, top_k) -> (T, N), as the dense module."""
        x, index, weight = self._arguments(args, named)
        ready = self._ready(x, index, weight)
        if ready is not None:
            return ready(x, index, weight)
        if not is_compiling() and self.is_dense and not self.is_watched():
            dense = self._whole()
            if dense is not None:
                out: Tensor = dense(x, index, weight)
                return out
        return self._one_by_one(x, index, weight)

    def explain(self) -> str | None:
        """Why the experts do not run in one call; None if they do."""
        found = self._parts()
        return found if isinstance(found, str) else None

    def _arguments(self, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if named or len(args) != 3:
            given = dict(zip(self._takes, args, strict=False)) | named
            if len(args) + len(named) != 3 or len(given) != 3 or any(name not in given for name in self._takes):
                raise TypeError(
                    f"experts: takes {', '.join(self._takes)}, got {len(args)} arguments and {sorted(named)}"
                )
            args = tuple(given[name] for name in self._takes)
        x, index, weight = args
        if x.dim() != 2:
            raise ValueError(f"hidden_states: {tuple(x.shape)}, must be (T, K)")
        return x, index, weight

    def _all(self, name: str) -> list[Any]:
        """The layers of a weight, by expert."""
        layers = self._modules[name]
        assert layers is not None, "made by __init__"  # noqa: S101
        return list(layers._modules.values())

    def _sides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The layers of the two weights by the numbers of their experts: no copies."""
        first, second = self._modules[self._form.up], self._modules[self._form.down]
        return first._modules, second._modules  # type: ignore[union-attr]

    def _turned(self, part: str) -> bool:
        return part == "weight" and self._form.transposed

    def _as_dense(self, layer: Any) -> Any:
        return layer.dequantize() if isinstance(layer, (Linear, SparseLinear)) else layer

    def _whole(self) -> nn.Module | None:
        """The dense module on the layers' memory, or None if they do not lie as its parameters did."""
        parameters: dict[str, Tensor] = {}
        for name in self._names:
            for key, part in ((name, "weight"), (f"{name}_bias", "bias")):
                if self._shell[0]._parameters.get(key) is None:
                    continue
                whole = _joined([layer._parameters[part] for layer in self._all(name)], self._turned(part))
                if whole is None:
                    return None
                parameters[key] = whole
        return with_parameters(self._shell[0], parameters).train(self.training)

    def _ready(self, x: Tensor, index: Tensor, weight: Tensor) -> op.Experts | None:
        """The experts in one call, or None if that cannot be."""
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return None
        if not is_compiling() and self._last is not None and self._last.holds(self._sides(), index):
            return self._last.ready
        parts = self._parts()
        if isinstance(parts, str):
            return None
        ready = op.Experts(*parts)
        if not is_compiling():
            self._last = _Last(ready, self._sides())
        return ready

    def _parts(self) -> tuple[op.Side, op.Side, op.Gate] | str:
        """The two weights, and what is between them, for one call; or why that cannot be."""
        gate = self._form.gate
        if gate is None:
            return "what is between the two products is known to the dense module alone"
        up, down = self._side(self._form.up), self._side(self._form.down)
        return up if isinstance(up, str) else down if isinstance(down, str) else (up, down, gate)

    def _side(self, name: str) -> op.Side | str:
        layers = self._all(name)
        first = layers[0]
        for expert, layer in enumerate(layers):
            if type(layer) not in (Linear, SparseLinear) or _does_more(vars(layer)):
                return f"{name}.{expert} is not a quantized layer without hooks"
            if layer.device.type != "cpu":
                return f"{name}.{expert} is on {layer.device}"
            if layer.keeps_portable:
                return f"{name}.{expert} keeps its portable tensors"
            if layer._buffers["packed"] is None:
                layer.pack()
            if (layer.scheme, layer.layout, type(layer)) != (first.scheme, first.layout, type(first)):
                return f"{name}.{expert} is {layer.scheme} in layout {layer.layout}, {name}.0 {first.scheme} in {first.layout}"
        if reason := op.why_not(Scheme.parse(first.scheme)):
            return reason
        bias = [layer._parameters["bias"] for layer in layers]
        packed = [layer._buffers["packed"] for layer in layers]
        return op.Side(packed, bias, str(first.scheme), first.layout, first.out_features, first.in_features)

    def _one_by_one(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ups, downs = self._all(self._form.up), self._all(self._form.down)
        inner = between_of(self._shell[0], self._form.gate)
        out: Tensor | None = None
        for expert in index.unique().tolist():
            if expert == len(ups):  # stands for none
                continue
            token, place = torch.where(index == expert)
            y = downs[expert](inner(ups[expert](x[token]))) * weight[token, place, None]
            if out is None:
                out = y.new_zeros(len(x), y.shape[1], dtype=x.dtype)
            out = out.index_add(0, token, y.to(x.dtype))
        if out is None:
            outputs: int = downs[0].out_features
            return x.new_zeros(len(x), outputs)
        return out


class _Last:
    """The experts as they last ran in one call, and whether they still can.

    Asked at each call, and of those experts only that get its tokens: to look at 64 layers takes 45 us where the weights
    have driven them out of the caches.
    """

    def __init__(self, ready: op.Experts, sides: tuple[dict[str, Any], dict[str, Any]]) -> None:
        self.ready, self._count = ready, len(sides[0])
        layers = [layer for side in sides for layer in side.values()]
        parts = ("_forward_hooks", "_forward_pre_hooks", "_buffers", "_parameters")
        self._seen = [(layer, vars(layer), *(vars(layer)[name] for name in parts)) for layer in layers]

    def holds(self, sides: tuple[dict[str, Any], dict[str, Any]], index: Tensor) -> bool:
        """Whether the layers that an index names are the same with the same weights, and do no more than multiply."""
        count, (ups, downs) = self._count, sides
        if len(ups) != count or len(downs) != count:
            return False
        for expert in self._named(index):
            key = str(expert)
            if not (self._same(expert, ups.get(key)) and self._same(count + expert, downs.get(key))):
                return False
        return True

    def _named(self, index: Tensor) -> Iterable[int]:
        """The experts that an index names; all where it may name most, or where its values must not be looked at."""
        if index.dtype is not torch.int64 or index.numel() >= self._count or ops._watched(index, index, None):
            return range(self._count)
        return {expert for expert in index.reshape(-1).tolist() if 0 <= expert < self._count}

    def _same(self, number: int, layer: Any) -> bool:
        held, attributes, hooks, pre_hooks, buffers, parameters = self._seen[number]
        if layer is not held or hooks or pre_hooks or "forward" in attributes:
            return False
        return self.ready.serves(number, buffers["packed"], parameters["bias"])


def _does_more(held: dict[str, Any]) -> bool:
    """Whether a layer with these attributes does more than multiply."""
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
    )


def _layers(weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> Iterator[nn.Linear]:
    """A Linear layer for each expert, on the memory of the parameters."""
    for expert in range(len(weight)):
        matrix = weight.detach()[expert]
        matrix = matrix.t() if transposed else matrix
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix, weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[expert], bias.requires_grad)
        yield layer


def _joined(parts: list[Any], transposed: bool) -> Tensor | None:
    """Tensors that lie one after the other in one memory, as one tensor, or None if they do not."""
    first = parts[0]
    first = first.t() if transposed else first
    step = first.numel() * first.element_size()
    storage = first.untyped_storage().data_ptr()
    for i, part in enumerate(parts):
        if part.data_ptr() != first.data_ptr() + i * step or part.untyped_storage().data_ptr() != storage:
            return None
    if not first.is_contiguous():
        return None
    whole: Tensor = first.detach().as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))
    return whole


def _stacked(parts: list[Any], transposed: bool) -> Tensor:
    joined = _joined(parts, transposed)
    return torch.stack([part.t() if transposed else part for part in parts]) if joined is None else joined


def _why_not(module: nn.Module) -> str | None:
    form = form_of(module)
    return form if isinstance(form, str) else None


EXPERTS: CompositeKind = CompositeKind("Experts", looks_like_experts, Experts.from_dense, _why_not)
