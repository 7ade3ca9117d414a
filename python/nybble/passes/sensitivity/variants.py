"""The replacement of every layer under each scheme, built without changing the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ...model import options
from ...model.walk import Edits, Site, sites
from ...nn.module import QuantizedModule
from ...report.data import LayerReport
from ...weights.scheme import Scheme
from ...weights.sparsity import Block, Pattern
from ..model_copy import ModelCopy
from ..quantize import quantize
from ..sparsify import sparsify

# The default arguments of `sparsify`: magnitude needs no data.
PRUNE = {"method": "magnitude"}


class Unit(NamedTuple):
    """A layer, or several that share a weight and so change together.

    new: scheme -> their replacements. reports: scheme -> the report row. left: scheme -> why they cannot have it.
    """

    name: str
    sites: tuple[Site, ...]
    new: Mapping[str, tuple[nn.Module, ...]]
    reports: Mapping[str, LayerReport]
    left: Mapping[str, str]

    @property
    def dense(self) -> nn.Module:
        """The first of the original layers."""
        return self.sites[0].module


def check_schemes(argument: str, schemes: str | Scheme | Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    """The schemes without duplicates. Raises TypeError or ValueError."""
    found = options.check_schemes(argument, schemes)
    blocks = [str(scheme) for scheme in found if isinstance(scheme.sparsity, Block)]
    if blocks:
        raise ValueError(
            f"{argument}={blocks[0]!r}: block schemes are refused, since they do not give the share of zeros"
        )
    return found


def apply(model: nn.Module, scheme: Scheme, arguments: Mapping[str, Any]) -> dict[str, LayerReport]:
    """Give all layers of a model one scheme, with goal="memory" by default. Returns name -> report row."""
    asked: dict[str, Any] = {"goal": "memory", **arguments}
    if not scheme.static:
        asked.pop("observer", None)
    if scheme.sparsity is None:
        report = quantize(model, scheme, **asked)
    else:
        assert not isinstance(scheme.sparsity, Block), "check_schemes refuses blocks"  # noqa: S101
        report = sparsify(model, Pattern(scheme.sparsity, scheme.sparsity.zeros), scheme=scheme.dense, **asked)
    return {row.name: row for row in report.layers}


def variants(
    model: nn.Module, schemes: Sequence[Scheme], quantized: Mapping[str, Any], pruned: Mapping[str, Any]
) -> list[Unit]:
    """The replacements of every Linear layer that some scheme would change.

    Args:
        model: is not changed.
        quantized, pruned: further arguments of ``quantize`` (dense schemes) and ``sparsify`` (sparse schemes).
    """
    rows: dict[Scheme, dict[str, LayerReport]] = {}
    modules: dict[Scheme, dict[str, nn.Module]] = {}
    for scheme in schemes:
        changed = ModelCopy(model).model
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
                {str(scheme): _whole([rows[scheme][member] for member in group]) for scheme in swapped},
                {str(scheme): str(row.reason) for scheme, row in known.items() if not row.swapped},
            )
        )
    return units


def _whole(rows: Sequence[LayerReport]) -> LayerReport:
    """The first of several rows, with the bytes of all: of layers that share a weight, one has them, whichever is first."""
    before, after = (sum(getattr(row, key) for row in rows) for key in ("nbytes_before", "nbytes_after"))
    return replace(rows[0], nbytes_before=before, nbytes_after=after)


@contextmanager
def placed(units: Sequence[tuple[Unit, str]]) -> Iterator[None]:
    """Within the context, the model has the layers of these units replaced by those of the given schemes."""
    edits = Edits()
    try:
        for unit, scheme in units:
            for site, new in zip(unit.sites, unit.new[scheme], strict=True):
                edits.swap(site, new)
        yield
    finally:
        edits.undo()
