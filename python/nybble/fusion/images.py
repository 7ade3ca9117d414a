"""Networks of images as programs: convolutions with what follows them in one call, and values channels_last between.

A batch norm is folded into the scales of the convolution before it; a sum and an activation are computed as its outputs
are written. The other steps are run by torch.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..bound_conv import BoundConv, BoundPool, run_calls
from ..native import Code
from ..nn.module import QuantizedModule
from ..report.speed import Speed
from .arguments import Arguments, get
from .forms import NotUnderstood
from .image_codes import Codes, codes_of, joined
from .image_graph import Graph, Step, graph_of
from .image_parts import Fold, Part, Pool, Versions, folds_of, parts_of
from .prove import here_only
from .watch import Call, tensors_of

# Largest relative errors (Frobenius norm): of a convolution with what follows it against the modules on the same input,
# by whether it is held in float32; and of the result, where a last bit of difference may move codes in all later layers.
_ALONE = {True: 1e-4, False: 2e-2}
_CODES, _FLOAT = 0.05, 1e-2
# Of a deep network: the distance of two results over that of one from a result without rounding.
_APART = 1.7


@dataclass(eq=False)
class ImageProgram:
    """A network of images as parts that run in order, and steps that torch computes. It fits calls of the same shapes.

    dtypes: in which the values of parts are held. Where activations are rounded to codes anyway, those between parts are
    bfloat16 in a network of float32, or codes, where all that read them round them alike; torch gets them in their own
    dtype.
    """

    graph: Graph
    parts: list[Part | Step]
    bound: dict[Part, BoundConv | BoundPool]
    dtypes: dict[Step, torch.dtype]
    codes: dict[Step, Codes] = field(default_factory=dict)  # of the values that are held as codes
    versions: Versions = field(init=False)
    speed: Speed | None = None
    local: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.versions = Versions(self.folds)

    @property
    def program(self) -> ImageProgram:
        """Itself: what reports ask for its steps."""
        return self

    @cached_property
    def folds(self) -> list[Fold]:
        """The convolutions."""
        return [part for part in self.bound if isinstance(part, Fold)]

    @property
    def calls(self) -> int:
        """How many calls of compiled parts a run has."""
        return sum(not isinstance(one, Step) for one in self.here().ready)

    @property
    def compiled(self) -> int:
        """How many steps are computed by compiled calls."""
        return sum(len(part.steps) for part in self.bound)

    def steps(self) -> str:
        """The steps in words."""
        counts = Counter(step.kind for step in self.graph.steps)
        return ", ".join(f"{counts[k]} {word}{'s' if counts[k] > 1 else ''}" for k, word in _WORDS.items() if counts[k])

    def alike(self) -> Any:
        """Equal for programs that take the same time."""
        shapes = tuple((step.kind, tuple(step.shape), step.dtype) for step in self.graph.steps)
        return (
            self.steps(),
            shapes,
            tuple(str(fold.module.scheme) for fold in self.folds),
        )

    @cached_property
    def inputs(self) -> list[Step]:
        """The tensors of a call."""
        return [step for step in self.graph.steps if step.kind == "input"]

    @cached_property
    def memory(self) -> tuple[dict[Part, int], list[int]]:
        """The number of the buffer that each part writes to, one that no value that is still needed lies in, and, for
        codes in a padded frame, that held only such frames; and the bytes of the buffers."""
        last_use: dict[Step, int] = {}
        for i, part in reversed(list(enumerate(self.parts))):
            for one in part.inputs:
                last_use.setdefault(one, i)
            if isinstance(part, Step) and part.aliases:  # a view: its input is needed as long as it is
                for one in part.inputs:
                    last_use[one] = max(last_use[one], last_use.get(part, len(self.parts)))
        for one in pytree.tree_leaves(self.graph.result):
            last_use[one] = len(self.parts)
        numbers: dict[Part, int] = {}
        busy: list[int] = []  # until which part each buffer is needed
        sizes: list[int] = []
        kinds: list[Any] = []
        for i, part in enumerate(self.parts):
            if isinstance(part, Step):
                continue
            step = part.last
            codes, end = self.codes.get(step), last_use.get(step, i)
            size = codes.nbytes(step.shape) if codes else step.shape.numel() * self.dtypes[step].itemsize
            kind = (codes.frame(step.shape), codes.pad, codes.zero) if codes and any(codes.pad) else None
            free = [n for n, until in enumerate(busy) if until < i and kinds[n] == kind]
            number = min(free, key=lambda n: abs(sizes[n] - size), default=len(busy))
            if number == len(busy):
                busy.append(end)
                sizes.append(size)
                kinds.append(kind)
            busy[number], sizes[number] = end, max(sizes[number], size)
            numbers[part] = number
        return numbers, sizes

    def here(self) -> Here:
        """What this thread runs the program with."""
        found: Here | None = getattr(self.local, "here", None)
        if found is None:
            with torch.inference_mode(False):
                found = self.local.here = Here(*self.memory, self.dtypes, self.codes)
            ready: list[Any] = []
            for part in self.parts:
                last = ready[-1] if ready and isinstance(ready[-1], list) else None
                if isinstance(part, Step) or not found.holds(part):
                    ready.append(part)
                    continue
                if last is None:
                    ready.append(last := [])
                last.append(self.call_of(part, found))
            found.ready = ready
        return found

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], check: bool = False) -> Any:
        """The result of a call; NotImplemented for one that the program does not fit. check: each part is compared with
        the modules that it replaces."""
        if self.versions.differ():
            return NotImplemented
        here = self.here()
        values = dict(here.values)
        for step in self.inputs:
            value = values[step] = get(step.what, args, kwargs)
            if value.shape != step.shape or value.dtype is not step.dtype or value.device.type != "cpu":
                return NotImplemented
        for part in self.parts if check else here.ready:
            if isinstance(part, list):
                run_calls(part)
            elif isinstance(part, Step):
                values[part] = part.compute({one: values[one].to(one.dtype) for one in part.inputs})
            else:
                self.one(part, values, here)
                if check:
                    self.check(part, values)

        def own(step: Step) -> Tensor:
            value = values[step]
            shared = value.untyped_storage().data_ptr() in here.owned
            return value.contiguous().clone() if shared else value

        return pytree.tree_map_only(Step, own, self.graph.result)

    def call_of(self, part: Part, here: Here) -> Any:
        """The call of a part that reads no torch tensors."""
        added = None if part.added is None else here.values[part.added]
        held = (here.values[part.x], here.values[part.last], added)
        call = self.bound[part].call(*held, (here.ranges[part.x], here.ranges[part.last]), self.codes_of(part))
        if part.more is not None:
            x = part.more.x
            codes = (self.codes[x].native, self.codes[part.last].native, None)
            ranges = (here.ranges[x], here.ranges[part.last])
            call.add(self.bound[part.more].call(here.values[x], here.values[part.last], None, ranges, codes))
        return call

    def codes_of(self, part: Part) -> tuple[Code, Code, Code]:
        """As BoundConv.call takes them."""
        found = [self.codes.get(step) for step in (part.x, part.last, part.added) if step is not None]
        native = [codes.native if codes else None for codes in found]
        return native[0], native[1], native[2] if len(native) > 2 else None

    def check(self, part: Part, values: dict[Step, Tensor]) -> None:
        """Compares what a part wrote with what the modules compute.

        Raises:
            NotUnderstood: they differ.
        """
        seen = {
            step: self.codes[step].read(values[step], step.shape) if step in self.codes else values[step]
            for step in (*part.inputs, part.last)
        }
        expected, codes = part.reference(seen, part.x in self.codes), self.codes.get(part.last)
        _check(seen[part.last], codes.rounded(expected) if codes else expected, self.dtypes[part.last])

    def one(self, part: Part, values: dict[Step, Tensor], here: Here) -> None:
        """Runs one part."""
        if part.more is not None:
            return run_calls([self.call_of(part, here)])
        residual = None if part.added is None else values[part.added]
        ranges = here.ranges.get(part.x), here.ranges[part.last]
        self.bound[part](values[part.x], values[part.last], residual, ranges, self.codes_of(part))


_WORDS = {
    "conv": "convolution",
    "norm": "batch norm",
    "sum": "sum",
    "act": "activation",
    "pool": "pool",
    "call": "torch call",
}


class Here:
    """The outputs of parts, channels_last, and their ranges; some share memory. ``ready``: the parts of a program, those
    in a row that read and write nothing else as a list of calls."""

    def __init__(
        self,
        numbers: dict[Part, int],
        sizes: list[int],
        dtypes: dict[Step, torch.dtype],
        codes: dict[Step, Codes],
    ) -> None:
        held = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.owned = {one.untyped_storage().data_ptr() for one in held}
        self.values: dict[Step, Tensor] = {}
        self.ranges: dict[Step, Tensor | None] = {part.last: torch.empty(part.last.shape[0], 3) for part in numbers}
        self.ready: list[Any] = []
        for part, number in numbers.items():
            if part.last in codes:
                frame = self.values[part.last] = held[number][: codes[part.last].nbytes(part.last.shape)]
                frame.fill_(128 + codes[part.last].zero)  # only pixels of the image are ever written
                continue
            batch, channels, *size = part.last.shape
            flat = held[number].view(dtypes[part.last])[: part.last.shape.numel()]
            self.values[part.last] = flat.view(batch, *size, channels).movedim(-1, 1)

    def holds(self, part: Part) -> bool:
        """Whether a part reads nothing else, and adds a value of its own dtype."""
        if part.added is not None and part.added in self.values:
            kinds = {self.values[one].dtype for one in (part.added, part.last)}
            return (len(kinds) == 1 or torch.uint8 in kinds) and part.x in self.values
        return part.added is None and part.x in self.values


def _check(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = _error(out, expected)
    if not error <= _ALONE[dtype is torch.float32]:
        raise NotUnderstood(f"a convolution with what follows it is off by {error:.2g}")


def _error(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def understand_images(call: Call, before: Arguments, own: Callable[..., Any]) -> ImageProgram:
    """The program of a watched call, proved: each convolution against the modules that it replaces, on the arguments and on
    others, and the result against the module's own.

    Raises:
        NotUnderstood: it is not in the vocabulary, or differs.
    """
    graph = graph_of(call)
    folds = folds_of(graph)
    if not folds:
        raise NotUnderstood("it has no quantized convolution")
    parts = parts_of(graph, folds)
    compiled = [part for part in parts if not isinstance(part, Step)]
    rounding = [fold.module.scheme.act_type.quantized for fold in folds]
    bound = {part: part.bind() for part in compiled}
    codes = codes_of(parts, bound, pytree.tree_leaves(graph.result))
    parts = joined(parts, bound, codes)
    dtypes = _dtypes(graph, compiled, all(rounding)) | dict.fromkeys(codes, torch.uint8)
    program = ImageProgram(graph, parts, bound, dtypes, codes)
    for given in (before, _others(before)):
        found = tensors_of(program.run(*given, check=True))
        expected = tensors_of(own(*given[0], **given[1]))
        most = _FLOAT
        if any(rounding):
            with _in_float(call.module):
                exact = tensors_of(own(*given[0], **given[1]))
            most = max(_CODES, _APART * _largest(expected, exact))
        error = _largest(found, expected)
        if not error <= most:
            raise NotUnderstood(f"the program that was found computes something else: off by {error:.2g}")
    return program


def _largest(values: list[Tensor], expected: list[Tensor]) -> float:
    return max(_error(one, other) for one, other in zip(values, expected, strict=True))


@contextmanager
def _in_float(model: nn.Module) -> Iterator[None]:
    """Within it, quantized layers compute with their rounded weights in float, in this thread."""
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, QuantizedModule) and "forward" not in vars(layer):
                layer.forward = here_only(layer, layer.dequantize().forward)
                stack.callback(vars(layer).pop, "forward")
        yield


def _dtypes(graph: Graph, parts: list[Part], rounds: bool) -> dict[Step, torch.dtype]:
    """In which dtype the value of each part is held."""
    results = pytree.tree_leaves(graph.result)
    found: dict[Step, torch.dtype] = {}
    for part in parts:
        step = part.last
        narrow = rounds and step.dtype is torch.float32 and not any(step is one for one in results)
        found[step] = found[part.x] if isinstance(part, Pool) else torch.bfloat16 if narrow else step.dtype
    return found


def _others(given: Arguments) -> Arguments:
    """Arguments with other values in the images."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        return value.flip(-1) + 0.3 * value.float().std().nan_to_num().to(value) * noise

    args, kwargs = pytree.tree_map_only(Tensor, other, given)
    return args, kwargs
