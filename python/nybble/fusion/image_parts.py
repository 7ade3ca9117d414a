"""The parts of a network of images that compiled calls compute: convolutions with what follows them, and pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..bound_conv import BoundConv, BoundPool
from ..conv import Epilogue, Geometry
from ..nn.conv import ConvModule
from ..weights.form import USUAL
from .image_graph import Act, Graph, Step
from .versions import version_of

_Held = Mapping[str, Tensor | None]


@dataclass(eq=False)
class Fold:
    """A convolution and the steps after it that it computes; ``last`` is the value that is written."""

    conv: Step
    norm: Step | None = None
    total: Step | None = None
    residual: Step | None = None
    act: Step | None = None
    more: Fold | None = None  # computes the residual in the same call

    @property
    def last(self) -> Step:
        return self.act or self.total or self.norm or self.conv

    @property
    def x(self) -> Step:
        """What it convolves."""
        return self.conv.inputs[0]

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The values that it reads."""
        if self.more is not None:
            return self.x, self.more.x
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def added(self) -> Step | None:
        """The value that it reads and adds."""
        return None if self.more is not None else self.residual

    @property
    def steps(self) -> list[Step]:
        """The steps that it computes."""
        return [one for one in (self.conv, self.norm, self.total, self.act) if one is not None]

    @cached_property
    def module(self) -> ConvModule:
        held: ConvModule = self.conv.what
        return held

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """The batch norm as factors and shifts of channels, float32."""
        if self.norm is None:
            return None
        norm = self.norm.what
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        factor = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        shift = -mean * factor
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        return factor.float(), shift.float()

    def bind(self) -> BoundConv:
        """The convolution, ready to run."""
        act: Act | None = self.act.what if self.act is not None else None
        epilogue = Epilogue(None, act.name, act.most) if act is not None else Epilogue()
        module = self.module
        packed, layout = module._pack()
        bias = module._parameters["bias"]
        x, scheme = self.x, module._scheme_name
        return BoundConv(
            packed,
            bias,
            scheme,
            layout,
            module.out_features,
            module._geometry,
            x.shape,
            x.dtype,
            epilogue,
            self.affine(),
        )

    def reference(self, values: dict[Step, Tensor], rounded: bool) -> Tensor:
        """What it computes, by the modules themselves. rounded: the input is what codes hold, so the convolution is
        that of the rounded weight in float."""
        found = {one: values[one].to(one.dtype) for one in self.inputs}
        if self.more is not None:
            found[self.more.last] = self.more.reference(values, rounded)
        for step in self.steps:
            if rounded and step is self.conv:
                found[step] = self.module.dequantize()(found[self.x])
            else:
                found[step] = step.compute(found)
        return found[self.last]

    def places(self) -> list[tuple[_Held, str]]:
        """Where the tensors are held that the bound convolution was made of."""
        found: list[tuple[_Held, str]] = [(self.module._buffers, "packed"), (self.module._parameters, "bias")]
        if self.norm is not None:
            buffers, parameters = self.norm.what._buffers, self.norm.what._parameters
            found += [(buffers, "running_mean"), (buffers, "running_var"), (parameters, "weight"), (parameters, "bias")]
        return found


@dataclass(eq=False)
class Pool:
    """A pool of a value that a convolution or a pool writes."""

    last: Step
    added: None = None
    more: None = None

    @property
    def x(self) -> Step:
        """What it reads."""
        return self.last.inputs[0]

    @property
    def inputs(self) -> tuple[Step, ...]:
        """As Fold.inputs."""
        return self.last.inputs

    @property
    def steps(self) -> list[Step]:
        """As Fold.steps."""
        return [self.last]

    def bind(self) -> BoundPool:
        """The pool, ready to run."""
        pool, size = self.last.what, tuple(self.x.shape[2:])
        if isinstance(pool, nn.AdaptiveAvgPool2d):
            return BoundPool("mean", Geometry(size, size, (0, 0), (1, 1), 1), self.x.shape)
        kernel_size, stride, padding = (
            one if isinstance(one, tuple) else (one, one) for one in (pool.kernel_size, pool.stride, pool.padding)
        )
        return BoundPool("max", Geometry(kernel_size, stride, padding, (1, 1), 1), self.x.shape)

    def reference(self, values: dict[Step, Tensor], rounded: bool) -> Tensor:
        """As Fold.reference."""
        return self.last.compute({self.x: values[self.x].to(self.x.dtype)})


class Versions:
    """The tensors that convolutions were bound with, as they were."""

    def __init__(self, folds: list[Fold]) -> None:
        places = [place for fold in folds for place in fold.places()]
        self.noted = [(held, name, held.get(name), _state(held.get(name))) for held, name in places]

    def differ(self) -> bool:
        """Whether one of them is another now, was written to, or lies elsewhere."""
        return any(held.get(name) is not tensor or _state(tensor) != state for held, name, tensor, state in self.noted)


def _state(tensor: Tensor | None) -> tuple[int, int | None] | None:
    return None if tensor is None else (tensor.data_ptr(), version_of(tensor))


def _has_a_scale_a_row(held: ConvModule) -> bool:
    """Whether a norm may take the place of its scales."""
    scheme = held.scheme
    return scheme.weight_bits == 8 and scheme.group_size is None and scheme.symmetric and held.form == USUAL


def folds_of(graph: Graph) -> list[Fold]:
    """The convolutions of a graph, with what each computes."""
    users: dict[Step, list[Step | None]] = {step: [] for step in graph.steps}
    for step in graph.steps:
        for one in step.inputs:
            users[one].append(step)
    for one in pytree.tree_leaves(graph.result):
        if isinstance(one, Step):
            users[one].append(None)
    order = {step: i for i, step in enumerate(graph.steps)}
    claimed: set[Step] = set()
    found = []
    for conv in graph.steps:
        if conv.kind != "conv":
            continue
        fold = Fold(conv)
        while (user := users[fold.last][0] if len(users[fold.last]) == 1 else None) is not None and user not in claimed:
            if user.kind == "norm" and fold.last is conv and _has_a_scale_a_row(conv.what):
                fold.norm = user
            elif (
                user.kind == "sum" and fold.total is None and fold.act is None and user.inputs[0] is not user.inputs[1]
            ):
                fold.total = user
                fold.residual = user.inputs[1] if user.inputs[0] is (fold.norm or conv) else user.inputs[0]
            elif user.kind == "act" and fold.act is None:
                fold.act = user
            else:
                break
            claimed.add(user)
        found.append(fold)
    return sorted(found, key=lambda fold: order[fold.last])


Part = Fold | Pool


def parts_of(graph: Graph, folds: list[Fold]) -> list[Part | Step]:
    """What runs, in order: folds, pools of what they write, and the other steps."""
    inside = {step for fold in folds for step in fold.steps}
    ends: dict[Step, Part] = {fold.last: fold for fold in folds}
    results = pytree.tree_leaves(graph.result)
    for step in graph.steps:
        if step.kind == "pool" and step.inputs[0] in ends and not any(step is one for one in results):
            ends[step] = Pool(step)
    return [
        ends.get(step, step) for step in graph.steps if step in ends or (step not in inside and step.kind != "input")
    ]
