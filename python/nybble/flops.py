"""How many floating-point operations torch's FlopCounterMode counts for each op of this package.

They are those of the dense op that it stands for: 2 M N K of a product, whatever its weight's codes and zeros. Lookups,
norms and activations count as 0, as torch counts them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def _linear(x: _Shape, packed: _Shape, bias: Any, scheme: str, layout: str, n: int, k: int, **_: Any) -> int:
    return 2 * prod(x[:-1]) * n * k


def _linear_part(
    x: _Shape, packed: _Shape, bias: Any, scheme: str, layout: str, n: int, k: int, begin: int, end: int, **_: Any
) -> int:
    return 2 * prod(x[:-1]) * (end - begin) * k


def _linears(
    x: _Shape, packed: Any, bias: Any, scheme: Any, layout: Any, out: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * prod(x) * sum(out)


def _conv(x: _Shape, *rest: Any, out_shape: _Shape, **_: Any) -> int:
    kernel_size, groups = rest[5], rest[9]
    count: int = 2 * prod(out_shape) * (x[1] // groups) * prod(kernel_size)
    return count


def _attention(q: _Shape, k: _Shape, v: _Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


def _experts(x: _Shape, index: _Shape, *rest: Any, **_: Any) -> int:
    (up_out, up_in), (down_out, down_in) = rest[5:7], rest[11:13]
    count: int = 2 * prod(index) * (up_out * up_in + down_out * down_in)
    return count


def _recurrent(gates: int, x: _Shape, sizes: Any, h: _Shape, scheme: Sequence[str]) -> int:
    directions, units = h[0], h[2]
    inputs = x[-1] if scheme[0] else 0  # else x are the products with them
    return 2 * prod(x[:-1]) * directions * gates * units * (inputs + units)


def _lstm(x: _Shape, sizes: Any, h: _Shape, c: _Shape, packed: Any, bias: Any, scheme: Any, *_: Any, **__: Any) -> int:
    return _recurrent(4, x, sizes, h, scheme)


def _gru(x: _Shape, sizes: Any, h: _Shape, packed: Any, bias: Any, scheme: Any, *_: Any, **__: Any) -> int:
    return _recurrent(3, x, sizes, h, scheme)


# Op -> of its arguments, tensors as shapes, to operations.
FORMULAS: dict[str, Callable[..., int]] = {
    "linear": _linear,
    "linear_part": _linear_part,
    "linears": _linears,
    "conv": _conv,
    "attention": _attention,
    "experts": _experts,
    "lstm": _lstm,
    "gru": _gru,
}


_defined: list[str] = []  # ops that the counter shall know once it is imported


def register(name: str) -> None:
    """Tells torch the formula of the op ``nybble::name``: now if its counter is imported, else when it will be."""
    _defined.append(name)
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _tell(counter, name)


def _tell(counter: ModuleType, name: str) -> None:
    counter.register_flop_formula(getattr(torch.ops.nybble, name))(FORMULAS[name])


class _WhenImported(MetaPathFinder):
    """Waits for the import of torch's counter, once: it takes too long to import it with nybble."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As importlib's finders; None for every other module."""
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for name in _defined:
                _tell(module, name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WhenImported())
