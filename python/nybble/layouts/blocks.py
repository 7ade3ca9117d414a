"""Block-sparse weights for GPUs: the layout bsr8. Plain torch, on the weight's device.

One uint8 tensor of sections, each aligned to 64 bytes but the last, so that the number of blocks follows from its size:

    start       int32    (strips + 1,)                blocks before each strip of outputs
    scale       float32  (strips * rows,)             padding 0
    column_sum  int32    (strips * rows,)             sums of the codes
    codes       int8     (blocks, rows, columns)      padded to powers of two, at least 16 x 32, with 0
    index       int32    (blocks,)                    place of a block along K, ascending in a strip
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from ..weights.sparsity import Block
from .layout import ALIGNMENT, Layout
from .portable import from_portable, to_portable

LAYOUT = "bsr8"
# The smallest operand of a tensor core.
_LEAST_ROWS, _LEAST_COLUMNS = 16, 32


def block_of(scheme: Scheme) -> Block:
    """The block size of a scheme.

    Raises:
        ValueError: the scheme has no blocks.
    """
    if scheme.family != "bsw8a8" or not isinstance(scheme.sparsity, Block):
        raise ValueError(f"scheme={scheme}: has no blocks")
    return scheme.sparsity


def padded(block: Block) -> tuple[int, int]:
    """Rows and columns of a block as it is stored."""
    return max(_LEAST_ROWS, _power(block.rows)), max(_LEAST_COLUMNS, _power(block.columns))


def pack(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """The packed weight, uint8. Blocks whose codes are all 0 are not stored."""
    block, out_features = block_of(scheme), quantized.qweight.shape[0]
    tensors = to_portable(quantized, scheme, in_features)
    rows, columns = padded(block)
    edge = -out_features % block.rows
    column_sum = quantized.qweight.sum(dim=1, dtype=torch.int32)
    sections = (
        tensors["block_start"],
        zero_pad(quantized.scale.flatten(), (0, edge)),
        zero_pad(column_sum, (0, edge)),
        zero_pad(tensors["values"], (0, columns - block.columns, 0, rows - block.rows)),
    )
    parts = [section.contiguous().view(-1).view(torch.uint8) for section in sections]
    aligned = [zero_pad(part, (0, -part.numel() % ALIGNMENT)) for part in parts]
    return torch.cat([*aligned, tensors["block_index"].contiguous().view(torch.uint8)])


def views(packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Tensor]:
    """The sections by name, sharing the packed tensor's memory.

    Raises:
        ValueError: the size of the tensor is not that of a whole number of blocks.
    """
    block = block_of(scheme)
    strips, (rows, columns) = -(-out_features // block.rows), padded(block)
    fixed = (
        ("start", strips + 1, torch.int32),
        ("scale", strips * block.rows, torch.float32),
        ("column_sum", strips * block.rows, torch.int32),
    )
    found, at = {}, 0
    for name, count, dtype in fixed:
        found[name] = packed[at : at + 4 * count].view(dtype)
        at += -(-4 * count // ALIGNMENT) * ALIGNMENT
    size = rows * columns
    blocks, rest = divmod(packed.numel() - at, size + 4)
    if rest or blocks < 0:
        raise ValueError(f"packed: {packed.numel()} bytes, not a whole number of {scheme} blocks")
    found["codes"] = packed[at : at + blocks * size].view(torch.int8).view(blocks, rows, columns)
    found["index"] = packed[at + blocks * size :].view(torch.int32)
    return found


def unpack(packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    """The portable weight of a packed one; the exact inverse of pack.

    Raises:
        ValueError: the packed tensor is damaged.
    """
    block, found = block_of(scheme), views(packed, scheme, out_features, in_features)
    tensors = {
        "block_start": found["start"],
        "block_index": found["index"],
        "values": found["codes"][:, : block.rows, : block.columns],
        "scale": found["scale"][:out_features, None].clone(),
    }
    return from_portable(tensors, scheme, out_features, in_features)


def check(packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> None:
    """Raises ValueError where the packed tensor is damaged: it differs from its weight packed again."""
    again = pack(unpack(packed, scheme, out_features, in_features), scheme, in_features)
    if not torch.equal(again, packed):
        raise ValueError("packed: is damaged: its weight packs to other bytes")


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


LAYOUTS = (Layout(LAYOUT, own_pack=pack, own_unpack=unpack),)
