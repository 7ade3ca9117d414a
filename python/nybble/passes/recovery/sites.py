"""The quantized and pruned layers of a model, paired with the dense layers of the reference."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import nn

from ...model.eligible import dense_weight, is_linear_like
from ...model.walk import Site, sites
from ...nn.kinds import kind_of
from ...nn.module import QuantizedModule
from .shadow import Shadow

_LEAST_ZEROS = 0.05  # a dense layer with at least this share of zeros counts as pruned


class Pair(NamedTuple):
    """The site of a layer in the model, and the dense layer of the reference."""

    site: Site
    dense: nn.Module

    @property
    def layer(self) -> nn.Module:
        """The module that is at the site now."""
        place = self.site.places[0]
        return cast(nn.Module, place.parent._modules[place.key])

    def put(self, new: nn.Module) -> None:
        """Put another module at the site."""
        for place in self.site.places:
            place.put(new)

    def shadow(self) -> Shadow:
        """A trainable stand-in for the layer."""
        return Shadow(self.layer, self.dense)


def pairs(model: nn.Module, reference: nn.Module) -> tuple[list[Pair], dict[str, str]]:
    """The quantized and pruned layers with their dense counterparts, and name -> reason for those that are left out.

    Raises:
        ValueError: a counterpart is missing, quantized, or of another shape; or no layer is quantized or pruned.
    """
    dense = dict(reference.named_modules())
    users: dict[int, int] = {}
    found, left = [], {}
    changed = [site for site in sites(model) if is_linear_like(site.module) and _is_changed(site.module)]
    for site in changed:
        users[_weight_id(site.module)] = users.get(_weight_id(site.module), 0) + 1
    for site in changed:
        other = dense.get(site.name)
        if other is None or not is_linear_like(other) or isinstance(other, QuantizedModule):
            raise ValueError(f"reference: has no dense Linear layer {site.name!r}, which the model has")
        shape, wanted = tuple(dense_weight(other).shape), tuple(dense_weight(site.module).shape)
        if shape != wanted:
            raise ValueError(f"reference: {site.name!r} has shape {shape}, in the model it has {wanted}")
        if users[_weight_id(site.module)] > 1:
            left[site.name] = "shares its weight with another layer"
        elif isinstance(site.module, QuantizedModule) and site.module.scheme.ordered:
            left[site.name] = "the columns of its weight are in an order of their own"
        elif isinstance(site.module, QuantizedModule) and site.module.scheme.book:
            left[site.name] = "the codes of its weight index a table"
        else:
            found.append(Pair(site, other))
    if not found:
        raise ValueError("model: has no quantized or pruned Linear layer to recover")
    return found, left


def _is_changed(module: nn.Module) -> bool:
    if isinstance(module, QuantizedModule):
        return True
    kind = kind_of(module)
    weight = module._parameters.get(kind.weight.key)
    return kind.replaces(type(module)) and weight is not None and (weight == 0).float().mean().item() >= _LEAST_ZEROS


def _weight_id(module: nn.Module) -> int:
    return module.weight_id if isinstance(module, QuantizedModule) else id(kind_of(module).parameter_of(module))
