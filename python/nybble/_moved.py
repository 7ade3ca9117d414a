"""Old import paths and names of arguments: for one release they still work, with a warning that names the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

from .callers import outside_level

# Old module -> new one, both without "nybble.".
MOVED = {
    "activations": "weights.activations",
    "blocks_gpu": "layouts.blocks",
    "checkpoint_files": "checkpoint.files",
    "checkpoint_index": "checkpoint.index",
    "checkpoint_model": "checkpoint.model",
    "checkpoint_tensors": "checkpoint.tensors",
    "kernel_checks": "testing.checks",
    "layouts_gpu": "layouts.gpu",
    "monitor_statistics": "monitor.statistics",
    "monitor_watch": "monitor.watch",
    "native_cuda": "dispatch.native_cuda",
    "passes.digest": "model.digest",
    "passes.eligible": "model.eligible",
    "passes.layerwise.bar": "model.bar",
    "passes.layerwise.batches": "model.batches",
    "passes.layerwise.chain": "model.chain",
    "passes.layerwise.inputs": "model.inputs",
    "passes.layerwise.observe": "model.observe",
    "passes.layerwise.stages": "model.stages",
    "passes.options": "model.options",
    "passes.walk": "model.walk",
    "portable": "layouts.portable",
    "quads": "layouts.quads",
    "recipe_file": "recipe.file",
    "recipe_schema": "recipe.schema",
    "reference": "dispatch.reference",
    "registry": "dispatch.registry",
    "rounding": "weights.rounding",
    "scheme": "weights.scheme",
    "selfcheck": "dispatch.selfcheck",
    "sparsity": "weights.sparsity",
    "targets": "dispatch.targets",
}
# Function -> old keyword argument -> new one.
ARGUMENTS = {
    "recover": {"rate": "learning_rate", "end_to_end": "end_to_end_epochs"},
    "sensitivity": {"damage": "harm"},
    "plan": {"damage": "harm"},
}
_PACKAGE = __name__.rpartition(".")[0]
_PREFIX = f"{_PACKAGE}."
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Alias(Loader):
    """Loads the module at the new path when the old path is imported."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _warn(self._old, self._new)
        module = import_module(self._new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has just replaced by that of the old path."""
        module.__spec__ = self._spec


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = MOVED.get(fullname.removeprefix(_PREFIX)) if fullname.startswith(_PREFIX) else None
        return None if new is None else ModuleSpec(fullname, _Alias(fullname, f"{_PREFIX}{new}"))


def install() -> None:
    """Make the old paths importable. The finder is the last one, so other imports are not slower."""
    sys.meta_path.append(_Finder())


def attribute(name: str) -> ModuleType:
    """The package's ``__getattr__``: ``nybble.scheme`` of code that only said ``import nybble``."""
    if name not in MOVED:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    old, new = f"{_PREFIX}{name}", f"{_PREFIX}{MOVED[name]}"
    _warn(old, new)
    return import_module(new)


def names_in(*modules: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that was a module before: its names are now in ``modules`` (full dotted names)."""
    package = modules[0].rpartition(".")[0]

    def find(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            if hasattr(found := import_module(module), name):
                _warn(f"{package}.{name}", f"{module}.{name}")
                return getattr(found, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module in which ``names``, old -> new, were renamed."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(import_module(module), names[name])

    return find


def renamed_arguments(function: _Function) -> _Function:
    """Decorator: a function takes its keyword arguments under their old names in ``ARGUMENTS``, too."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **new_arguments(function.__name__, kwargs))

    return cast(_Function, call)


def new_arguments(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a function under their new names, with a warning for each old one.

    Raises:
        TypeError: an argument is given under both names.
    """
    new, found = ARGUMENTS.get(function, {}), dict(arguments)
    for old in new.keys() & found.keys():
        if new[old] in found:
            raise TypeError(f"{function}: {old} is the old name of {new[old]}; give {new[old]} alone")
        renamed_since(f"{function}({old}=)", f"{new[old]}=")
        found[new[old]] = found.pop(old)
    return found


def renamed_since(old: str, new: str) -> None:
    """Warn of an old name; the warning points to the first caller outside this package."""
    message = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=outside_level())


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} has moved to {new}; the old path goes with the next release", DeprecationWarning, stacklevel=3
    )
