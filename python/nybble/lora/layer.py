"""The LoRA layer of PEFT round a quantized Linear. Importing this needs peft."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as DenseLora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..compiled.rounding import quantize_weight, sqnr_db
from ..nn import Linear
from ..weights.rounding import QuantizedWeight, dequantize_weight
from .report import merged

# Starting values that need no change of the base weight.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class QuantizedLora(DenseLora):  # type: ignore[misc]
    """y = base(x) + B(A(x)) * scaling, with the base a nybble.nn.Linear whose weight is not trained.

    Merging adds the adapters to the weight that the codes stand for, and rounds to nearest with the layer's scheme; a
    static scale of activations stays. Unmerging puts back the codes that were there, bit for bit: they are kept until
    then, beside the merged ones. Adapters merged one after another are added to the first codes, so that rounding
    happens once. ``nybble.merge_report`` says what it took.

    Raises:
        ValueError: the configuration asks for a variant or starting values that change the base weight, or that weight is
            cut over ranks.
    """

    merged_adapters: list[str]
    _before: tuple[Tensor, str, Tensor | None] | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        if (sharding := self.get_base_layer().sharding) is not None:
            raise ValueError(f"layer: is cut ({sharding}), and an adapter of one rank would not know of the others")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None but LoRA itself: the others scale or replace the base weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As PEFT's, after a check of the starting values."""
        if config.init_lora_weights not in _STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r}: changes the base weight, which is quantized; must be one of "
                f"{_STARTS}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight and rounds it again.

        Args:
            safe_merge: has no effect: a sum with NaN or Inf is always refused, and the layer stays as it was.
            adapter_names: which; None: the active ones.

        Raises:
            ValueError: the sum is not finite, or the layer is sparse or has no bias where the adapter has one.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        if base.scheme.sparsity is not None:
            raise ValueError(
                f"scheme={str(base.scheme)!r}: merging would fill the zeros; keep the adapter beside the layer"
            )
        base.pack()
        before = self._before or (base.packed, base.layout, None if base.bias is None else base.bias.detach().clone())
        all_names = [*self.merged_adapters, *names]
        rounded, bias, losses = self._sum(self._first(before[:2]), before[2], all_names)
        base.hold(rounded, base.act())
        if bias is not None:
            base.bias.data = bias
        self._before, self.merged_adapters = before, all_names
        merged[base] = (tuple(all_names), *losses)

    def unmerge(self) -> None:
        """Puts back the weight and the bias from before merging."""
        if self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        packed, layout, bias = self._before
        if packed.device != base.device:
            raise ValueError(
                f"layer: is on {base.device}, was on {packed.device} when it was merged; move it back first"
            )
        base._hold_packed(packed, layout)
        if bias is not None:
            base.bias.data = bias
        self._before, self.merged_adapters = None, []
        merged.pop(base, None)

    def _first(self, held: tuple[Tensor, str]) -> QuantizedWeight:
        """The codes of a weight that the layer held, which it may not hold now."""
        base = self.get_base_layer()
        now = base.packed, base.layout
        base._hold_packed(*held)
        try:
            found: QuantizedWeight = base.quantized()
        finally:
            base._hold_packed(*now)
        return found

    @torch.no_grad()
    def _sum(
        self, first: QuantizedWeight, bias: Tensor | None, names: list[str]
    ) -> tuple[QuantizedWeight, Tensor | None, tuple[float, float]]:
        """The rounded weight with adapters, the bias, and how many dB rounding took of the weight and of their change."""
        base = self.get_base_layer()
        scheme, k = base.scheme, base.in_features
        change = torch.zeros(base.out_features, k, device=base.device)
        for name in names:
            up, down = self.lora_B[name], self.lora_A[name]
            change += up.weight.float() @ down.weight.float() * self.scaling[name]
            if up.bias is not None:
                if bias is None:
                    raise ValueError(f"adapter {name}: has a bias, the layer has none, so it cannot be merged")
                bias = bias + (up.bias * self.scaling[name]).to(bias.dtype)
        weight = dequantize_weight(first, scheme, k) + change
        if not torch.isfinite(weight).all() or not (bias is None or torch.isfinite(bias).all()):
            raise ValueError(f"adapters {', '.join(names)}: their sum with the weight has NaN or Inf")
        rounded = quantize_weight(weight, scheme)
        error = (weight - dequantize_weight(rounded, scheme, k)).square().sum().item()
        kept = change.square().sum().item()
        change_db = math.inf if not error else 10 * math.log10(kept / error) if kept else -math.inf
        return rounded, bias, (sqnr_db(weight, rounded, scheme), change_db)


def is_target(module: nn.Module) -> bool:
    """Whether QuantizedLora can adapt a module."""
    return isinstance(module, Linear)
