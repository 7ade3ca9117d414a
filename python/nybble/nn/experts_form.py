"""What experts with fused weights compute: proposed by their structure, proved by running them on random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import Gate, between
from ..rows import ACTIVATIONS

# Relative error up to which the formula and the module agree in float32.
_CLOSE = 1e-5
# Of the probes: large ones reach the limits of gates.
_SIZES = (0.5, 4.0)
_TOKENS = 6
# Elements between the weights of two experts of a probe, which overlap, so that they take the memory of one.
_SHIFT = 64


@dataclass(frozen=True)
class Form:
    """How experts compute: down(gate(up(x))), weighted and summed.

    up, down: names of the weights, (experts, outputs, inputs), or (experts, inputs, outputs) if transposed; those of their
    biases end in ``_bias``. gate: between the two; None: what the module's ``_apply_gate`` or ``act_fn`` computes.
    """

    up: str
    down: str
    transposed: bool
    gate: Gate | None


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module has two weights of three dimensions, and a forward of hidden states, indexes and weights."""
    held = [one for one in module._parameters.values() if one is not None]
    plain = all(type(one) is nn.Parameter for one in held)  # those of lazy modules have no dimensions yet
    if not plain or sum(one.dim() == 3 for one in held) != 2 or "forward" in vars(module):
        return False
    return len(names_of_arguments(module)) == 3


def names_of_arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward."""
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(one.name for one in arguments)


# By the structure of a module: layers of a model are alike, and are tried once.
_FORMS: dict[tuple[Any, ...], Form | str] = {}


def form_of(module: nn.Module) -> Form | str:
    """The form of experts, or why it is not known."""
    key = _structure(module)
    if isinstance(key, str):
        return key
    if key not in _FORMS:
        _FORMS[key] = _tried(module)
    return _FORMS[key]


def _structure(module: nn.Module) -> tuple[Any, ...] | str:
    held = {name: one for name, one in module._parameters.items() if one is not None}
    weights = [name for name, one in held.items() if one.dim() == 3]
    extra = [name for name in held if name not in weights and name.removesuffix("_bias") not in weights]
    extra += [name for name, _ in module.named_buffers()]
    extra += [name for name, _ in module.named_parameters() if name not in held]
    if extra:
        return f"has more than two weights and their biases: {', '.join(extra)}"
    shapes = tuple((name, tuple(one.shape)) for name, one in held.items())
    parts = tuple((name, type(one), _plain(one)) for name, one in module._modules.items())
    config = getattr(module, "config", None)
    return type(module), shapes, _plain(module), parts, getattr(config, "_experts_implementation", None)


def _plain(module: nn.Module | None) -> tuple[tuple[str, Any], ...]:
    """The attributes of a module that are numbers or words."""
    items = () if module is None else vars(module).items()
    return tuple(
        (name, value) for name, value in items if isinstance(value, (bool, int, float, str)) and name != "training"
    )


def _tried(module: nn.Module) -> Form | str:
    try:
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return _proved(module)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        return f"could not be run on random numbers: {type(error).__name__}: {error}"


def _proved(module: nn.Module) -> Form | str:
    for up, down, transposed in _orders(module):
        weights = {name: _random(one) for name, one in module._parameters.items() if one is not None}
        trial = with_parameters(module, weights)
        probes = [_Probe(trial, weights, up, down, transposed, size) for size in _SIZES]
        for gate in _gates(module, probes[0].gated):
            if all(probe.agrees(gate) for probe in probes):
                return Form(up, down, transposed, gate)
    return "its output is not that of known experts: down(act(gate) * up), weighted and summed"


def _orders(module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Readings of the two weights in which their shapes fit: names of up and down, and whether they are transposed."""
    names = [name for name, one in module._parameters.items() if one is not None and one.dim() == 3]
    for up, down in (names, names[::-1]):
        for transposed in (False, True):
            (e, *first), (count, *second) = (module._parameters[name].shape for name in (up, down))  # type: ignore[union-attr]
            (n, k), (out, inner) = ((one[::-1] if transposed else one) for one in (first, second))
            if e == count and out == k and n in (inner, 2 * inner):
                yield up, down, transposed


def _random(like: nn.Parameter) -> Tensor:
    """Weights of which those of experts differ, but lie over each other."""
    count, *size = like.shape
    length = int(torch.Size(size).numel())
    scale = 1.0 if like.dim() == 2 else min(size) ** -0.5
    held = torch.randn(length + _SHIFT * (count - 1)).mul_(scale)
    strides = [_SHIFT, *torch.empty(size, device="meta").stride()]
    return held.as_strided((count, *size), strides)


def with_parameters(module: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """A copy of a module with other parameters. All else is shared."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(vars(module))
    given: dict[str, Any] = {
        name: one if isinstance(one, nn.Parameter) else nn.Parameter(one, requires_grad=False)
        for name, one in parameters.items()
    }
    new.__dict__["_parameters"] = {**module._parameters, **given}
    return new


class _Probe:
    """An input of experts with their output, and what the products are if they are read in a certain way."""

    def __init__(
        self, trial: nn.Module, weights: dict[str, Tensor], up: str, down: str, transposed: bool, size: float
    ) -> None:
        count, *shape = weights[up].shape
        self._trial, self._weights, self._down, self._transposed = trial, weights, down, transposed
        generator = torch.Generator().manual_seed(1)
        top_k = min(2, count)
        self._index = torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(_TOKENS)])
        self._weight = torch.rand(_TOKENS, top_k, generator=generator)
        width = shape[0 if transposed else 1]
        x = torch.randn(_TOKENS, width, generator=generator) * size
        self._expected: Tensor = trial(x, self._index, self._weight)
        pairs = [(t, e) for t, row in enumerate(self._index.tolist()) for e in row]
        self._ups = torch.stack([self._product(up, e, x[t]) for t, e in pairs])
        self._experts = [e for _, e in pairs]
        self.gated = self._ups.shape[1] != weights[down].shape[1 if transposed else 2]

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = self._weights[name][expert], self._weights.get(f"{name}_bias")
        y = x @ weight if self._transposed else weight @ x
        return y if bias is None else y + bias[expert]

    def agrees(self, gate: Gate | None) -> bool:
        """Whether the experts compute this between their products."""
        inner = between_of(self._trial, gate)(self._ups)
        rows = [self._product(self._down, e, x) for e, x in zip(self._experts, inner, strict=True)]
        y = (torch.stack(rows).view(*self._weight.shape, -1) * self._weight[..., None]).sum(1)
        if y.shape != self._expected.shape:
            return False
        error = (y.double() - self._expected.double()).norm()
        return bool(error <= _CLOSE * y.double().norm())


def _gates(module: nn.Module, gated: bool) -> Iterator[Gate | None]:
    """Gates to try. A number of the module may be the limit of one."""
    limits = [0.0, *(value for _, value in _plain(module) if isinstance(value, float) and 0 < value < 1e4)]
    for act in ACTIVATIONS:
        if not gated:
            yield Gate(act, gated=False)
            continue
        for interleaved in (False, True):
            yield Gate(act, interleaved=interleaved)
            for limit in limits[1:]:
                yield from (Gate(act, interleaved=interleaved, limit=limit, other_offset=one) for one in (0.0, 1.0))
    if hasattr(module, "_apply_gate" if gated else "act_fn"):
        yield None


def between_of(module: nn.Module, gate: Gate | None) -> Any:
    """The function between the products. module: the experts, for a gate that only they know."""
    if gate is not None:
        return lambda x: between(gate, x)
    return getattr(module, "_apply_gate", None) or module.act_fn
