"""What an explanation consists of beside its nodes: the form of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .nodes import Node, Path, Ref


class NotUnderstood(Exception):
    """Why a call cannot be explained."""


@dataclass(frozen=True)
class Given:
    """A part of the result that is an argument, or a constant."""

    path: Path | None
    value: Any = None


@dataclass(frozen=True)
class Out:
    """A part of the result that is computed: a value, in the shape (batch, length, width) or (length, width)."""

    ref: Ref


@dataclass(frozen=True)
class Applied:
    """A part of the result that a module inside computes from all tokens, such as a pooler: it runs as before."""

    ref: Ref
    module: nn.Module


@dataclass(frozen=True)
class Record:
    """A part of the result that is a dataclass and a dict, such as transformers' outputs: its class, and its fields."""

    make: Callable[..., Any]
    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Explanation:
    """What a call computes. ``result`` has the structure of the call's result, with Record, Out, Given and Applied in place
    of what they stand for."""

    hidden: Path  # of the tensor that has batch and length
    result: Any
    nodes: tuple[Node, ...]  # each after those that it needs
    dims: int  # of tensors of hidden states: 3 (batch, length, width) or 2 (length, width)
    ones: tuple[Path, ...] = ()  # tensors of the call without zeros, which must have none


def needed(nodes: list[Node], result: Any) -> list[Node]:
    """The nodes that the result needs, each after those that it is computed from."""
    ordered: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in ordered:
            for ref in node.inputs():
                visit(ref.node)
            ordered[node] = None

    for node in outputs_of(result):
        visit(node)
    return list(ordered)


def outputs_of(result: Any) -> list[Node]:
    """The nodes in the form of a result."""
    if isinstance(result, Record):
        return [node for _, one in result.fields for node in outputs_of(one)]
    if isinstance(result, tuple):
        return [node for one in result for node in outputs_of(one)]
    return [result.ref.node] if isinstance(result, (Out, Applied)) else []
