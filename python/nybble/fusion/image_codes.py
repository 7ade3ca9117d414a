"""Which values of a network of images are held as codes: those that convolutions with static activations read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bound_conv import BoundConv, BoundPool
from .image_graph import Step
from .image_parts import Part

# Bytes after a frame that kernels may read (csrc/conv.h).
_AFTER = 64


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
    """The values that are codes: each is written and read only by convolutions that can, at least once as an input; and
    those that read it as an input round it alike."""
    users: dict[Step, list[Part | Step]] = {}
    for part in parts:
        for one in part.inputs:
            users.setdefault(one, []).append(part)
    found: dict[Step, Codes] = {}
    for part in parts:
        if isinstance(part, Step) or any(part.last is one for one in results):
            continue
        read = [bound[one] for one in users.get(part.last, []) if not isinstance(one, Step) and one.x is part.last]
        inputs = [one for one in read if isinstance(one, BoundConv) and one.reads_codes]
        others = [one for one in users.get(part.last, []) if isinstance(one, Step) or one.x is not part.last]
        able = all(_writes(bound.get(one)) for one in (part, *others) if not isinstance(one, Step))
        if not inputs or len(inputs) < len(read) or not able or any(isinstance(one, Step) for one in others):
            continue
        given = {one.given for one in inputs}
        scale, zero = given.pop() or (0.0, 0)
        if given or not scale:
            continue
        pads = [one.geometry.padding for one in inputs]
        found[part.last] = Codes(scale, zero, (max(pad[0] for pad in pads), max(pad[1] for pad in pads)))
    return found


def _writes(bound: BoundConv | BoundPool | None) -> bool:
    return isinstance(bound, BoundConv) and bound.writes_codes
