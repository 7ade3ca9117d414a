"""Which modules can be swapped for a quantized one, and why a module cannot."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compiled.rounding import all_finite
from ..dispatch.spec import FLOATS
from ..nn.kinds import find_kind, kind_of
from ..nn.module import QuantizedModule
from ..weights.scheme import Scheme

ALREADY = "already quantized"

# What a module may have besides its parameters, and a swap would lose.
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_hooks": "state_dict hooks",
    "_state_dict_pre_hooks": "state_dict pre-hooks",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hooks",
    "_load_state_dict_post_hooks": "load_state_dict post-hooks",
}


def is_linear_like(module: nn.Module) -> bool:
    """Whether the module is quantized, or has a module kind, by its own class or by one that it inherits from."""
    return isinstance(module, QuantizedModule) or find_kind(module) is not None


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a Linear-like module as a matrix (N, K). For a quantized one, only its shape, dtype and device."""
    if isinstance(module, QuantizedModule):
        return cast(torch.Tensor, module.weight)
    return kind_of(module).matrix_of(module)


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias (N,) of a Linear-like module, dense or quantized, or None."""
    return module.bias if isinstance(module, QuantizedModule) else kind_of(module).bias_of(module)


def why_left(module: nn.Module, scheme: Scheme | None) -> str | None:
    """Why a Linear-like module cannot be swapped, or None if it can.

    Does not check whether the weight is shared with other modules. Without a scheme the weight keeps its dtype.
    """
    if isinstance(module, QuantizedModule):
        return ALREADY
    return why_structure(module) or _why_weight(module) or (_why_scheme(module, scheme) if scheme else None)


def why_structure(module: nn.Module) -> str | None:
    """Why a dense module cannot be swapped for a quantized one, whatever the values of its weight; or None."""
    return _why_type(module) or why_bound(module) or _why_content(module) or kind_of(module).why_not(module)


def _why_type(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"parametrized ({names}); torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        return "lazy: its weight does not exist yet; run the model once first"
    kind = kind_of(module)
    if not kind.replaces(type(module)):
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"{name} is a subclass of {kind.name} that may do more"
    return None


def why_bound(module: nn.Module) -> str | None:
    """The hooks, or the replaced ``forward``, that a swap of the module would lose; or None."""
    for attribute, words in _HOOKS.items():
        hooks = getattr(module, attribute, None)
        if hooks:
            names = sorted({getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks.values()})
            return f"has {words} ({', '.join(names)})"
    return "its forward was replaced on the instance" if "forward" in vars(module) else None


def _why_content(module: nn.Module) -> str | None:
    weight = kind_of(module).weight
    if not isinstance(module._parameters.get(weight.key), torch.Tensor):
        return "its weight is not a parameter"
    extra = [
        *module._modules,
        *module._buffers,
        *(name for name in module._parameters if name not in (weight.key, weight.bias)),
    ]
    return f"has more than weight and bias: {', '.join(extra)}" if extra else None


def _why_weight(module: nn.Module) -> str | None:
    kind = kind_of(module)
    weight, bias = kind.parameter_of(module), kind.bias_of(module)
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        found = f"a {type(weight).__name__} of layout {weight.layout}"
        return f"its weight is {found}, only a Parameter of layout torch.strided is supported"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}, only cpu is supported"
    if weight.dtype not in FLOATS:
        return f"its weight is {name_of(weight.dtype)}, only float32, bfloat16 and float16 are supported"
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return (
            f"its bias is {name_of(bias.dtype)} on {bias.device}, its weight {name_of(weight.dtype)} on {weight.device}"
        )
    shape = kind.shape_of(module)
    if len(shape) != 2 or weight.numel() == 0:
        return f"its weight has the shape {shape}, only (N, K) with N, K >= 1 is supported"
    if not all_finite(weight):
        return "its weight has NaN or Inf"
    return None


def _why_scheme(module: nn.Module, scheme: Scheme) -> str | None:
    try:
        kind_of(module).scheme_of(scheme).check_shape(*dense_weight(module).shape)
    except ValueError as error:
        return str(error)
    return None


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
