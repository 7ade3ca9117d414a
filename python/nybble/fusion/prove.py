"""Proof that a chain is understood, and that its compiled form computes it: by running both, on inputs that it was not
found from."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.eligible import dense_weight
from ..nn.module import QuantizedModule
from .arguments import Arguments, copied, get, replaced
from .forms import NotUnderstood
from .lower import Int8Attention, Lowered
from .nodes import Attend, Path
from .program import Program
from .recognize import close
from .watch import caches_in, tensors_of

# Largest relative errors (Frobenius norm) of the compiled form against torch with the same layers. Where activations are
# rounded, a last bit of difference before can move a code by one step: then at most this much for 8 bits.
_FLOAT, _CODES = 1e-4, 0.02
# Largest relative error of a module's results for attention in 8 bits.
MOST_INT8 = 0.1
# Of a deep chain: the distance of two results over that of one from a result without rounding, 2 ** 0.5 and some more.
_APART = 1.7


def prove(program: Program, lowered: Lowered, before: Arguments, own: Callable[..., Any]) -> None:
    """Runs the module's own forward, the reference of the chain and its compiled form on the call's arguments and on
    others like them, and compares.

    Raises:
        NotUnderstood: they differ.
    """
    for given in _inputs(program, before):
        with _simple(program.layers), _identical(program.modules):
            expected = tensors_of(own(*copied(*given)[0], **copied(*given)[1]))
            exact = tensors_of(program.reference(*copied(*given)))
        if not _all(close, exact, expected):
            raise NotUnderstood(
                f"the chain that was found computes something else: off by {_error(exact, expected):.2g}"
            )
        with _identical(program.modules):
            rounded = tensors_of(program.reference(*copied(*given)))
            native = tensors_of(lowered.run(*copied(*given)))
            if [one.shape for one in native] != [one.shape for one in rounded]:
                raise NotUnderstood("its compiled form gives other shapes")
            _check_native(_error(native, rounded), rounded, program, given)


def try_int8(program: Program, lowered: Lowered, before: Arguments) -> None:
    """Lets the chain attend in 8 bits and notes in it what that changes; where it changes more than MOST_INT8, or more
    than rounding explains, the chain goes on in floats."""
    if not any(isinstance(node, Attend) for node in program.explanation.nodes):
        return
    errors, cosines, bound = [], [], MOST_INT8
    for given in _inputs(program, before):
        with _identical(program.modules):
            lowered.attend_in_int8(False)
            exact = tensors_of(lowered.run(*copied(*given)))
            lowered.attend_in_int8(True)
            rounded = tensors_of(lowered.run(*copied(*given)))
        errors.append(_error(rounded, exact))
        cosines += [_cosine(a, b) for a, b in zip(rounded, exact, strict=True)]
    error, left = max(errors), None
    if error > bound:
        lowered.attend_in_int8(False)
        left = f"attention in 8 bits changes its results by {error:.2g}, more than {bound:.2g}"
    lowered.int8 = Int8Attention(error, min(cosines), left)


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    return float(x @ y / (x.norm() * y.norm()).clamp_min(1e-30))


def _inputs(program: Program, before: Arguments) -> tuple[Arguments, ...]:
    """The arguments of a call and others like them."""
    hidden = program.explanation.hidden
    return before, _others(before, hidden), *_lengths(before, hidden)


def _check_native(error: float, rounded: list[Tensor], program: Program, given: Arguments) -> None:
    """Raises NotUnderstood if the compiled form is further from torch than rounding explains.

    Where activations are rounded, a last bit of difference moves some codes by one, which moves more of them in later
    layers: two results of a deep chain are as far apart as each is from one without rounding.
    """
    bound = max(_FLOAT, 4 * max(torch.finfo(one.dtype).eps for one in rounded), _rounding(program))
    if error > bound and _rounding(program) > 0:
        with _dense(program.layers):
            bound = max(bound, _APART * _error(rounded, tensors_of(program.reference(*copied(*given)))))
    if error > bound:
        raise NotUnderstood(f"its compiled form is off by {error:.2g}, more than {bound:.2g}")


def _rounding(program: Program) -> float:
    """How far apart two results may be whose activations are rounded after small differences; 0 if none are."""
    acts = [layer.scheme.act_type for layer in program.layers if isinstance(layer, QuantizedModule)]
    return max((_CODES * 255 / act.steps for act in acts if act.quantized), default=0.0)


def _all(test: Callable[[Tensor, Tensor], bool], values: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = list(zip(values, expected, strict=False))
    return len(values) == len(expected) and all(a.shape == b.shape and test(a, b) for a, b in pairs)


def _error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error; infinite for NaN."""
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        for a, b in zip(values, expected, strict=True)
    ]
    return max(float("inf") if math.isnan(one) else one for one in errors)


def _others(given: Arguments, hidden: Path) -> Arguments:
    """Arguments with other tokens: those of the call in reverse order, hidden states with some noise."""
    found: Tensor = get(hidden, *given)
    if not found.is_floating_point():
        return _swapped(given, found, found.flip(-1))
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found)
    return _swapped(given, found, found.flip(-2) + 0.3 * found.float().std().to(found) * noise)


def _lengths(given: Arguments, hidden: Path) -> list[Arguments]:
    """Arguments of other lengths, where nothing but the hidden states has one."""
    found: Tensor = get(hidden, *given)
    alone = len(tensors_of(given)) == 1 and found.is_floating_point()
    if not alone or any(any(caches_in(one)) for one in (*given[0], *given[1].values())):
        return []
    return [_swapped(given, found, found[..., :1, :]), _swapped(given, found, torch.cat([found] * 5, -2))]


def _swapped(given: Arguments, old: Tensor, new: Tensor) -> Arguments:
    """The arguments with one tensor in place of another."""

    def swap(value: Any) -> Any:
        if value is old:
            return new
        return type(value)(swap(one) for one in value) if type(value) in (tuple, list) else value

    return replaced(*given, swap)


@contextmanager
def _dense(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, quantized layers compute with their rounded weights in float."""
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, QuantizedModule):
                layer.forward = here_only(layer, partial(_in_float, layer))
                stack.callback(vars(layer).pop, "forward")
        yield


def here_only(layer: nn.Module, instead: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that differs in this thread only: others may call the layer meanwhile."""
    owner, own = threading.get_ident(), type(layer).forward.__get__(layer)
    return lambda *args: instead(*args) if threading.get_ident() == owner else own(*args)


def _in_float(layer: QuantizedModule, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.dequantized_weight().to(x.dtype), layer.bias)


@contextmanager
def _simple(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, Linear layers compute a simple function in float in place of their own, so that neither rounding of
    activations enlarges small differences nor weights are dequantized. The chain must fit whatever its layers compute."""
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            n, k = dense_weight(layer).shape
            layer.forward = here_only(layer, partial(_mix, *_mixing(n, k, number)))
            stack.callback(vars(layer).pop, "forward")
        yield


@contextmanager
def _identical(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, modules that run by their own forward return a fixed function of their input: a router of experts would
    choose others after the smallest difference."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            module.forward = here_only(module, partial(_turned, number))
            stack.callback(vars(module).pop, "forward")
        yield


def _turned(number: int, x: Tensor) -> Tensor:
    """x with its columns in another order, times a number."""
    return x.roll(number + 1, -1) * 0.75


def _mixing(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(k, (n,), generator=draw), torch.randn(n, generator=draw)


def _mix(inputs: Tensor, factors: Tensor, x: Tensor) -> Tensor:
    """Each output is an input times a factor, plus a tenth of the factor."""
    factors = factors.to(x)
    return x[..., inputs.to(x.device)] * factors + factors / 10
