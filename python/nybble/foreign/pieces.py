"""A model in the pieces that a checkpoint has: its linear layers, and all other parameters and buffers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checkpoint.model import slots
from ..checkpoint.skeleton import skeleton
from ..model.walk import region
from ..nn.composite import CompositeModule
from ..nn.experts import Experts
from ..nn.kinds import find_kind
from ..nn.linear import Linear
from ..nn.module import QuantizedModule
from . import pieces_experts
from .held import Held


@dataclass(frozen=True)
class Dense:
    """A tensor that is not quantized."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Other:
    """A module of nybble that is written dense: ``why`` formats cannot hold it; None: a table, or ``linear``: tied to one."""

    name: str
    module: nn.Module
    scheme: str
    shape: tuple[int, int] | None
    why: str | None
    linear: bool = False


@dataclass(frozen=True)
class DenseLinear:
    """The name of a dense linear layer, whose tensors are pieces of their own."""

    name: str


Piece = Dense | Held | Other | DenseLinear


class Pieces:
    """The pieces of a model.

    Args:
        model: any module that nybble quantized.

    Attributes:
        tied: name -> the name of the tensor that it is tied to, as transformers ties them when it loads.
        untied: transformers would tie tensors that are different here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._twin = model, _twin(model)
        self._tables = {module.weight_id for module in model.modules() if _is_table(module)}
        pairs = _pairs(self._twin or model)
        self.untied = any(not _same(model, name, other) for name, other in pairs.items())
        self.tied: Mapping[str, str] = {} if self.untied else pairs

    def __iter__(self) -> Iterator[Piece]:
        return self._visit("", self.model)

    def _visit(self, name: str, module: nn.Module) -> Iterator[Piece]:
        if isinstance(module, Experts) and not module.is_dense:
            yield from self._experts(name, module)
            return
        if isinstance(module, CompositeModule):
            names = {str(member.scheme) for member in module.members() if isinstance(member, QuantizedModule)}
            why = f"is an opened {type(module).__name__}: formats have single linear layers"
            yield Other(name, module, ", ".join(sorted(names)) or "dense", None, why if names else None)
            return
        if isinstance(module, QuantizedModule):
            yield self._quantized(name, module)
            return
        if self._dense_class(name, module) is not None:
            yield DenseLinear(name)
        for slot in slots(name, module):
            if slot.name not in self.tied:
                yield Dense(slot.name, slot.tensor)
        for key, child in module._modules.items():
            if child is not None:
                yield from self._visit(f"{name}.{key}" if name else key, child)

    def _experts(self, name: str, module: Experts) -> Iterator[Piece]:
        """Also the name of the router beside them, which vLLM takes for a linear layer."""
        why = pieces_experts.why_not(self.model, module)
        router = f"{name.rpartition('.')[0]}.gate"
        if self._twin is not None and router in dict(self._twin.named_modules()):
            yield DenseLinear(router)
        if why is None:
            yield from pieces_experts.held(name, module)
        else:
            names = {str(member.scheme) for member in module.members() if isinstance(member, QuantizedModule)}
            yield Other(name, module, ", ".join(sorted(names)), None, why)

    def _quantized(self, name: str, module: QuantizedModule) -> Piece:
        shape = module.out_features, module.in_features
        if _is_table(module):
            return Other(name, module, str(module.scheme), shape, None)
        if not isinstance(module, Linear):
            why = f"is a {type(module).__name__}: formats have linear layers only"
            return Other(name, module, str(module.scheme), shape, why)
        if module.weight_id in self._tables:
            return Other(name, module, str(module.scheme), shape, None, linear=True)
        twin = None if self._twin is None else self._twin.get_submodule(name)
        return Held(name, module, (self._dense_class(name, twin) if twin is not None else None) or "Linear")

    def _dense_class(self, name: str, module: nn.Module) -> str | None:
        """The name of the kind of a dense linear layer; None for another module."""
        kind = find_kind(module)
        return kind.name if kind is not None and kind.name in ("Linear", "Conv1D") else None

    def dense_of(self, name: str, module: nn.Module) -> nn.Module:
        """The dense module that a module of nybble replaced, with the weights that it has now."""
        if isinstance(module, CompositeModule):
            return module.close()
        assert isinstance(module, QuantizedModule)  # noqa: S101
        twin = None if self._twin is None else self._twin.get_submodule(name)
        kind = None if twin is None else find_kind(twin)
        if twin is None or kind is None:
            return module.dequantize()
        return kind.dense_like(twin, module.dequantized_weight(), module.bias)


def _is_table(module: nn.Module) -> Any:
    return isinstance(module, QuantizedModule) and not module.multiplies


def _twin(model: nn.Module) -> nn.Module | None:
    """The same model of transformers without nybble's modules and without values; None for another model."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    kind, config = type(model), model.config
    with skeleton():
        twin: nn.Module = kind(config)
    return twin


def _pairs(model: nn.Module) -> Mapping[str, str]:
    """Name -> the name of the tensor that transformers ties it to, of a model that it has not loaded: it forgets ties of layers that
    nybble ties."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is not True:
        return {}
    found: Any = getattr(model, "all_tied_weights_keys", {})
    return dict(found)


def _same(model: nn.Module, name: str, other: str) -> bool:
    """Whether two names are of one tensor, or of the weights of two modules of nybble that share it."""
    (first, key), (second, other_key) = (
        (model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in (name, other)
    )
    if isinstance(first, QuantizedModule) and isinstance(second, QuantizedModule) and key == other_key == "weight":
        return first.weight_id == second.weight_id
    one, two = first._parameters.get(key), second._parameters.get(other_key)
    return one is not None and two is not None and (one is two or region(one) == region(two) is not None)
