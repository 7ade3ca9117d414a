"""Which modules are Linear-like, and why one of them cannot be swapped."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..dispatch.registry import FLOATS
from ..nn import Linear
from ..weights.scheme import Scheme

ALREADY = "already quantized"

# what a module may carry besides its parameters and what a swap would lose without a word
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


def _is_conv1d(cls: type) -> bool:
    """Whether the class is transformers' Conv1D, known by name so that transformers need not be installed."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is exactly transformers' ``Conv1D``: a Linear layer whose weight is (K, N)."""
    return _is_conv1d(type(module))


def is_linear_like(module: nn.Module) -> bool:
    """Whether the module is a Linear layer of any kind: torch's, transformers' Conv1D, nybble's, or a subclass."""
    return isinstance(module, (nn.Linear, Linear)) or any(_is_conv1d(cls) for cls in type(module).__mro__)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an eligible dense layer as (N, K)."""
    weight = cast(torch.Tensor, module.weight)
    return weight.t() if is_conv1d(module) else weight


def why_left(module: nn.Module, scheme: Scheme | None) -> str | None:
    """Why a Linear-like module has to stay as it is, or None when ``scheme`` (None: its own floats) can hold it.

    Looks at the module alone; a weight that is shared with other modules is for the caller.
    """
    if isinstance(module, Linear):
        return ALREADY
    return why_structure(module) or _why_weight(module) or (_why_scheme(module, scheme) if scheme else None)


def why_structure(module: nn.Module) -> str | None:
    """Why a quantized layer cannot stand where this dense module does, whatever its weight, or None."""
    return _why_type(module) or why_bound(module) or _why_content(module)


def _why_type(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"parametrized ({names}); see torch.nn.utils.parametrize.remove_parametrizations"
    if any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        return "lazy, its weight does not exist yet; run one forward first"
    if type(module) is not nn.Linear and not is_conv1d(module):
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"{name} is a subclass that may do more than a Linear layer"
    return None


def why_bound(module: nn.Module) -> str | None:
    """The hooks, or the replaced ``forward``, that a swap of this module would lose, or None."""
    for attribute, words in _HOOKS.items():
        hooks = getattr(module, attribute, None)
        if hooks:
            names = sorted({getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks.values()})
            return f"has {words} ({', '.join(names)})"
    return "its forward was replaced on the instance" if "forward" in vars(module) else None


def _why_content(module: nn.Module) -> str | None:
    if not isinstance(module._parameters.get("weight"), torch.Tensor):
        return "its weight is not a parameter"
    extra = [
        *module._modules,
        *module._buffers,
        *(name for name in module._parameters if name not in ("weight", "bias")),
    ]
    return f"carries more than weight and bias: {', '.join(extra)}" if extra else None


def _why_weight(module: nn.Module) -> str | None:
    weight, bias = cast(torch.Tensor, module.weight), module._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}, not a plain dense parameter"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}, only cpu is supported"
    if weight.dtype not in FLOATS:
        return f"its weight is {name_of(weight.dtype)}, only float32, bfloat16 and float16 are supported"
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return (
            f"its bias is {name_of(bias.dtype)} on {bias.device}, its weight {name_of(weight.dtype)} on {weight.device}"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has the shape {tuple(weight.shape)}, (N, K) with N, K >= 1 is supported"
    if not torch.isfinite(weight).all():
        return "its weight has NaN or Inf"
    return None


def _why_scheme(module: nn.Module, scheme: Scheme) -> str | None:
    try:
        scheme.check_shape(*dense_weight(module).shape)
    except ValueError as error:
        return str(error)
    return None


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
