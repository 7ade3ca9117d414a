"""Which values of a network of images are held as codes: those that convolutions with static activations read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bound_conv import BoundConv, BoundPool
from .image_graph import Step
from .image_parts import Fold, Part

# Bytes after a frame that kernels may read (csrc/conv.h).
_AFTER = 64
# How far scales may lie below the largest, and zero points apart, of layers that read the same codes.
_ALIKE, _NEAR = 0.9, 8


@dataclass(frozen=True)
class Codes:
    """x = (byte - 128 - zero) * scale, channels_last, in a frame of ``pad`` pixels that hold the code of 0."""

    scale: float
    zero: int
    pad: tuple[int, int]

    @property
    def native(self) -> tuple[float, int, int, int]:
        """As native.conv_call takes them."""
        return (self.scale, self.zero, *self.pad)

    def frame(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """The sizes of the frames of images of a shape: batch, height, width, channels."""
        batch, channels, height, width = shape
        return batch, height + 2 * self.pad[0], width + 2 * self.pad[1], channels

    def nbytes(self, shape: torch.Size) -> int:
        """Bytes of the frames, with what may be read after them."""
        return torch.Size(self.frame(shape)).numel() + _AFTER

    def read(self, frame: Tensor, shape: torch.Size) -> Tensor:
        """The values, float32."""
        size = self.frame(shape)
        bytes_ = frame[: torch.Size(size).numel()].view(size)
        inner = bytes_[:, self.pad[0] : size[1] - self.pad[0], self.pad[1] : size[2] - self.pad[1]]
        return (inner.movedim(-1, 1).float() - (128 + self.zero)) * self.scale

    def rounded(self, values: Tensor) -> Tensor:
        """Values as the codes hold them, float32."""
        codes = (values.float() / self.scale).clamp(-128 - self.zero, 127 - self.zero).round()
        return codes * self.scale


def codes_of(
    parts: list[Part | Step], bound: dict[Part, BoundConv | BoundPool], results: list[Step]
) -> dict[Step, Codes]:
    """The values that are codes: each is written and read only by parts that can, at least once as an input; and those
    that read it as an input round it nearly alike: they get what the one with the largest scale rounds it to."""
    users: dict[Step, list[Part | Step]] = {}
    for part in parts:
        for one in part.inputs:
            users.setdefault(one, []).append(part)
    found: dict[Step, Codes] = {}
    for part in reversed(parts):
        if isinstance(part, Step) or any(part.last is one for one in results):
            continue
        readers = [one for one in users.get(part.last, []) if not isinstance(one, Step)]
        if len(readers) < len(users.get(part.last, [])):
            continue
        inputs = [_read(one, bound[one], found) for one in readers if one.x is part.last]
        able = all(bound[one].writes_codes for one in (part, *readers) if one is part or one.x is not part.last)
        codes = _common([one for one in inputs if one is not None])
        if able and codes is not None and None not in inputs:
            found[part.last] = codes
    return found


def _read(part: Part, bound: BoundConv | BoundPool, found: dict[Step, Codes]) -> Codes | None:
    """As what a part reads its input, or None."""
    if isinstance(bound, BoundPool):
        codes = found.get(part.last)
        return Codes(codes.scale, codes.zero, (0, 0)) if codes else None
    height, width = bound.geometry.padding
    return Codes(*bound.given, (height, width)) if bound.reads_codes and bound.given else None


def _common(inputs: list[Codes]) -> Codes | None:
    """The codes for all that read a value."""
    if not inputs:
        return None
    widest = max(inputs, key=lambda one: one.scale)
    if any(one.scale < _ALIKE * widest.scale or abs(one.zero - widest.zero) > _NEAR for one in inputs):
        return None
    pad = max(one.pad[0] for one in inputs), max(one.pad[1] for one in inputs)
    return Codes(widest.scale, widest.zero, pad)


def joined(
    parts: list[Part | Step], bound: dict[Part, BoundConv | BoundPool], codes: dict[Step, Codes]
) -> list[Part | Step]:
    """The parts without those convolutions that another one adds to its own product in the same call (``Fold.more``): of
    codes, with no activation and read by no other."""
    users = Counter(step for part in parts for step in part.inputs)
    writers = {part.last: part for part in parts if isinstance(part, Fold)}
    inside: set[Part | Step] = set()
    for part in writers.values():
        other = writers.get(part.residual) if part.residual is not None else None
        if other is None or users[other.last] > 1 or other.residual is not None or other.act is not None:
            continue
        held = all(step in codes for step in (part.x, part.last, other.x))
        if held and other.last not in codes and all(bound[one].adds for one in (part, other)):
            part.more = other
            inside.add(other)
    return [part for part in parts if part not in inside]
