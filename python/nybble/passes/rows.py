"""Make the report of a plan whose layers are decided: one row per layer, and bytes before and after."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..dispatch.targets import detect
from ..model.eligible import name_of
from ..model.opened import why_closed
from ..model.walk import Site
from ..nn.kinds import kind_of
from ..nn.module import QuantizedModule
from ..report.data import UNKNOWN_KIND, LayerReport
from ..report.report import Report
from .plan import Layer, Plan


class _Memory:
    """Counts the bytes of weights; shared memory is counted once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seen: set[object] = set()
        self.kept = plan.kept_groups()

    def dense(self, parameter: torch.Tensor | None, leaves: bool = False) -> int:
        """Bytes of a dense parameter; 0 if its memory was counted before, or it ``leaves`` a module but stays in use."""
        if parameter is None:
            return 0
        group = self.plan.group(parameter)
        return 0 if (leaves and group in self.kept) or self._again(group) else _nbytes(parameter)

    def codes(self, layer: QuantizedModule) -> int:
        """Bytes of a nybble layer without its bias; 0 if its weight was counted before."""
        bias = 0 if layer.bias is None else _nbytes(layer.bias)
        return 0 if self._again(("codes", layer.weight_id)) else layer.nbytes - bias

    def _again(self, key: object) -> bool:
        seen = key in self.seen
        self.seen.add(key)
        return seen


def make_report(plan: Plan, scheme: str, timing_s: float) -> Report:
    """The report of a plan whose layers are decided.

    ``scheme`` is the requested one, as text; ``timing_s`` the seconds that measuring speeds took.
    """
    from .. import __version__

    memory = _Memory(plan)
    rows: list[LayerReport] = []
    for site in plan.sites:
        layer = plan.by_site.get(site)
        if layer is None:
            rows += _other_rows(site, memory)
        elif layer.new is not None:
            rows.append(_swapped_row(layer, layer.new, memory))
        else:
            rows.append(_left_row(layer, memory))
    total, changed = _weight_bytes(plan, memory.kept)
    asked = plan.options
    return Report(
        layers=tuple(rows),
        scheme=scheme,
        goal=asked.goal,
        method=asked.method,
        m=asked.m,
        machine=detect().cpu,
        threads=torch.get_num_threads(),
        weight_bytes=total,
        weight_bytes_changed=changed,
        timing_s=timing_s,
        timing_limit_s=asked.timing_s,
        versions={"nybble": __version__, "torch": torch.__version__},
    )


def _swapped_row(layer: Layer, new: QuantizedModule, memory: _Memory) -> LayerReport:
    module, first = layer.site.module, layer.tied_to
    bias = memory.dense(layer.bias)
    return LayerReport(
        name=layer.site.name,
        kind=type(module).__name__,
        shape=(new.out_features, new.in_features),
        before=name_of(layer.weight.dtype),
        after=str(new.scheme),
        nbytes_before=memory.dense(layer.weight, leaves=True) + bias,
        nbytes_after=memory.codes(new) + bias,
        sqnr_db=layer.sqnr_db if first is None else first.sqnr_db,
        kernel=_kernels(layer),
        speeds=dict(layer.speeds),
        tried=layer.tried,
        tied_to=None if first is None else first.site.name,
        also=layer.site.names[1:],
        pruned=layer.pruned,
        rounded=layer.rounded,
    )


def _left_row(layer: Layer, memory: _Memory) -> LayerReport:
    module = layer.site.module
    if isinstance(module, QuantizedModule):
        kind = str(module.scheme)
        nbytes = memory.codes(module) + memory.dense(module.bias)
    else:
        kind = " and ".join(sorted({name_of(parameter.dtype) for parameter in _own(module)})) or "-"
        nbytes = sum(memory.dense(parameter) for parameter in _own(module))
    return LayerReport(
        name=layer.site.name,
        kind=type(module).__name__,
        shape=_shape(module),
        before=kind,
        after=kind if layer.pruned is None else f"{kind} {layer.pruned.pattern}",
        nbytes_before=nbytes,
        nbytes_after=nbytes,
        kernel=_kernels(layer),
        speeds=dict(layer.speeds),
        tried=layer.tried,
        reason=layer.reason,
        also=layer.site.names[1:],
        pruned=layer.pruned,
    )


def _other_rows(site: Site, memory: _Memory) -> Iterator[LayerReport]:
    """A row for each weight of a module that nybble does not replace."""
    for key, parameter in site.module._parameters.items():
        if parameter is None or nn.parameter.is_lazy(parameter) or parameter.dim() < 2:
            continue
        names = [name if key == "weight" and name else f"{name}.{key}".lstrip(".") for name in site.names]
        nbytes = memory.dense(parameter)
        yield LayerReport(
            name=names[0],
            kind=type(site.module).__name__,
            shape=tuple(parameter.shape),
            before=name_of(parameter.dtype),
            after=name_of(parameter.dtype),
            nbytes_before=nbytes,
            nbytes_after=nbytes,
            reason=why_closed(site.module) or UNKNOWN_KIND,
            also=tuple(names[1:]),
        )


def _kernels(layer: Layer) -> str | None:
    return ", ".join(dict.fromkeys(layer.kernels.values())) or None


def _own(module: nn.Module) -> list[nn.Parameter]:
    found = (parameter for parameter in module._parameters.values() if parameter is not None)
    return [parameter for parameter in found if not nn.parameter.is_lazy(parameter)]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, QuantizedModule):
        return module.out_features, module.in_features
    kind = kind_of(module)
    weight = module._parameters.get(kind.weight.key)
    if isinstance(weight, torch.Tensor) and not nn.parameter.is_lazy(weight):
        return kind.shape_of(module)
    return tuple(int(getattr(module, name, 0)) for name in ("out_features", "in_features"))


def _weight_bytes(plan: Plan, kept: set[int]) -> tuple[int, int]:
    """(bytes of all weights of rank 2 or more, bytes of those that were replaced); shared memory is counted once."""
    total: dict[object, int] = {}
    changed: set[object] = set()
    for group, owners in plan.owners.items():
        dense = [owner.parameter for owner in owners if not isinstance(owner.site.module, QuantizedModule)]
        sizes = [_nbytes(p) for p in dense if not nn.parameter.is_lazy(p) and p.dim() >= 2]
        if sizes:
            total[group] = max(sizes)
        if group not in kept:
            changed.add(group)
    for layer in plan.layers:
        module = layer.site.module
        if isinstance(module, QuantizedModule):
            total[module.weight_id, "codes"] = module.out_features * module.in_features * module.dtype.itemsize
            changed.add((module.weight_id, "codes"))
    return sum(total.values()), sum(size for key, size in total.items() if key in changed)
