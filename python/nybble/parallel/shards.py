"""A quantized layer cut over the ranks of a mesh: each holds a smaller layer, packed for its machine.

``state_dict`` shows the portable tensors as DTensors of the whole layer, so that torch.distributed.checkpoint sees what they
are; ``load_state_dict`` takes such DTensors, or whole tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ..layouts.portable import portable_names, spec_of
from ..nn.linear import Linear
from ..nn.packing import PackedModule
from ..weights.activations import ActScale
from ..weights.rounding import QuantizedWeight
from .cut import INPUTS, placements, share_of, why_not


@dataclass(frozen=True)
class Sharding:
    """How a layer is cut. dim: of the weight (N, K); shape: (N, K) of the whole layer."""

    mesh: DeviceMesh
    dim: int
    shape: tuple[int, int]

    def __deepcopy__(self, memo: object) -> Sharding:
        return self

    def show(self, module: PackedModule, state: dict[str, Any], prefix: str) -> None:
        """Turn this rank's tensors in a state_dict into DTensors of the whole layer."""
        _refuse_sparse(module)
        whole = spec_of(module.scheme, *self.shape, form=module.form)
        shapes = {**{name: shape for name, (shape, _) in whole.items()}, "bias": self.shape[:1]}
        for name, place in placements(module.scheme, self.dim, shapes).items():
            held = state.get(prefix + name)
            if held is None:
                continue
            like = torch.empty(shapes[name], device="meta")
            state[prefix + name] = DTensor.from_local(
                held, self.mesh, [place], run_check=False, shape=like.shape, stride=like.stride()
            )

    def take(self, module: PackedModule, state: dict[str, Any], prefix: str) -> None:
        """Put this rank's share in the place of DTensors, and of whole tensors, that are loaded."""
        names = [name for name in (*portable_names(module.scheme), "bias") if prefix + name in state]
        if names:
            _refuse_sparse(module)
        for name, place in placements(module.scheme, self.dim, names).items():
            given = state[prefix + name]
            if isinstance(given, DTensor):
                state[prefix + name] = given.redistribute(self.mesh, [place]).to_local()
            else:
                state[prefix + name] = _mine(given, self.mesh, place, None)

    def __str__(self) -> str:
        return f"{('outputs', 'inputs')[self.dim]} of {self.shape} over {self.mesh.size()} ranks"


def shard(layer: Linear, mesh: DeviceMesh, dim: int, source: int | None) -> None:
    """Keep this rank's share of a layer, in place.

    Args:
        layer: holds the whole weight, on every rank; its ``in_features`` or ``out_features`` becomes that of the share.
        mesh: of one dimension.
        dim: 0: cut the outputs; 1: the inputs. The bias is cut with the outputs; with inputs cut it stays whole, and is added
            after the sum over ranks.
        source: the rank of the mesh whose values count; None: each takes its share of its own.

    Raises:
        ValueError: the layer cannot be cut there, or is cut already.
    """
    scheme, ranks = layer.scheme, mesh.size()
    shape = layer.out_features, layer.in_features
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh: has {mesh.ndim} dimensions, must have one; take a part, such as device_mesh['tp']"
        )
    if layer.sharding is not None:
        raise ValueError(f"layer: is cut already: {layer.sharding}")
    if (why := why_not(scheme, shape, dim, ranks)) is not None:
        raise ValueError(f"{type(layer).__name__}: {why}")
    weight, act = layer.quantized().tensors(), layer.act()
    places = placements(scheme, dim, (*weight, *(act.tensors() if act else ()), "bias"))
    mine = {name: _mine(tensor, mesh, places[name], source) for name, tensor in weight.items()}
    if act is not None:
        act = ActScale(*(_mine(tensor, mesh, places[name], source) for name, tensor in act.tensors().items()))
    bias = None
    if layer.bias is not None:
        bias = nn.Parameter(_mine(layer.bias.detach(), mesh, places["bias"], source), layer.bias.requires_grad)
    n, k = mine["qweight"].shape[0], layer.in_features
    if dim == INPUTS:
        share, at = share_of(k, ranks), mesh.get_local_rank()
        k = min(share, k - at * share)
    layer.out_features, layer.in_features = n, k
    layer.hold(QuantizedWeight(**mine), act)
    layer.bias = bias
    layer.adds_bias = dim != INPUTS
    layer.sharding = Sharding(mesh, dim, shape)


def _mine(tensor: Tensor, mesh: DeviceMesh, place: Placement, source: int | None) -> Tensor:
    """This rank's share of a tensor: contiguous memory of its own."""
    found: Tensor = distribute_tensor(tensor, mesh, [place], src_data_rank=source).to_local()
    return found.detach().clone(memory_format=torch.contiguous_format)


def _refuse_sparse(layer: PackedModule) -> None:
    if layer.is_sparse:
        raise NotImplementedError(
            f"state_dict: a {type(layer).__name__} that is cut over ranks has none, since its shares have as many values as are "
            "kept in each; take that of the whole model"
        )
