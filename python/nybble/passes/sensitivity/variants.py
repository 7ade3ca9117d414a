"""The layers that a model would have under each scheme, made aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ...model.walk import Edits, Site, sites
from ...nn.module import QuantizedModule
from ...report.data import LayerReport
from ...weights.scheme import Scheme
from ...weights.sparsity import Block, Pattern
from ..aside import Aside
from ..quantize import quantize
from ..sparsify import sparsify

# What `sparsify` does where nothing else is asked for: it needs no data.
PRUNE = {"method": "magnitude"}


class Unit(NamedTuple):
    """Layers that change together, since they share a weight: their places, and what they become."""

    name: str
    sites: tuple[Site, ...]
    new: Mapping[str, tuple[nn.Module, ...]]
    reports: Mapping[str, LayerReport]
    left: Mapping[str, str]

    @property
    def dense(self) -> nn.Module:
        """The first of the layers as it is."""
        return self.sites[0].module


def check_schemes(argument: str, schemes: str | Scheme | Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    """The schemes, each once. Raises TypeError or ValueError."""
    asked = (schemes,) if isinstance(schemes, (str, Scheme)) else schemes
    found = tuple(dict.fromkeys(Scheme.parse(scheme) for scheme in asked))
    blocks = [str(scheme) for scheme in found if isinstance(scheme.sparsity, Block)]
    if blocks:
        raise ValueError(f"{argument}={blocks[0]!r}: a scheme of blocks does not say how many are zero")
    if not found:
        raise ValueError(f"{argument}: wants at least one scheme")
    return found


def apply(model: nn.Module, scheme: Scheme, options: Mapping[str, Any]) -> dict[str, LayerReport]:
    """Give all layers of a model a scheme, for bytes alone; what became of each."""
    asked: dict[str, Any] = {"goal": "memory", **options}
    if not scheme.static:
        asked.pop("observer", None)
    if scheme.sparsity is None:
        report = quantize(model, scheme, **asked)
    else:
        assert not isinstance(scheme.sparsity, Block), "checked before"  # noqa: S101
        report = sparsify(model, Pattern(scheme.sparsity, scheme.sparsity.zeros), scheme=scheme.dense, **asked)
    return {row.name: row for row in report.layers}


def variants(
    model: nn.Module, schemes: Sequence[Scheme], quantized: Mapping[str, Any], pruned: Mapping[str, Any]
) -> list[Unit]:
    """Every Linear layer that some scheme would change, and what it would be.

    Args:
        model: is left as it is.
        quantized, pruned: arguments of ``quantize`` and ``sparsify``, for schemes without and with zeros.
    """
    rows: dict[Scheme, dict[str, LayerReport]] = {}
    modules: dict[Scheme, dict[str, nn.Module]] = {}
    for scheme in schemes:
        changed = Aside(model).model
        rows[scheme] = apply(changed, scheme, quantized if scheme.sparsity is None else {**PRUNE, **pruned})
        modules[scheme] = dict(changed.named_modules())
    units = []
    tied = {row.name: row.tied_to for found in rows.values() for row in found.values() if row.tied_to}
    places = {site.name: site for site in sites(model)}
    for name, site in places.items():
        known = {scheme: found[name] for scheme, found in rows.items() if name in found}
        swapped = [scheme for scheme, row in known.items() if row.swapped]
        if not swapped or name in tied or isinstance(site.module, QuantizedModule):
            continue
        group = [name, *(other for other, first in tied.items() if first == name)]
        units.append(
            Unit(
                name,
                tuple(places[member] for member in group),
                {str(scheme): tuple(modules[scheme][member] for member in group) for scheme in swapped},
                {str(scheme): known[scheme] for scheme in swapped},
                {str(scheme): str(row.reason) for scheme, row in known.items() if not row.swapped},
            )
        )
    return units


@contextmanager
def placed(units: Sequence[tuple[Unit, str]]) -> Iterator[None]:
    """The model with the layers of these units as under these schemes."""
    edits = Edits()
    try:
        for unit, scheme in units:
            for site, new in zip(unit.sites, unit.new[scheme], strict=True):
                edits.swap(site, new)
        yield
    finally:
        edits.undo()
