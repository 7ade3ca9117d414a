"""Registers nybble with transformers, guards ``save_pretrained``, and lets other formats run on nybble's kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from ..nn.module import QuantizedModule
from .versions import why_too_old

_state: dict[str, int] = {}  # "act_bits" while patch_transformers holds


def register() -> None:
    """Enter nybble in transformers' tables, once; it is called when transformers.modeling_utils has been imported."""
    models: Any = sys.modules["transformers.modeling_utils"]
    usable = why_too_old() is None
    if usable:
        _enter()
    _guard(models.PreTrainedModel, usable)


def _enter() -> None:
    from transformers.quantizers import auto

    from . import tensor_parallel
    from .config import METHOD, HfConfig
    from .quantizer import NybbleQuantizer

    tensor_parallel.register()
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(METHOD)(HfConfig)
    auto.register_quantizer(METHOD)(NybbleQuantizer)
    own: Callable[..., Any] = auto.AutoHfQuantizer.merge_quantization_configs

    @wraps(own)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        """What the checkpoint says gives way to nybble's configuration, if it is another library's."""
        asked, told = quantization_config_from_args, quantization_config
        method = _method_of(told)
        if method != METHOD:
            if isinstance(asked, HfConfig):
                return asked.unused()
            if _state and method in _read() and (asked is None or _method_of(asked) == method):
                return HfConfig(act_bits=_state["act_bits"])
        return own(quantization_config, quantization_config_from_args)

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(  # type: ignore[method-assign]
        merge_quantization_configs
    )


def _method_of(config: Any) -> str | None:
    """The quantization method of a configuration, or of what config.json says."""
    found = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(found, "value", found)


def _read() -> set[str]:
    """The methods whose checkpoints nybble reads."""
    from ..foreign.formats import foreign_formats

    return {row.name for row in foreign_formats()}


def _guard(models: Any, usable: bool) -> None:
    """Make ``save_pretrained`` of a model with nybble's layers say in config.json what they are, or raise."""
    own = models.save_pretrained
    if hasattr(own, "_by_nybble"):
        return

    @wraps(own)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, QuantizedModule) for module in self.modules()):
            if not usable:
                raise NotImplementedError(
                    f"save_pretrained: {why_too_old()}, and would load this model with random weights; call "
                    "nybble.save(model, directory), or nybble.save_pretrained to write it as GPTQ or compressed-tensors"
                )
            _attach(self)
        elif _is_ours(self):
            self.hf_quantizer.remove_quantization_config(self)  # all layers were made dense again
        return own(self, *args, **kwargs)

    save_pretrained._by_nybble = True  # type: ignore[attr-defined]
    models.save_pretrained = save_pretrained


def _is_ours(model: Any) -> bool:
    from .quantizer import NybbleQuantizer

    return isinstance(getattr(model, "hf_quantizer", None), NybbleQuantizer)


def _attach(model: Any) -> None:
    """Give a model what transformers asks when it saves. Its tensors keep the names that they have in the model."""
    from .config import HfConfig
    from .quantizer import NybbleQuantizer

    held = getattr(model, "hf_quantizer", None)
    if held is not None and not _is_ours(model):
        other = _method_of(held.quantization_config)
        raise ValueError(
            f"save_pretrained: the model has layers of nybble and of {other}; call nybble.save(model, directory)"
        )
    if held is None:
        model.hf_quantizer = NybbleQuantizer(HfConfig(), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model._weight_conversions = []


def patch_transformers(act_bits: int = 16) -> Callable[[], None]:
    """Let ``from_pretrained`` run checkpoints of other libraries on nybble's kernels, without naming a configuration.

    That is for each format that ``nybble.load_pretrained`` reads and config.json names: GPTQ, AWQ, compressed-tensors,
    bitsandbytes, torchao. An ``HfConfig`` that is given to ``from_pretrained`` goes first. Models that were loaded before stay as
    they are.

    Args:
        act_bits: 16: float activations; 8: quantized for each token, or static where the checkpoint says so.

    Returns:
        A function that ends it.

    Raises:
        ValueError: act_bits is neither.
        ImportError: transformers is not installed, or too old.
    """
    from .config import HfConfig

    HfConfig(act_bits=act_bits)  # checks
    import_module("transformers.modeling_utils")  # which registers
    _state["act_bits"] = act_bits
    return _state.clear
