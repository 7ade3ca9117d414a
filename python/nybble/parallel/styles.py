"""torch's ColwiseParallel and RowwiseParallel, for quantized layers.

Column-wise, each rank computes some of the outputs of all inputs: bit for bit those of one process. Row-wise, each has some of
the inputs, and the outputs are summed over ranks: what differs from one process is the order of that sum, and, with
activations that are quantized token by token, that each rank scales its own inputs.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..nn.linear import Linear
from ..nn.module import QuantizedModule
from .cut import INPUTS, OUTPUTS
from .shards import shard

_Places = tuple[Placement, ...]

_REPLICATE, _LAST, _PARTIAL = (Replicate(),), (Shard(-1),), (Partial(),)
# The dimension of the weight that is cut -> how inputs, their gradients and outputs lie on the ranks.
_PLACES: dict[int, tuple[_Places, _Places | None, _Places]] = {
    OUTPUTS: (_REPLICATE, _PARTIAL, _LAST),
    INPUTS: (_LAST, None, _PARTIAL),  # gradients lie as the inputs do
}


def teach(style: type, dim: int) -> None:
    """Let a class of torch's parallel styles take quantized layers too, whose weights it cuts in a dimension."""
    own = style._apply  # type: ignore[attr-defined]

    @wraps(own)
    def _apply(self: Any, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, QuantizedModule):
            return parallelize(module, device_mesh, self, dim)
        return own(self, module, device_mesh)  # type: ignore[no-any-return]

    style._apply = _apply  # type: ignore[attr-defined]


def parallelize(module: nn.Module, mesh: DeviceMesh, style: Any, dim: int) -> nn.Module:
    """Cut a quantized layer over the ranks of a mesh, in place, and let its inputs and outputs lie as a style says.

    Args:
        module: a nybble.nn.Linear or SparseLinear.
        style: a ColwiseParallel or RowwiseParallel of torch.
        dim: as in ``shards.shard``.

    Raises:
        NotImplementedError: another module.
        ValueError: as ``shards.shard``.
    """
    if not isinstance(module, Linear):
        raise NotImplementedError(
            f"{type(style).__name__}: takes nybble.nn.Linear and SparseLinear, got a {type(module).__name__}; without an entry "
            "in the plan it stays whole on every rank"
        )
    shard(module, mesh, dim, style.src_data_rank)
    wanted, grads, made = _PLACES[dim]

    def enter(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        if style.input_layouts == wanted and _is_plain(x):
            return None
        x = style._prepare_input_fn(style.input_layouts, wanted, layer, args, mesh)
        return (x.to_local(grad_placements=grads), *args[1:])

    def leave(layer: Any, _: Any, y: Tensor) -> Tensor:
        bias = None if layer.adds_bias else layer.bias
        if style.use_local_output and _is_plain(y) and (bias is None or not _trains(bias)):
            if style.output_layouts == made:
                return y
            if made == _PARTIAL and style.output_layouts == _REPLICATE:
                dist.all_reduce(y, group=mesh.get_group())
                return y if bias is None else y.add_(bias)
        shape = (*y.shape[:-1], layer.sharding.shape[0])
        stride = torch.empty(shape, device="meta").stride()
        whole: Any = DTensor.from_local(y, mesh, made, run_check=False, shape=torch.Size(shape), stride=stride)
        whole = style._prepare_output_fn(style.output_layouts, False, layer, whole, mesh)
        if bias is not None:
            whole = whole + DTensor.from_local(bias, mesh, _REPLICATE, run_check=False).to(y.dtype)
        found: Tensor = whole.to_local() if style.use_local_output else whole
        return found

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    return module


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor and not _trains(x)


def _trains(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
