"""Old import paths, names and arguments: for one release they still work, with a warning that names the new one."""

from __future__ import annotations

import inspect
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
    "bench.entrants": "bench.contestants",
    "blocks_gpu": "layouts.blocks",
    "checkpoint_files": "checkpoint.files",
    "checkpoint_index": "checkpoint.index",
    "checkpoint_model": "checkpoint.model",
    "checkpoint_tensors": "checkpoint.tensors",
    "demo.verdict": "demo.checks",
    "kernel_checks": "testing.checks",
    "layouts_gpu": "layouts.gpu",
    "monitor_statistics": "monitor.statistics",
    "monitor_watch": "monitor.watch",
    "native_cuda": "dispatch.native_cuda",
    "passes.aside": "passes.model_copy",
    "passes.digest": "model.digest",
    "passes.eligible": "model.eligible",
    "passes.layerwise.bar": "model.bar",
    "passes.layerwise.batches": "model.batches",
    "passes.layerwise.carry": "passes.layerwise.run",
    "passes.layerwise.chain": "model.chain",
    "passes.layerwise.inputs": "model.inputs",
    "passes.layerwise.judge": "passes.layerwise.errors",
    "passes.layerwise.observe": "model.observe",
    "passes.layerwise.stages": "model.stages",
    "passes.options": "model.options",
    "passes.prune.fold": "passes.prune.permuter",
    "passes.prune.shares": "passes.prune.allocate",
    "passes.round.ladder": "passes.round.methods",
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
# Package that was a module before -> the modules that have its names now.
PARTS = {
    "dispatch": ("dispatch.selection",),
    "layouts": ("layouts.packed",),
    "monitor": ("monitor.monitor",),
    "recipe": ("recipe.recipe",),
    "report": ("report.data",),
    "testing": ("testing.oracle", "testing.models", "testing.guard"),
}
# Old module and name -> new module and name, with () for what a function now returns.
NAMES = {
    "bench.entrants.Entrant": "bench.contestants:Contestant",
    "bench.entrants.Judge": "bench.contestants:Check",
    "checkpoint_model.Restore": "checkpoint.restore:Restore",
    "checkpoint_model.codes_of": "checkpoint.model:portable_specs",
    "demo.verdict.JUDGED": "demo.checks:CHECKED",
    "demo.verdict.JUDGED_SPARSE": "demo.checks:CHECKED_SPARSE",
    "demo.verdict.RIVALS": "demo.checks:PEERS",
    "layouts.ALIGNMENT": "layouts.layout:ALIGNMENT",
    "layouts.GPU": "_moved_values:gpu_layouts()",
    "layouts.IN_TORCH": "_moved_values:in_torch()",
    "layouts.MASK_OF": "_moved_values:mask_of()",
    "layouts.TILE_N": "layouts.tiles:TILE_N",
    "layouts_gpu.padded": "layouts.packed:padded",
    "layouts_gpu.sections": "layouts.packed:sections",
    "passes.aside.Aside": "passes.model_copy:ModelCopy",
    "passes.layerwise.carry.carry_out": "passes.layerwise.run:run_pass",
    "passes.layerwise.judge.judge": "passes.layerwise.errors:output_errors",
    "passes.layerwise.judge.moved": "passes.layerwise.errors:output_change",
    "passes.layerwise.judge.tensors_of": "passes.layerwise.errors:float_tensors",
    "passes.prune.fold.Folder": "passes.prune.permuter:Permuter",
    "passes.prune.shares.harm": "passes.prune.allocate:output_harm",
    "passes.prune.shares.spread": "passes.prune.allocate:allocate",
    "passes.round.ladder.LADDER": "passes.round.methods:FALLBACKS",
    "passes.sensitivity.Damage": "passes.sensitivity:Effect",
    "passes.sensitivity.result.Damage": "passes.sensitivity:Effect",
    "registry.FAMILIES": "_moved_values:dense_families()",
    "registry.FLOAT_FAMILIES": "_moved_values:float_families()",
    "registry.LEAST_ZEROS": "_moved_values:least_zeros()",
    "registry.MASKS": "_moved_values:masks()",
    "registry.Problem": "dispatch.spec:Problem",
    "registry.SPARSE_FAMILIES": "_moved_values:sparse_families()",
    "report.table": "_moved_values:text_table",
    "rounding.group_codes": "_moved_values:group_codes",
    "rounding.group_scale": "_moved_values:group_scale",
    "scheme.GROUP_SIZES": "_moved_values:group_sizes()",
    "targets.NAMES": "dispatch.targets:names()",
    "targets.TARGETS": "dispatch.targets:table()",
    "testing.checks.a_bad_row_spoils_itself_alone": "testing.checks:non_finite_rows_do_not_mix",
    "testing.checks.longest_k_at_the_extremes": "testing.checks:largest_k_does_not_overflow",
    "testing.checks.usual_codes": "testing.checks:typical_codes",
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

    def __init__(self, old: str) -> None:
        self._old = old

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _load(self._old, stacklevel=4)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has just replaced by that of the old path."""
        module.__spec__ = self._spec


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(_PREFIX)
        return ModuleSpec(fullname, _Alias(old)) if fullname.startswith(_PREFIX) and old in MOVED else None


def install() -> None:
    """Make the old paths importable. The finder is the last one, so other imports are not slower."""
    sys.meta_path.append(_Finder())


def attribute(name: str) -> ModuleType:
    """For the package's ``__getattr__``: ``nybble.scheme`` of code that only said ``import nybble``."""
    if name not in MOVED:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    return _load(name, stacklevel=5)


def old_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module from which names have gone elsewhere: those in ``PARTS`` and ``NAMES``."""
    path = module.removeprefix(_PREFIX)

    def find(name: str) -> Any:
        new = NAMES.get(f"{path}.{name}") or _in_parts(path, name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, called = new.partition(":")
        value = getattr(import_module(f"{_PREFIX}{home}"), called.removesuffix("()"))
        _warn(f"{module}.{name}", value.__doc__ if home == "_moved_values" else f"{_PREFIX}{home}.{called}")
        return value() if called.endswith("()") else value

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


def _load(old: str, stacklevel: int) -> ModuleType:
    """The module that has moved, which then finds its old names too. The warning is for that caller of ``_warn``."""
    path = f"{_PREFIX}{old}"
    _warn(path, f"{_PREFIX}{MOVED[old]}", stacklevel)
    module = import_module(f"{_PREFIX}{MOVED[old]}")
    vars(module).setdefault("__getattr__", old_names(path))
    return module


def _in_parts(package: str, name: str) -> str | None:
    """The row of ``NAMES`` of a name that is in one of the modules of a package now; None: in none."""
    for part in () if name.startswith("__") else PARTS.get(package, ()):
        if hasattr(import_module(f"{_PREFIX}{part}"), name):
            return f"{part}:{name}"
    return None


def _warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn, unless ``from package import name`` only asks whether there is such a name: it will get it next."""
    frame = inspect.currentframe()
    for _ in range(stacklevel - 1):
        frame = frame and frame.f_back
    if frame is not None and frame.f_code.co_name == "_handle_fromlist":
        return
    message = f"{old} has moved to {new}; the old path goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
