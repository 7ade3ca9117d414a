"""Quantized layers whose weight stays a set of parameters, for engines that move parameters: FSDP, and offloading."""

from __future__ import annotations

from torch import nn

from ..fusion.block import unfuse
from ..fusion.search import stop_search
from ..nn.packing import PackedModule


def keep_portable(model: nn.Module, keep: bool = True) -> int:
    """Let quantized layers keep their portable tensors, as parameters, and pack them for each call alone.

    Without this a layer is packed once, and its weight is a buffer: ``fully_shard`` and accelerate's offloading then leave it
    where it is. With it they shard and move the weight as that of a dense layer. Packing takes time in each call, see the
    docs. Layers that share codes get a copy each. Chains of ``nybble.fuse`` are undone: they hold packed weights.

    Args:
        model: any module; before ``fully_shard``, ``cpu_offload``, ``disk_offload``.
        keep: False: pack once, at the next call, as usual.

    Returns:
        The number of layers.

    Raises:
        TypeError: not a module.
        ValueError: the model has no quantized layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    if not layers:
        raise ValueError(f"model={type(model).__name__}: has no quantized layers")
    stop_search(model)
    unfuse(model)
    for layer in layers:
        if keep:
            layer.unpack()
        layer.keeps_portable = layer._parameters["scale"].dtype if keep else None  # type: ignore[union-attr]
    return len(layers)
