"""A key and value cache in 8 bits for transformers models: int8 codes, and a float32 scale per token and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_MOST = 127  # codes are symmetric
# The tensors of a layer, each (batch, heads, tokens, width or 1).
_PARTS = ("keys", "values", "key_scales", "value_scales")
# Kinds of layers that only differ in the mask; a window's keys are all kept.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def _codes(states: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales (..., 1): a row is its codes times its scale, which has the largest of them at 127."""
    wide = states.float()
    scales = (wide.abs().amax(-1, keepdim=True) / _MOST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scales).round().to(torch.int8), scales


class Int8Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The cache of one layer: ``keys`` and ``values`` are codes, ``key_scales`` and ``value_scales`` their scales."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Starts without tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for side, states in (("key", key_states), ("value", value_states)):
            codes, scales = _codes(states[:, :, :0])
            setattr(self, f"{side}s", codes)
            setattr(self, f"{side}_scales", scales)
        self.is_initialized = True

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds tokens; returns the codes of all keys and values, then the scales of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (keys, key_scales), (values, value_scales) = _codes(key_states), _codes(value_states)
        news = keys, values, key_scales, value_scales
        held = [torch.cat((getattr(self, name), new), 2) for name, new in zip(_PARTS, news, strict=True)]
        for name, part in zip(_PARTS, held, strict=True):
            setattr(self, name, part)
        return held[0], held[1], held[2], held[3]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns all keys and values in the model's dtype."""
        keys, values, key_scales, value_scales = self.append(key_states, value_states)
        return (keys * key_scales).to(self.dtype), (values * value_scales).to(self.dtype)

    def _replace(self, new: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for name in _PARTS:
                setattr(self, name, new(getattr(self, name)))

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        self._replace(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves the layer back to its device."""
        self._replace(lambda part: part.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.key_scales = self.value_scales = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects sequences, as beam search does."""
        self._replace(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; ``tokens_to_remove`` is their number, negative.

        Raises:
            ValueError: it is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: must be 0, or the number of tokens, negative")
        if tokens_to_remove:
            self._replace(lambda part: part[:, :, :tokens_to_remove])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        self._replace(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences."""
        self._replace(lambda part: part[indices])


class Int8Cache(Cache):
    """A growing cache of keys and values in 8 bits, for ``generate()`` and calls of transformers models.

    ``model.generate(..., past_key_values=nybble.Int8Cache(config=model.config))``. A token's key and value take head_dim +
    4 bytes each and head. Any attention reads it: what it gives is in the model's dtype. Blocks fused by ``nybble.fuse``
    read the codes themselves.

    Args:
        config: of the model, to see whether all of its layers are of attention; None: they are.

    Raises:
        ValueError: the model has layers of another kind, such as linear attention.
    """

    def __init__(self, config: Any = None) -> None:
        if config is not None:
            kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - _ATTENTION
            if kinds:
                raise ValueError(f"config: has layers of type {sorted(kinds)}, must have {sorted(_ATTENTION)} only")
        super().__init__(layer_class_to_replicate=Int8Layer)

    def update_codes(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``update``, but returns int8 codes of all keys and values of a layer, then their scales (..., 1)."""
        while len(self.layers) <= layer_idx:
            self.layers.append(Int8Layer())
        layer = self.layers[layer_idx]
        assert isinstance(layer, Int8Layer)  # noqa: S101
        return layer.append(key_states, value_states)
