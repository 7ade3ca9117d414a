"""The layers that a pass will replace, which of them share a weight, and the decision about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import nn

from ..model.eligible import dense_weight, is_linear_like, why_left
from ..model.opened import names_around
from ..model.options import Options
from ..model.walk import Site, memory_groups, region
from ..nn.kinds import ModuleKind, kind_of
from ..nn.module import QuantizedModule
from ..report.data import Pruned, Rounded, Tried
from ..report.speed import Speed
from ..weights.sparsity import Pattern


@dataclass
class Layer:
    """One Linear-like module and the decision about it.

    ``asked``: whether include and exclude allow it. ``reason``: why it is not replaced, or None. ``new``: its
    replacement. ``tied_to``: the layer whose packed weight the replacement uses. ``pattern``: the sparsity pattern it
    gets; ``is_sparse``: whether its weight has that pattern already. ``training``: the flag of the module at first.
    ``is_done``: whether the model has its replacement, or its new weight.
    """

    site: Site
    asked: bool
    reason: str | None
    training: bool
    is_done: bool = False
    new: QuantizedModule | None = None
    tied_to: Layer | None = None
    kernels: dict[int, str] = field(default_factory=dict)
    speeds: dict[int, Speed] = field(default_factory=dict)
    tried: tuple[Tried, ...] = ()
    sqnr_db: float | None = None
    pattern: Pattern | None = None
    is_sparse: bool = False
    permutation_gain: float | None = None
    notes: list[str] = field(default_factory=list)
    pruned: Pruned | None = None
    rounded: Rounded | None = None

    @property
    def kind(self) -> ModuleKind:
        """The kind of a dense layer."""
        return kind_of(self.site.module)

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight of a layer that can be swapped."""
        return self.kind.parameter_of(self.site.module)

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense bias of a layer that can be swapped."""
        return self.kind.bias_of(self.site.module)

    @property
    def multiplies(self) -> bool:
        """Whether its weight is multiplied; the rows of a table of embeddings are only read."""
        return self.kind.module.multiplies

    def twin_key(self) -> tuple[str, int, torch.Size, tuple[int, ...]]:
        """Equal for twins: layers that read one memory as the same matrix, for which one set of codes serves.

        Twins are Linear layers, and tables of embeddings; other layers that multiply are none, since they may have a
        layout of their own.
        """
        kind, matrix = self.kind, dense_weight(self.site.module)
        own = kind.name if self.multiplies and not kind.takes_rows else ""
        held = kind.parameter_of(self.site.module)
        if region(matrix) is not None and region(matrix) != region(held):
            matrix = held  # the matrix is a copy: its memory says nothing
        return own, matrix.data_ptr(), matrix.shape, matrix.stride()


class Owner(NamedTuple):
    """The module that registers a parameter, and under which key."""

    site: Site
    key: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the module has now."""
        return cast(nn.Parameter, self.site.module._parameters[self.key])

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.site.name}.{self.key}" if self.site.name else self.key


class Plan:
    """All modules of a model, its Linear-like layers, and which parameters share memory."""

    def __init__(self, sites: Sequence[Site], options: Options) -> None:
        self.sites = sites
        self.options = options
        within = names_around(sites)
        self.layers = [self._layer(site, within.get(site.module, ())) for site in sites if is_linear_like(site.module)]
        self.by_site = {layer.site: layer for layer in self.layers}
        owners = [
            Owner(site, key)
            for site in sites
            for key, parameter in site.module._parameters.items()
            if parameter is not None
        ]
        self.groups = memory_groups(owner.parameter for owner in owners)
        self.owners: dict[int, list[Owner]] = {}
        for owner in owners:
            self.owners.setdefault(self.group(owner.parameter), []).append(owner)

    def _layer(self, site: Site, within: tuple[str, ...]) -> Layer:
        names = (*site.names, *within)
        refusal = None if isinstance(site.module, QuantizedModule) else self.options.why_not_asked(names)
        left = [why_left(site.module, scheme) for scheme in self.options.schemes or (None,)]
        never = self._why_not_sparse(site.module)
        reason = refusal or (None if None in left else left[0]) or never
        return Layer(site, asked=refusal is None and never is None, reason=reason, training=site.module.training)

    def _why_not_sparse(self, module: nn.Module) -> str | None:
        """Why a pass that prunes cannot take a layer that can be quantized; or None."""
        if not self.options.prunes or kind_of(module).sparse_module is not None:
            return None
        return f"nybble has no sparse {kind_of(module).name}"

    def group(self, parameter: torch.Tensor) -> int:
        """The memory group of a parameter of the model."""
        return self.groups[id(parameter)]

    def replace_parameter(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Put a parameter that replaces another into the memory group of the old one."""
        self.groups[id(new)] = self.group(old)

    def release(self, layer: Layer) -> None:
        """Keep of a replaced layer only what the report needs: its values are freed, unless others use them."""
        old = layer.weight
        layer.site.module = layer.kind.shell_of(layer.site.module)
        self.replace_parameter(old, layer.weight)

    def restore_training(self) -> None:
        """Give the new layers the training flag of the layers that they replace."""
        for layer in self.layers:
            if layer.new is not None:
                layer.new.train(layer.training)

    def open_layers(self) -> list[Layer]:
        """The layers that are not ruled out."""
        return [layer for layer in self.layers if layer.reason is None]

    def exclude_tied(self) -> None:
        """Rule out layers whose weight stays in use in dense form: quantizing them would hold the weight twice."""
        reasons = [(layer, self._why_tied(layer)) for layer in self.open_layers()]
        for layer, reason in reasons:
            layer.reason = reason

    def _why_tied(self, layer: Layer) -> str | None:
        for owner in self.owners[self.group(layer.weight)]:
            other = self.by_site.get(owner.site)
            if other is None or other.reason is not None:
                return f"shares its weight with {owner.name}, which stays dense (untie=True quantizes a copy)"
            if other.twin_key() != layer.twin_key():
                return f"its weight overlaps {owner.name} (untie=True quantizes a copy)"
        return None

    def twins(self) -> list[list[Layer]]:
        """The layers that are not ruled out, in lists of layers that share one weight (twins).

        The first of a list is the one whose codes the others share.
        """
        sets: dict[object, list[Layer]] = {}
        for layer in self.open_layers():
            sets.setdefault(layer.twin_key(), []).append(layer)
        # First one that multiplies: tables can read its codes, but it cannot multiply with theirs.
        return [sorted(twins, key=lambda layer: not layer.multiplies) for twins in sets.values()]

    def kept_groups(self) -> set[int]:
        """Memory groups that some module still uses after the swap."""
        kept = set()
        for group, owners in self.owners.items():
            for owner in owners:
                layer = self.by_site.get(owner.site)
                if layer is None or layer.reason is not None:
                    kept.add(group)
        return kept
