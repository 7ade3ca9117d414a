"""Rounds each weight of a dense checkpoint as soon as transformers has read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSet
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..compiled.rounding import all_finite, quantize_weight
from ..dispatch.spec import FLOATS
from ..model.allocator import return_freed
from ..model.eligible import ALREADY, is_linear_like, name_of, why_structure
from ..model.opened import names_around, opened
from ..model.options import Options, check_patterns
from ..model.walk import Site, named_modules, sites, swap
from ..nn.composite import CompositeModule
from ..nn.experts import Experts
from ..nn.kinds import ModuleKind, kind_of
from ..nn.module import QuantizedModule
from ..passes.quantize import quantize
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .config import HfConfig
from .work import Work, forget_ties, holders_of

_MISSING = "is not in the checkpoint"
_TRIM = 1 << 24  # bytes that are rounded, or packed, until freed memory goes back to the system


@dataclass(frozen=True)
class _Part:
    """A layer with its scheme, and how its weight (N, K) is read from the parameter of the dense model."""

    layer: str
    scheme: Scheme
    matrix: Callable[[Tensor], Tensor]


@dataclass
class _Rounded:
    """A parameter after it was read: codes for each of its parts."""

    codes: list[QuantizedWeight]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Rounding(Work):
    """See Work.

    Attributes:
        left: each layer that stays dense, and why.
    """

    model: Any
    config: HfConfig
    left: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts: dict[str, tuple[_Part, ...]] = {}  # by the name of the parameter
        self.ties: list[list[str]] = []  # names of parameters that are one; those that are multiplied are first
        self.rounded: dict[str, _Rounded] = {}
        self.later: dict[str, Scheme] = {}  # members of modules with several weights other than experts
        self.experts: set[str] = set()
        self._since = 0
        model, self.model = self.model, None
        with opened(model):
            _Planner(model, self).plan()

    def modules(self, model: Any) -> Iterator[nn.Module]:
        """As Work.modules."""
        return holders_of(model, (*(part.layer for parts in self.parts.values() for part in parts), *self.later))

    def needs(self, name: str) -> bool:
        """As Work.needs."""
        return name in self.parts

    def take(self, name: str, value: Tensor, missing: MutableSet[str]) -> bool:
        """As Work.take. A weight with NaN or Inf stays dense."""
        if name not in self.parts:
            return False
        if not all_finite(value.cpu()):
            self._leave(name, "its weight has NaN or Inf")
            return False
        with torch.no_grad():
            codes = [
                quantize_weight(part.matrix(value).cpu(), part.scheme, self.config.method) for part in self.parts[name]
            ]
        self.rounded[name] = _Rounded(codes, value.dtype, value.device)
        missing.discard(name)
        self._freed(value.nbytes)
        return True

    def _freed(self, nbytes: int) -> None:
        self._since += nbytes
        if self._since >= _TRIM:
            return_freed()
            self._since = 0

    def _leave(self, name: str, why: str) -> None:
        self.left.update((part.layer, why) for part in self.parts[name])

    def finish(self, model: Any) -> None:
        """As Work.finish. Codes are packed one after the other."""
        self._take_rest(model)
        with opened(model, keep=False, only=lambda names: bool(self.experts.intersection(names))):
            modules = dict(named_modules(model))
            places = {id(site.module): site for site in sites(model)}
            done: list[str] = []
            for names in self.ties:
                for tied in self._shared(names):
                    new = self._built(tied, modules)
                    done += new
                    swap((places[id(modules[name])], one) for name, one in new.items())
                    self._freed(sum(one.nbytes for one in new.values()))
        forget_ties(model, done)
        for scheme in dict.fromkeys(self.later.values()):
            include = [name for name, other in self.later.items() if other == scheme]
            quantize(
                model, scheme, include=include, method=self.config.method, goal="memory", fuse=False, progress=False
            )

    def _take_rest(self, model: Any) -> None:
        """Round weights that transformers made of others, such as parts of one that it split, and gave to the model."""
        params = dict(model.named_parameters(remove_duplicate=False))
        for names in self.ties:
            for name in names:
                value = params.get(name)
                if name in self.rounded or value is None or value.is_meta:
                    continue
                if getattr(value, "_is_hf_initialized", False) and not any(one in self.rounded for one in names):
                    self.take(name, value, set())
            if not any(one in self.rounded or self.parts[one][0].layer in self.left for one in names):
                for name in names:
                    self._leave(name, _MISSING)

    def _shared(self, names: list[str]) -> Iterator[list[str]]:
        """The names of parameters that get the same codes: all, unless the checkpoint had several that differ."""
        found = [name for name in names if name in self.rounded]
        if not found:
            return
        same = [name for name in found if _equal(self.rounded[name].codes, self.rounded[found[0]].codes)]
        yield [name for name in names if name in same or name not in found]
        for name in found:
            if name not in same:
                yield [name]

    def _built(self, names: list[str], modules: dict[str, nn.Module]) -> dict[str, QuantizedModule]:
        """The new module of each layer of these parameters, which are tied."""
        source = next(name for name in names if name in self.rounded)
        read = self.rounded.pop(source)
        made: dict[str, QuantizedModule] = {}
        leaders: list[QuantizedModule] = []
        for name in names:
            for i, part in enumerate(self.parts[name]):
                old = modules[part.layer]
                kind = kind_of(old)
                scheme = kind.scheme_of(self.parts[names[0]][i].scheme)
                n, k = kind.shape_of(old)
                new = kind.module_for(scheme).on_meta(n, k, scheme, read.dtype)
                if name == names[0]:
                    new.hold(_on(read.codes[i], read.device), None)
                    read.codes[i] = None  # type: ignore[call-overload]
                    leaders.append(new)
                else:
                    new.tie_to(leaders[i])
                new.adopt(old).bias = kind.bias_of(old)
                made[part.layer] = new.train(old.training)
        for name in names:
            self.rounded.pop(name, None)
        return made


class _Planner:
    """Finds, in a model on the meta device whose modules with several weights are open, which parameters are rounded."""

    def __init__(self, model: Any, work: Rounding) -> None:
        config, self.work = work.config, work
        self.sites = sites(model)
        assert config.scheme is not None, "checked by the quantizer"  # noqa: S101
        self.scheme = Scheme.parse(config.scheme)
        include = None if config.include is None else check_patterns("include", config.include, self.sites)
        exclude = check_patterns("exclude", config.exclude, self.sites)
        self.options = Options(self.scheme, include, exclude, config.method, (1,), "memory")
        check_patterns("per_layer", tuple(config.per_layer), self.sites)
        self.around = names_around(self.sites)
        self.members = {id(one): site for site in self.sites for one in _members(site)}

    def plan(self) -> None:
        """Fill the plan of the work."""
        found = {site: self._scheme_of(site) for site in self.sites if is_linear_like(site.module)}
        self.work.left.update((site.name, why) for site, why in found.items() if isinstance(why, str))
        schemes = {site: one for site, one in found.items() if isinstance(one, Scheme)}
        for site in self.sites:
            if isinstance(site.module, Experts):
                self._plan_experts(site, schemes)
        for site, scheme in schemes.items():
            around = self.members.get(id(site.module))
            if around is not None and not isinstance(around.module, Experts):
                self.work.later[site.name] = scheme
        self._plan_layers({site: one for site, one in schemes.items() if id(site.module) not in self.members})

    def _scheme_of(self, site: Site) -> Scheme | str:
        """The scheme of a layer, or why it stays dense."""
        names = (*site.names, *self.around.get(site.module, ()))
        refused = self.options.why_not_asked(names)
        if refused is not None:
            return refused
        scheme = self.scheme
        for pattern, one in self.work.config.per_layer.items():
            if any(fnmatchcase(name, pattern) for name in names):
                if one is None:
                    return f"per_layer[{pattern!r}] is None"
                scheme = Scheme.parse(one)
                break
        return _why_not(site.module, scheme) or scheme

    def _plan_experts(self, site: Site, schemes: dict[Site, Scheme]) -> None:
        """Plan the weights of experts of which all are asked for; if only some are, they stay dense."""
        by_module = {id(one.module): one for one in self.sites}
        experts: Any = site.module
        for weight in (experts.form.up, experts.form.down):
            layers = [by_module[id(one)] for one in experts._modules[weight]]
            if any(one not in schemes for one in layers):
                why = "other experts of the same weight stay dense"
                self.work.left.update((one.name, why) for one in layers if one in schemes)
                continue
            name = f"{site.name}.{weight}"
            self.work.parts[name] = tuple(
                _Part(one.name, schemes[one], _expert(i, experts.form.transposed)) for i, one in enumerate(layers)
            )
            self.work.ties.append([name])
            self.work.experts.add(site.name)

    def _plan_layers(self, schemes: dict[Site, Scheme]) -> None:
        """Plan layers with one weight: those that share it together, and only if none of those stays dense."""
        groups: dict[int, list[tuple[Site, str]]] = {}
        for site in self.sites:
            for key, parameter in site.module._parameters.items():
                if parameter is not None and id(site.module) not in self.members:
                    groups.setdefault(id(parameter), []).append((site, key))
        for owners in groups.values():
            asked = [site for site, key in owners if site in schemes and key == kind_of(site.module).weight.key]
            if not asked:
                continue
            if why := _why_tied(owners, asked):
                self.work.left.update((site.name, why) for site in asked)
                continue
            asked.sort(key=lambda site: not kind_of(site.module).module.multiplies)
            names = [f"{site.name}.{kind_of(site.module).weight.key}" for site in asked]
            for name, site in zip(names, asked, strict=True):
                to_matrix = kind_of(site.module).weight.to_matrix
                self.work.parts[name] = (_Part(site.name, schemes[asked[0]], to_matrix),)
            self.work.ties.append(names)


def _members(site: Site) -> Iterator[nn.Module]:
    if isinstance(site.module, CompositeModule):
        yield from site.module.members()


def _why_not(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a module on the meta device cannot get a scheme. As eligible.why_left, which looks at the weight's values too."""
    if isinstance(module, QuantizedModule):
        return ALREADY
    if reason := why_structure(module):
        return reason
    kind = kind_of(module)
    weight, shape = kind.parameter_of(module), kind.shape_of(module)
    if weight.dtype not in FLOATS:
        return f"its weight is {name_of(weight.dtype)}, only float32, bfloat16 and float16 are supported"
    if len(shape) != 2 or weight.numel() == 0:
        return f"its weight has the shape {shape}, only (N, K) with N, K >= 1 is supported"
    try:
        kind.scheme_of(scheme).check_shape(*shape)
    except ValueError as error:
        return str(error)
    return None


def _why_tied(owners: list[tuple[Site, str]], asked: list[Site]) -> str | None:
    """Why layers that share a parameter cannot share codes, or None."""
    for site, key in owners:
        if site not in asked:
            return f"shares its weight with {site.name}.{key}, which stays dense"
    if len({_reads(kind_of(site.module)) for site in asked}) > 1:
        return f"shares its weight with {asked[-1].name}, which reads it as another matrix"
    return None


def _reads(kind: ModuleKind) -> object:
    """Equal for kinds that read one parameter as the same matrix, of which one set of codes serves all."""
    return kind.weight.to_matrix, kind.name if kind.module.multiplies and not kind.takes_rows else ""


def _expert(i: int, transposed: bool) -> Callable[[Tensor], Tensor]:
    return lambda value: value[i].t() if transposed else value[i]


def _equal(first: list[QuantizedWeight], second: list[QuantizedWeight]) -> bool:
    return all(
        torch.equal(one, b.tensors()[key])
        for a, b in zip(first, second, strict=True)
        for key, one in a.tensors().items()
    )


def _on(codes: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return QuantizedWeight(**{key: one.to(device) for key, one in codes.tensors().items()})
