"""What is to be done to a model: passes in order, which layers they reach, and what they were chosen with."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from ..model import options
from ..model.digest import data_sha256
from ..model.observe import OBSERVERS
from ..passes.prune import weight as pruning
from ..passes.quantize import quantize
from ..passes.recover import recover
from ..passes.recovery.losses import LOSSES
from ..passes.rotate.rotate import rotate
from ..passes.round.methods import METHODS
from ..passes.sparsify import sparsify
from ..weights.scheme import Scheme
from ..weights.sparsity import Block, Pattern
from .file import located, read, write
from .schema import Field, FieldError, fit

__all__ = ["DENSE", "PASSES", "SCHEMA", "Recipe", "Stage", "data_sha256"]

SCHEMA = "nybble.recipe/1"
DENSE = "dense"

PASSES: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "sparsify": sparsify,
    "recover": recover,
    "rotate": rotate,
}

# What `optimize` gives a pass, and so no stage says.
_GIVEN = {"model", "reference", "calibration", "data", "progress", "resume", "return"}
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("quantize", "method"): METHODS,
    ("sparsify", "method"): pruning.METHODS,
    ("quantize", "goal"): options.GOALS,
    ("sparsify", "goal"): options.GOALS,
    ("quantize", "observer"): tuple(OBSERVERS),
    ("sparsify", "observer"): tuple(OBSERVERS),
    ("recover", "loss"): LOSSES,
}


@dataclass(frozen=True)
class Stage:
    """One pass over the model.

    Args:
        name: "quantize", "sparsify", "recover" or "rotate".
        arguments: keyword arguments of the pass, such as ``{"scheme": "w8a8", "m": (1, 16)}``. Instead of include and
            exclude there may be ``layers``: globs on full module names -> the scheme of the layers that match, the
            first that matches counting: "w4a16g128", of sparsify one with zeros, such as "sp24w8a8", or "dense": left
            alone. Layers that match none take ``scheme`` (and ``pattern``) where it is given, else they are left.

    Raises:
        ValueError: the message names the argument.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in PASSES:
            raise FieldError(("pass",), f"{self.name!r} must be one of {', '.join(PASSES)}")
        hints, found = _hints(self.name), {}
        for key, value in self.arguments.items():
            if key not in hints:
                raise FieldError((key,), f"is nothing that {self.name} takes; it takes {', '.join(hints)}")
            found[key] = fit(value, hints[key], (key,))
            _check(self.name, key, found[key])
        if "layers" in found and ("include" in found or "exclude" in found):
            raise FieldError(("layers",), "says which layers; include and exclude must not")
        for key in _required(self.name) - set(found):
            if "layers" not in found:
                raise FieldError((), f"{self.name} needs {key}")
        object.__setattr__(self, "arguments", found)

    def to_dict(self) -> dict[str, Any]:
        """The stage as a file holds it."""
        return {"pass": self.name, **{key: _plain(value) for key, value in self.arguments.items()}}


@dataclass(frozen=True)
class Recipe:
    """The passes that ``optimize`` runs, in their order.

    Args:
        stages: at least one.
        seed: of whatever is random in them.
        versions: the packages that the recipe was made with, such as ``{"nybble": "0.1.0"}``.
        data_sha256: ``data_sha256`` of the calibration data that it was made with, or None. ``optimize`` reports where
            data or versions are others now; it does not refuse them.

    Raises:
        ValueError: a field is wrong; the message names it.
    """

    stages: Sequence[Stage]
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    data_sha256: str | None = None

    def __post_init__(self) -> None:
        for key, hint in get_type_hints(type(self)).items():
            if key != "stages":
                object.__setattr__(self, key, fit(getattr(self, key), hint, (key,)))
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise FieldError(("stages",), "must be stages, at least one")
        if self.data_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.data_sha256):
            raise FieldError(("data_sha256",), f"{self.data_sha256!r} must be 64 hexadecimal digits")

    @classmethod
    def of_schemes(
        cls,
        schemes: Mapping[str, str],
        *,
        quantize: Mapping[str, Any] | None = None,
        sparsify: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Recipe:
        """The recipe of a scheme per layer: a stage for those that are sparse, then one for those that are not.

        Args:
            schemes: full module name or glob -> scheme, or "dense".
            quantize, sparsify: further arguments of the two passes.
            fields: seed, versions and data_sha256.
        """
        sparse = {name for name, scheme in schemes.items() if _is_sparse(scheme)}
        # Each stage has all patterns, or a later one would take what belongs to an earlier one of the other stage.
        asked = (("sparsify", sparse, sparsify), ("quantize", schemes.keys() - sparse, quantize))
        stages = [
            Stage(kind, {"layers": {k: v if k in names else DENSE for k, v in schemes.items()}, **(more or {})})
            for kind, names, more in asked
            if names
        ]
        return cls(tuple(stages), **fields)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe of what ``to_dict`` gives. Raises ValueError that names the field."""
        if not isinstance(data, Mapping):
            raise FieldError((), "must be a mapping")
        known = {"schema", *(entry.name for entry in fields(cls))}
        for key in data:
            if key not in known:
                raise FieldError((key,), f"is no field of a recipe; those are {', '.join(sorted(known))}")
        if data.get("schema") != SCHEMA:
            raise FieldError(("schema",), f"must be {SCHEMA}")
        stages = data.get("stages")
        if not isinstance(stages, (list, tuple)):
            raise FieldError(("stages",), "must be a list")
        made = [_stage(stage, ("stages", i)) for i, stage in enumerate(stages)]
        return cls(made, **{key: value for key, value in data.items() if key not in ("schema", "stages")})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a file holds it: mappings, lists, text, numbers."""
        return {
            "schema": SCHEMA,
            **{key: _plain(value) for key, value in vars(self).items() if key != "stages" and value not in ({}, None)},
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a file whose name ends in .yaml, .yml (needs PyYAML) or .json.

        Raises:
            ValueError: the file is not a recipe; the message names line and field.
            OSError: it cannot be read.
            ImportError: it is YAML, and PyYAML is not installed.
        """
        data, lines = read(Path(path))
        try:
            return cls.from_dict(data)
        except FieldError as error:
            raise ValueError(located(Path(path), error, lines)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what ``load`` reads, in the form that the name says. Raises as ``load`` does."""
        write(Path(path), self.to_dict())


@cache
def _hints(name: str) -> dict[str, Any]:
    """What a stage may say: the arguments of its pass with their types, and layers."""
    hints = {key: hint for key, hint in get_type_hints(PASSES[name]).items() if key not in _GIVEN}
    return {**hints, "layers": Mapping[str, str]} if "include" in hints else hints


@cache
def _required(name: str) -> frozenset[str]:
    parameters = inspect.signature(PASSES[name]).parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty and p.name not in _GIVEN)


def _check(name: str, key: str, value: Any) -> None:
    """Raise FieldError where a value of the right type means nothing."""
    allowed = _CHOICES.get((name, key))
    if allowed is not None and value is not None and value not in allowed:
        raise FieldError((key,), f"{value!r} must be one of {', '.join(allowed)}")
    try:
        if key == "scheme" and value is not None:
            Scheme.parse(value)
        if key == "pattern" and value != "auto":
            Pattern.parse(value)
    except ValueError as error:
        raise FieldError((key,), str(error)) from None
    if key == "layers":
        for layer, scheme in value.items():
            _check_layer(name, layer, scheme)


def _check_layer(name: str, layer: str, scheme: str) -> None:
    if scheme == DENSE:
        return
    try:
        parsed = Scheme.parse(scheme)
    except ValueError as error:
        raise FieldError(("layers", layer), f"{error}; or {DENSE}") from None
    if (parsed.sparsity is not None) is not (name == "sparsify"):
        raise FieldError(
            ("layers", layer), f"{scheme!r} must be a scheme {'with' if name == 'sparsify' else 'without'} zeros"
        )
    if isinstance(parsed.sparsity, Block):
        raise FieldError(
            ("layers", layer), f"{scheme!r} does not say how many blocks are zero; use pattern and include"
        )


def _is_sparse(scheme: str) -> bool:
    return scheme != DENSE and Scheme.parse(scheme).sparsity is not None


def _stage(data: Any, where: Field) -> Stage:
    if not isinstance(data, Mapping) or not isinstance(data.get("pass"), str):
        raise FieldError(where, f"must be a mapping with pass: {' or '.join(PASSES)}")
    try:
        return Stage(str(data["pass"]), {key: value for key, value in data.items() if key != "pass"})
    except FieldError as error:
        raise error.inside(where) from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
