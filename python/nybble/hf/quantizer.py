"""nybble's row in transformers' table of quantizers."""

from __future__ import annotations

import warnings
from collections.abc import MutableSet
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from ..callers import outside_level
from ..foreign.report import ImportReport
from ..model.allocator import return_freed
from . import tensor_parallel
from .config import HfConfig
from .foreign import Foreign, format_of
from .restoring import Restoring
from .rounding import Rounding
from .stored import describe, state_of
from .work import Work, tied


class NybbleQuantizer(HfQuantizer):
    """Loads a dense checkpoint rounded, one that nybble saved, or one of another library; and saves.

    Attributes:
        left: after a dense checkpoint was loaded: each layer that stayed dense, and why.
        report: after another library's checkpoint was loaded: what became of each layer.
    """

    requires_calibration = False
    quantization_config: HfConfig

    def __init__(self, quantization_config: HfConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # A copy: the caller may load other models with the same configuration.
        self.quantization_config = copy(quantization_config) if self.pre_quantized else quantization_config.unused()
        self.report: ImportReport | None = None
        self.left: dict[str, str] = {}
        self._work: Work | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError for a device that holds no quantized layers."""
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError(
                f"device_map={device_map!r}: nybble's layers cannot be offloaded to disk while they load; load the model, then "
                "call nybble.parallel.keep_portable(model) and accelerate.disk_offload"
            )

    # --- loading ---

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: Any = None, **kwargs: Any
    ) -> Any:
        with tied(model):
            self._work = self._start(model, checkpoint_files, dtype)
        tensor_parallel.mark(self._work.modules(model))
        return model

    def _start(self, model: Any, checkpoint_files: list[str] | None, dtype: Any) -> Work:
        """What the checkpoint needs."""
        config = self.quantization_config
        directory = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if config.stored is not None and self.pre_quantized:
            return Restoring(model, config.stored)
        if directory is not None and (known := format_of(directory)) is not None:
            if config.scheme is not None:
                raise ValueError(
                    f"scheme={config.scheme!r}: the checkpoint in {directory} is quantized already ({known.name}), and its "
                    "codes are kept: nybble.HfConfig(act_bits=16) or 8 for quantized activations"
                )
            return Foreign(model, directory, config.act_bits, dtype)
        if config.scheme is None:
            raise ValueError(
                "scheme=None: the checkpoint is not quantized; name the scheme, such as nybble.HfConfig('w4a8g128')"
            )
        return Rounding(model, config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is rounded as soon as it is read."""
        return self._work is not None and self._work.needs(param_name)

    def get_quantize_ops(self) -> _Take:
        """What happens to such a parameter."""
        return _Take(self)

    def take(self, name: str, value: Tensor, missing: MutableSet[str]) -> bool:
        """As Work.take."""
        return self._work is not None and self._work.take(name, value, missing)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """A checkpoint of nybble's has the names of the model itself."""
        if isinstance(self._work, Restoring):
            return []
        found: list[Any] = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        return found

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        work, self._work = self._work, None
        if work is None:
            return model
        plan = tensor_parallel.plan_of(model)
        work.finish(model)
        if isinstance(work, Rounding):
            self.left = work.left
            _warn_of_nothing(model, work.left)
        if isinstance(work, Foreign):
            self.report = work.report
        return_freed()
        self.quantization_config.stored = describe(model)
        tensor_parallel.apply(model, plan)
        return model

    # --- saving ---

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a model as they are saved; the configuration then says what they are."""
        self.quantization_config.stored = describe(model)
        return state_of(model), {}

    def is_serializable(self) -> bool:
        """Whether save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the quantized model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the quantized model can be compiled."""
        return True


def _warn_of_nothing(model: nn.Module, left: dict[str, str]) -> None:
    if not describe(model)["layers"]:
        name, why = next(iter(left.items()), ("the model", "has no layers that nybble replaces"))
        warnings.warn(f"no layer was quantized, such as {name}: {why}", RuntimeWarning, stacklevel=outside_level())


class _Take(ConversionOps):
    """A step of transformers' loading: the quantizer takes weights, and the model gets only those that it does not want."""

    def __init__(self, quantizer: NybbleQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        missing_keys: MutableSet[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        left: dict[str, Any] = {}
        while input_dict:
            name, value = input_dict.popitem()
            value = value[0] if isinstance(value, list) else value
            if not self.quantizer.take(name, value, set() if missing_keys is None else missing_keys):
                left[name] = value
        return left
