"""Tells transformers of nybble's quantization method as soon as both are imported, in whichever order.

transformers has tables of quantization methods, and no entry points for them. So that ``import nybble`` neither imports
transformers nor has to come second, it leaves a finder that waits for one module of transformers, and then goes away.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]
# Every model of transformers needs it, and it imports the tables.
_AWAITED = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now if transformers is imported, else when it will be."""
    if _AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    """Modules may be imported for the first time where the caller makes a model on the meta device: their own tensors are real."""
    with import_module("torch").device("cpu"):
        import_module(f"{_PACKAGE}.hf.register").register()


class _Waiting(MetaPathFinder):
    """Finds no module itself; that which it waits for gets one more step after its own code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        own = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            own(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
