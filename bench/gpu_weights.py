"""Random packed weights generated on the device that uses them: a GPU takes milliseconds, a CPU seconds. The same seed
gives the same weight on the same kind of device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..weights.rounding import QuantizedWeight, pack_nibbles
from ..weights.sparsity import Block, NofM
from .weights import WeightKind

# All ways to keep two of four inputs.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# Root mean square of the codes by bits, used to scale outputs to about 1, so that float16 does not overflow.
_CODE_SIZE = {8: 73.0, 4: 4.6}


def draw(kind: WeightKind, n: int, k: int, device: str, seed: int = 0) -> QuantizedWeight:
    """A random weight (n, k) on a device: codes over their whole range, scales over two octaves, random zero points.

    For block sparsity, a share of kind.zero_blocks is zero, rounded to whole blocks. Stored codes are never zero.

    Raises:
        ValueError: no kernel for GPUs supports the scheme's sparsity.
    """
    scheme, generator = kind.scheme, torch.Generator(device).manual_seed(seed)
    groups = (n, scheme.groups(k))
    kept = _kept(kind, n, k, generator)
    if scheme.weight_bits == 16:
        values = torch.randn(n, k, generator=generator, device=device).mul_(k**-0.5).bfloat16()
        return QuantizedWeight(values if kept is None else values * kept, torch.ones(groups, device=device))
    octave = torch.rand(groups, generator=generator, device=device) * 2 - 1
    scale = octave.exp2() / (_CODE_SIZE[scheme.weight_bits] * k**0.5)
    if scheme.weight_bits == 8:
        codes = torch.randint(-127, 128, (n, k), generator=generator, device=device, dtype=torch.int8)
        return QuantizedWeight(codes if kept is None else codes.where(codes != 0, 1) * kept, scale)
    if kept is None:
        packed = torch.randint(0, 256, (n, (k + 1) // 2), generator=generator, device=device, dtype=torch.uint8)
        if k % 2:
            packed[:, -1] &= 15
    else:
        codes = torch.randint(0, 16, (n, k), generator=generator, device=device, dtype=torch.uint8)
        packed = pack_nibbles(codes.where(codes != 8, 9).where(kept, 8))
    zero = torch.randint(0, 16, groups, generator=generator, device=device, dtype=torch.uint8)
    return QuantizedWeight(packed, scale.bfloat16(), None if scheme.symmetric else zero)


def packed(kind: WeightKind, layout: str, n: int, k: int, device: str, seed: int = 0) -> tuple[Tensor, QuantizedWeight]:
    """A random weight, packed and as quantized values, both on the device. Raises like `draw`."""
    quantized = draw(kind, n, k, device, seed)
    return ops.pack_as(quantized, layout, kind.scheme, k), quantized


def _kept(kind: WeightKind, n: int, k: int, generator: torch.Generator) -> Tensor | None:
    """Which weights are kept, bool (n, k); None: all."""
    sparsity, device = kind.scheme.sparsity, generator.device
    if sparsity is None:
        return None
    if isinstance(sparsity, Block):
        strips, width = -(-n // sparsity.rows), -(-k // sparsity.columns)
        order = torch.rand(strips * width, generator=generator, device=device).argsort()
        kept = (order >= round(kind.zero_blocks * len(order))).view(strips, width)
        return kept.repeat_interleave(sparsity.rows, 0).repeat_interleave(sparsity.columns, 1)[:n, :k]
    if sparsity != NofM(2, 4):
        raise ValueError(f"scheme={kind.scheme}: sparsity must be 2:4 or blocks on a GPU")
    masks = torch.zeros(len(_PAIRS), 4, dtype=torch.bool, device=device)
    masks.scatter_(1, torch.tensor(_PAIRS, device=device), True)
    chosen = torch.randint(0, len(_PAIRS), (n, -(-k // 4)), generator=generator, device=device)
    return masks[chosen].flatten(1)[:, :k]
