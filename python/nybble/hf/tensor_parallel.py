"""``tp_plan`` of transformers on quantized layers.

transformers cuts parameters before it loads them. Layers that nybble quantizes are not yet there then, or have other tensors: they
are loaded whole, and cut when they are packed. For that each of transformers' parallel styles is asked through a row that
remembers it for such layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

# transformers' styles of linear layers, as those of torch.
_STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": RowwiseParallel(input_layouts=Replicate()),
}
# Styles whose inputs and outputs are whole on every rank, as are those of a layer that is not cut.
_WHOLE = ("embedding_rowwise", "embedding_colwise", "replicate")
_MARK = "_nybble_tp"  # attribute of a module that will be a quantized layer: (style, mesh), once it has a style


def register() -> None:
    """Ask each style through a row of its own, once in a process."""
    for name in list(ALL_PARALLEL_STYLES):
        own = ALL_PARALLEL_STYLES[name]
        if not isinstance(own, _Remembering):
            ALL_PARALLEL_STYLES.register(name, _Remembering(name, own))  # type: ignore[arg-type]


def mark(modules: Iterable[nn.Module]) -> None:
    """These will be quantized layers: transformers must not cut them."""
    for module in modules:
        setattr(module, _MARK, None)


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Name -> (style, mesh) of the marked modules that have one; marks are taken off."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (planned := vars(module).pop(_MARK, None)) is not None:
            found[name] = planned
    return found


def apply(model: nn.Module, plan: dict[str, Any]) -> None:
    """Cut layers, which all are whole on every rank. Raises ValueError with the name of one that cannot be cut."""
    for name, (style, mesh) in plan.items():
        _STYLES[style].src_data_rank = None  # each rank has read the same file
        try:
            _STYLES[style]._apply(model.get_submodule(name), mesh)
        except ValueError as error:
            raise ValueError(f"tp_plan[{name!r}]={style!r}: {error}") from error


class _Remembering(TensorParallelLayer):
    """A style of transformers that leaves marked modules alone, and notes itself on them."""

    def __init__(self, name: str, own: Any) -> None:
        self._name, self._own = name, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def validate_param(self, module: nn.Module, param: Any, mesh: Any, parameter_name: str | None = None) -> None:
        """As the style, but for marked modules."""
        if not hasattr(module, _MARK):
            self._own.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: Any, mesh: Any) -> None:
        """As the style, but for marked modules."""
        if not hasattr(module, _MARK):
            self._own.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> Any:
        """As the style; of a marked module, note the style.

        Raises NotImplementedError for a style that quantized layers do not have.
        """
        if not hasattr(module, _MARK):
            inside = [name for name, one in module.named_modules() if hasattr(one, _MARK)]
            if self._name in _WITH_PARTS and inside:
                raise NotImplementedError(self._told(f"{type(module).__name__}.{inside[0]}"))
            return self._own.install_forward(module, mesh)
        if self._name in _STYLES:
            setattr(module, _MARK, (self._name, mesh))
        elif self._name not in _WHOLE:
            raise NotImplementedError(self._told(type(module).__name__))
        return module

    def _told(self, layer: str) -> str:
        known = ", ".join((*_STYLES, *_WHOLE))
        return (
            f"tp_plan: style {self._name!r} of a quantized {layer}; must be one of {known}: exclude these layers from quantization, "
            "or name another style in DistributedConfig(tp_plan=)"
        )


# Styles of a module whose weights are those of the layers inside.
_WITH_PARTS = ("moe_tp_experts",)
