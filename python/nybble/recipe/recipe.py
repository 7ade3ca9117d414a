"""Recipe and Stage: the passes to run on a model, in order, with their layers and arguments."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from .. import _moved
from ..fusion.fuse import ATTENTION, fuse
from ..fusion.fuse import GOALS as FUSE_GOALS
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
    "fuse": fuse,
}

# Arguments that `optimize` sets itself, so stages must not.
_GIVEN = {"model", "reference", "calibration", "data", "examples", "progress", "resume", "rollback", "return"}
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("quantize", "method"): METHODS,
    ("sparsify", "method"): pruning.METHODS,
    ("quantize", "goal"): options.GOALS,
    ("sparsify", "goal"): options.GOALS,
    ("quantize", "observer"): tuple(OBSERVERS),
    ("sparsify", "observer"): tuple(OBSERVERS),
    ("recover", "loss"): LOSSES,
    ("fuse", "goal"): FUSE_GOALS,
    ("fuse", "attention"): ATTENTION,
}


@dataclass(frozen=True)
class Stage:
    """One pass over the model.

    Args:
        name: "quantize", "sparsify", "recover", "rotate" or "fuse".
        arguments: keyword arguments of the pass, such as ``{"scheme": "w8a8", "m": (1, 16)}``. In place of include and
            exclude, ``layers`` maps glob patterns on full module names to schemes; the first pattern that matches
            counts. For quantize a dense scheme, such as "w4a16g128"; for sparsify a sparse one, such as "sp24w8a8"; or
            "dense" to leave layers unchanged. Layers that match no pattern get ``scheme`` (or ``pattern``) if it is
            given, otherwise they stay unchanged.

    Raises:
        ValueError: the message names the argument.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in PASSES:
            raise FieldError(("pass",), f"{self.name!r} must be one of {', '.join(PASSES)}")
        hints, found = _hints(self.name), {}
        try:
            arguments = _moved.new_arguments(self.name, self.arguments)
        except TypeError as error:
            raise FieldError((), str(error)) from None
        for key, value in arguments.items():
            if key not in hints:
                raise FieldError((key,), f"is not an argument of {self.name}; its arguments are {', '.join(hints)}")
            found[key] = fit(value, hints[key], (key,))
            _check(self.name, key, found[key])
        if "layers" in found and ("include" in found or "exclude" in found):
            raise FieldError(("layers",), "cannot be combined with include or exclude")
        for key in _required(self.name) - set(found):
            if "layers" not in found:
                raise FieldError((), f"{self.name} needs {key}")
        object.__setattr__(self, "arguments", found)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data, as in a recipe file."""
        return {"pass": self.name, **{key: _plain(value) for key, value in self.arguments.items()}}


@dataclass(frozen=True)
class Recipe:
    """The passes that ``optimize`` runs, in order.

    Args:
        stages: the passes, at least one.
        seed: the random seed of the passes.
        versions: versions of packages that the recipe was made with, such as ``{"nybble": "0.1.0"}``.
        data_sha256: ``data_sha256`` of the calibration data that it was made with, or None. ``optimize`` reports
            different versions or data as notes; it does not refuse them.

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
            raise FieldError(("stages",), "must be a list of at least one stage")
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
        """A recipe with a scheme for each layer: a sparsify stage for sparse schemes, then a quantize stage for the rest.

        Args:
            schemes: full module name or glob pattern -> scheme, or "dense".
            quantize, sparsify: further arguments of the two passes.
            fields: seed, versions and data_sha256.
        """
        sparse = {name for name, scheme in schemes.items() if _is_sparse(scheme)}
        # Each stage lists all patterns, so that a layer whose first match belongs to the other stage stays unchanged.
        asked = (("sparsify", sparse, sparsify), ("quantize", schemes.keys() - sparse, quantize))
        stages = [
            Stage(kind, {"layers": {k: v if k in names else DENSE for k, v in schemes.items()}, **(more or {})})
            for kind, names, more in asked
            if names
        ]
        return cls(tuple(stages), **fields)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``. Raises ValueError that names the wrong field."""
        if not isinstance(data, Mapping):
            raise FieldError((), "must be a mapping")
        known = {"schema", *(entry.name for entry in fields(cls))}
        for key in data:
            if key not in known:
                raise FieldError((key,), f"is not a field of a recipe; the fields are {', '.join(sorted(known))}")
        if data.get("schema") != SCHEMA:
            raise FieldError(("schema",), f"must be {SCHEMA}")
        stages = data.get("stages")
        if not isinstance(stages, (list, tuple)):
            raise FieldError(("stages",), "must be a list")
        made = [_stage(stage, ("stages", i)) for i, stage in enumerate(stages)]
        return cls(made, **{key: value for key, value in data.items() if key not in ("schema", "stages")})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, as in a file: mappings, lists, strings, numbers."""
        return {
            "schema": SCHEMA,
            **{key: _plain(value) for key, value in vars(self).items() if key != "stages" and value not in ({}, None)},
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a file whose name ends in .yaml, .yml (needs PyYAML) or .json.

        Raises:
            ValueError: the file is not a valid recipe; the message names line and field.
            OSError: it cannot be read.
            ImportError: it is YAML, and PyYAML is not installed.
        """
        data, lines = read(Path(path))
        try:
            return cls.from_dict(data)
        except FieldError as error:
            raise ValueError(located(Path(path), error, lines)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe in the format given by the file name. Raises as ``load`` does."""
        write(Path(path), self.to_dict())


@cache
def _hints(name: str) -> dict[str, Any]:
    """The allowed arguments of a stage with their types: those of its pass, and layers."""
    hints = {key: hint for key, hint in get_type_hints(PASSES[name]).items() if key not in _GIVEN}
    return {**hints, "layers": Mapping[str, str]} if {"scheme", "pattern"} & set(hints) else hints


@cache
def _required(name: str) -> frozenset[str]:
    parameters = inspect.signature(PASSES[name]).parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty and p.name not in _GIVEN)


def _check(name: str, key: str, value: Any) -> None:
    """Raise FieldError if a value has the right type but is not allowed."""
    allowed = _CHOICES.get((name, key))
    if allowed is not None and value is not None and value not in allowed:
        raise FieldError((key,), f"{value!r} must be one of {', '.join(allowed)}")
    try:
        if key == "scheme" and value is not None:
            options.check_schemes(key, value)
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
        raise FieldError(("layers", layer), f"{error}; or use {DENSE!r}") from None
    if (parsed.sparsity is not None) is not (name == "sparsify"):
        raise FieldError(
            ("layers", layer), f"{scheme!r} must be a {'sparse' if name == 'sparsify' else 'dense'} scheme for {name}"
        )
    if isinstance(parsed.sparsity, Block):
        raise FieldError(
            ("layers", layer), f"{scheme!r} does not give the share of zero blocks; use pattern and include instead"
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
