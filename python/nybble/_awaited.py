"""Tells other libraries of nybble as soon as both are imported, in whichever order.

They have tables of their own, and no entry points for them. So that ``import nybble`` neither imports these libraries nor has
to come second, it leaves finders that wait for one module of each, and then go away.
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
# The module that is awaited -> nybble's module whose `register` is called then.
_AWAITED = {
    # Every model of transformers needs it, and it imports the tables.
    "transformers.modeling_utils": "hf.register",
    # The styles of torch's tensor parallelism.
    "torch.distributed.tensor.parallel": "parallel.register",
}


def register_with_others() -> None:
    """Register now with what is imported, and with the others when they will be."""
    for awaited in _AWAITED:
        if awaited in sys.modules:
            _register(awaited)
        else:
            sys.meta_path.insert(0, _Waiting(awaited))


def _register(awaited: str) -> None:
    import_module(f"{_PACKAGE}.{_AWAITED[awaited]}").register()


class _Waiting(MetaPathFinder):
    """Finds no module itself; that which it waits for gets one more step after its own code has run."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        own = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            own(module)
            _register(self.awaited)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
