"""What a network of images computes: the graph of a watched call, from its arguments to its result.

A step is a module or a torch function that is called again as it was, or one of those that a convolution computes along
with its product: a batch norm, a sum, an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from ..nn.conv import ConvModule
from .arguments import leaves_of
from .forms import NotUnderstood
from .watch import MODULE, Call, Event, tensors_of

Key = tuple[int, torch.Size, tuple[int, ...]]


@dataclass(frozen=True)
class Act:
    """An activation: the name that a convolution knows it by, the most that it gives, and the torch function."""

    name: str
    most: float
    function: Callable[[Tensor], Tensor]


RELU = Act("relu", float("inf"), functional.relu)
RELU6 = Act("relu", 6.0, functional.relu6)
SILU = Act("silu", float("inf"), functional.silu)
_MODULES: dict[type[nn.Module], Act] = {nn.ReLU: RELU, nn.ReLU6: RELU6, nn.SiLU: SILU}
_FUNCTIONS = {"relu": RELU, "relu_": RELU, "relu6": RELU6, "silu": SILU}
_SUMS = {"add", "__add__", "__iadd__", "add_"}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# What the strides of a tensor decide.
_STRIDES = {
    "as_strided",
    "stride",
    "is_contiguous",
    "storage_offset",
    "set_",
    "data_ptr",
}


@dataclass(eq=False)
class Step:
    """A value: ``what`` computes it from ``inputs``. ``kind``: input, conv, norm, sum, act, pool or call.

    what: a Path, a module, an Act, or a torch function; args and kwargs of a call hold Steps in place of tensors.
    """

    kind: str
    inputs: tuple[Step, ...]
    what: Any
    shape: torch.Size
    dtype: torch.dtype
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    aliases: bool = False  # whether its memory may be that of an input
    nested: bool = True  # whether there may be Steps inside args, or in kwargs

    def compute(self, values: dict[Step, Tensor]) -> Tensor:
        """The value in torch."""
        if self.kind == "sum":
            return values[self.inputs[0]] + values[self.inputs[1]]
        if self.kind == "act":
            y: Tensor = self.what.function(values[self.inputs[0]])
            return y
        if self.kind == "call":
            args, kwargs = self.args, self.kwargs
            if self.nested:
                args, kwargs = pytree.tree_map_only(Step, values.__getitem__, (args, kwargs))
            else:
                args = tuple([values[one] if type(one) is Step else one for one in args])
            found: Tensor = self.what(*args, **kwargs)
            return found
        y = self.what(values[self.inputs[0]])
        return y


@dataclass
class Graph:
    """The steps in their order, and the structure of the result with Steps in place of tensors."""

    steps: list[Step]
    result: Any


def is_of_images(call: Call) -> bool:
    """Whether the first float tensor of a call's arguments is a batch of images, and the module a network of quantized
    convolutions: a vision transformer has only one."""
    floats = [one for one in tensors_of((call.args, call.kwargs)) if one.is_floating_point()]
    convolutions = [one for one in call.module.modules() if isinstance(one, ConvModule)]
    return bool(floats) and floats[0].dim() == 4 and len(convolutions) > 1


def graph_of(call: Call) -> Graph:
    """What a watched call computes. Raises NotUnderstood."""
    if call.looks:
        raise NotUnderstood(f"what it computes depends on values ({call.looks[0][1]})")
    return _Tracer(call).graph()


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class _Tracer:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.steps: list[Step] = []
        self.known: dict[Key, Step] = {}
        self.kept = {id(one) for one in (*call.module.parameters(), *call.module.buffers())}
        self.given: set[int] = set()  # memory of the arguments
        for path, leaf in leaves_of(call.args, call.kwargs):
            if isinstance(leaf, Tensor):
                if not leaf.is_floating_point() or leaf.device.type != "cpu" or not leaf.numel():
                    raise NotUnderstood("it is called with tensors other than floats on the CPU")
                self.put(leaf, Step("input", (), path, leaf.shape, leaf.dtype))
                self.given.add(leaf.untyped_storage().data_ptr())

    def graph(self) -> Graph:
        covered: set[int] = set()
        for event in self.call.events:
            if event.name == MODULE and len(event.args) == 1 and not event.kwargs:
                covered.update(range(event.first, event.number))
        for event in self.call.events:
            if event.number not in covered and event.name not in (
                "container",
                "detach",
            ):
                self.event(event)

        def part(value: Tensor) -> Step:
            return self.of(value)

        result = self.call.result
        if not isinstance(result, Tensor) and type(result) not in (tuple, list):
            raise NotUnderstood(f"it returns a {type(result).__name__}")
        return Graph(self.steps, pytree.tree_map_only(Tensor, part, result))

    def put(self, tensor: Tensor, step: Step) -> None:
        self.steps.append(step)
        self.known[_key(tensor)] = step

    def of(self, tensor: Tensor) -> Step:
        found = self.known.get(_key(tensor))
        if found is None or found.shape != tensor.shape:
            raise NotUnderstood(f"a value of shape {tuple(tensor.shape)} is computed by something that was not seen")
        return found

    def event(self, event: Event) -> None:
        if event.name == "cache":
            raise NotUnderstood("it updates a cache")
        (out, *more) = event.outputs
        if more:
            raise NotUnderstood(f"{event.name} gives several tensors")
        step = self.module(event, out) if event.name == MODULE else self.function(event, out)
        if step is None:
            return
        if any(out is one for one in tensors_of((event.args, event.kwargs))):
            self.forget(out)
        self.put(out, step)

    def forget(self, out: Tensor) -> None:
        """What is known of memory that a function changes in place."""
        storage = out.untyped_storage()
        if storage.data_ptr() in self.given or id(out) in self.kept:
            raise NotUnderstood("it changes an argument or a parameter in place")
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.known = {key: step for key, step in self.known.items() if not begin <= key[0] < end}

    def module(self, event: Event, out: Tensor) -> Step | None:
        what = event.what
        if len(event.args) != 1 or event.kwargs or not isinstance(event.args[0], Tensor):
            return None  # the functions inside it were seen
        x = event.args[0]
        if isinstance(what, _NOTHING):
            self.known[_key(out)] = self.of(x)
            return None
        kind, held = "call", what
        if isinstance(what, ConvModule) and len(what.kernel_size) == 2 and x.dim() == 4 and not what._padded_first:
            kind = "conv"
        elif type(what) in _NORMS and what.running_mean is not None:
            kind = "norm"
        elif is_pool(what, x):
            kind = "pool"
        elif type(what) in _MODULES:
            kind, held = "act", _MODULES[type(what)]
        elif out is x:
            raise NotUnderstood(f"{type(what).__name__} changes its input in place")
        inputs = (self.of(x),)
        args = inputs if kind == "call" else ()
        return Step(
            kind,
            inputs,
            held,
            out.shape,
            out.dtype,
            args,
            {},
            _shares(out, x),
            nested=False,
        )

    def function(self, event: Event, out: Tensor) -> Step:
        tensors = [one for one in tensors_of((event.args, event.kwargs)) if id(one) not in self.kept]
        inplace = event.name.endswith("_") and not event.name.endswith("__")
        if event.name in _FUNCTIONS and not set(event.kwargs) - {"inplace"}:
            return Step(
                "act",
                (self.of(tensors[0]),),
                _FUNCTIONS[event.name],
                out.shape,
                out.dtype,
            )
        alike = len(tensors) == 2 == len(event.args) and not event.kwargs
        if event.name in _SUMS and alike and all(one.shape == out.shape and one.dtype is out.dtype for one in tensors):
            return Step(
                "sum",
                (self.of(tensors[0]), self.of(tensors[1])),
                "sum",
                out.shape,
                out.dtype,
            )
        if inplace or event.name in _STRIDES or (event.name.startswith("__i") and event.name != "__invert__"):
            raise NotUnderstood(f"it changes a tensor in place, or looks at its memory ({event.name})")
        if not tensors:
            raise NotUnderstood(f"{event.name} makes a tensor from no other")

        def held(value: Tensor) -> Any:
            return value if id(value) in self.kept else self.of(value)

        args, kwargs = pytree.tree_map_only(Tensor, held, (tuple(event.args), dict(event.kwargs)))
        inputs = tuple(dict.fromkeys(self.of(one) for one in tensors))
        what = torch.reshape if event.name == "view" and _plain(args) else event.what
        if what is torch.reshape:
            args = (args[0], args[1:] if isinstance(args[1], int) else args[1])
        aliases = any(_shares(out, one) for one in tensors)
        apart = {id(one) for one in args if isinstance(one, Step)}
        nested = any(id(one) not in apart for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Step))
        nested = nested or any(isinstance(one, Step) for one in pytree.tree_leaves(kwargs))
        return Step("call", inputs, what, out.shape, out.dtype, args, kwargs, aliases, nested)


def is_pool(module: nn.Module, x: Tensor) -> bool:
    """Whether a module is the largest of windows, or the mean of a whole image."""
    if x.dim() != 4:
        return False
    if type(module) is nn.MaxPool2d:
        return not module.ceil_mode and not module.return_indices and module.dilation in (1, (1, 1))
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether these are the arguments of Tensor.view that are a shape: channels_last values have no such view."""
    return len(args) > 1 and not isinstance(args[1], torch.dtype)


def _shares(out: Tensor, x: Tensor) -> bool:
    return out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
