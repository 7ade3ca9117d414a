"""PEFT made to know nybble's layers."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

_DONE = "_nybble"


def patch_peft() -> None:
    """Lets PEFT put LoRA round nybble.nn.Linear: get_peft_model, PeftModel.from_pretrained, ``target_modules="all-linear"``.

    Once in a process; other layers are PEFT's as before. Training needs no more: the codes stay, adapters are trained.

    Raises:
        ImportError: peft is not installed, or has not the functions of PEFT 0.21 that this builds on.
    """
    try:
        from peft.tuners import tuners_utils
        from peft.tuners.lora.model import LoraModel
    except ImportError as error:
        raise ImportError("LoRA on quantized layers needs peft: pip install 'nybble[peft]'") from error
    names = {LoraModel: ("_create_new_module", "_replace_module"), tuners_utils: ("_maybe_include_all_linear_layers",)}
    missing = [name for owner, all_ in names.items() for name in all_ if not hasattr(owner, name)]
    if missing:
        raise ImportError(f"peft: this version has no {', '.join(missing)}; nybble knows those of PEFT 0.21")
    if hasattr(LoraModel, _DONE):
        return
    LoraModel._create_new_module = staticmethod(_creating(LoraModel._create_new_module))
    LoraModel._replace_module = _replacing(LoraModel._replace_module)
    tuners_utils._maybe_include_all_linear_layers = _including(tuners_utils._maybe_include_all_linear_layers)
    setattr(LoraModel, _DONE, True)


def _creating(original: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .layer import QuantizedLora, is_target

    @wraps(original)
    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        made: nn.Module
        if is_target(base):
            made = QuantizedLora(target, adapter_name, config=lora_config, **kwargs)
        else:
            made = original(lora_config, adapter_name, target, **kwargs)
        return made

    return create


def _replacing(original: Any) -> Any:
    from .layer import QuantizedLora

    @wraps(original)
    def replace(model: Any, parent: nn.Module, name: str, new: nn.Module, child: nn.Module) -> None:
        if isinstance(new, QuantizedLora):
            setattr(
                parent, name, new
            )  # its adapters are on the device already; PEFT would unpack the codes to ask for it
        else:
            original(model, parent, name, new, child)

    return replace


def _including(original: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .layer import is_target

    @wraps(original)
    def include(config: Any, model: Any) -> Any:
        asked = getattr(config, "target_modules", None)
        config = original(config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear" and config.peft_type == "LORA":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
            found = {name for name, module in model.named_modules() if is_target(module) and module is not head}
            config.target_modules |= {name for name in found if not name.startswith(inside)}
        return config

    return include
