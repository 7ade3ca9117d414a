"""The portable tensors of a weight, in a state_dict and on disk: the same on every machine.

dense    qweight, scale, zero_point or minimum, order: rounding.QuantizedWeight
sp...    mask uint8 (N, ceil(K / 8)): bit k % 8 of byte k / 8 is set if a code is kept; values: the kept codes, row by
         row, int8 (count,), or uint8 (ceil(count / 2),), even ones in the low nibble; scale
bs...    block_start int32 (N / rows + 1,), block_index int32 (blocks,): a block CSR over K / columns; values int8
         (blocks, rows, columns); scale

...static act_scale float32 (1,), act_zero_point int8 (1,): activations.ActScale

Weights that are not kept are 0; those that are kept may be 0 too. All tensors are checked before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from .. import native
from ..weights import activations
from ..weights.activations import ActScale
from ..weights.form import USUAL, Form
from ..weights.rounding import QuantizedWeight, check_portable, portable_spec
from ..weights.scheme import Scheme
from ..weights.sparsity import Block, NofM

Spec = tuple[tuple[int, ...], torch.dtype]


def spec_of(
    scheme: Scheme, out_features: int, in_features: int, stored: int = 0, form: Form = USUAL
) -> dict[str, Spec]:
    """Shape and dtype of each tensor. stored: number of codes or blocks that a sparse weight keeps."""
    weight = _weight_spec(scheme, out_features, in_features, stored, form)
    return {**weight, **activations.SPEC} if scheme.static else weight


def portable_names(scheme: Scheme) -> set[str]:
    """The names of the tensors that a weight may have, in one form or another."""
    other = ("minimum",) if scheme.weight_type.minimum and not scheme.symmetric else ()
    return {*spec_of(scheme, 1, 1), *other}


def _weight_spec(
    scheme: Scheme, out_features: int, in_features: int, stored: int, form: Form = USUAL
) -> dict[str, Spec]:
    dense = portable_spec(scheme, out_features, in_features, form)
    sparsity = scheme.sparsity
    if sparsity is None:
        return dense
    if isinstance(sparsity, Block):
        strips = -(-out_features // sparsity.rows)
        return {
            "block_start": ((strips + 1,), torch.int32),
            "block_index": ((stored,), torch.int32),
            "values": ((stored, sparsity.rows, sparsity.columns), torch.int8),
            "scale": dense["scale"],
        }
    kind = scheme.weight_type
    return {
        "mask": ((out_features, (in_features + 7) // 8), torch.uint8),
        "values": ((-(-stored // kind.per_byte),), kind.stored),
        "scale": dense["scale"],
    }


def stored_in(scheme: Scheme, tensors: Mapping[str, Tensor]) -> int:
    """The argument `stored` of spec_of for these tensors: codes or blocks of a sparse weight; 0 for a dense one."""
    if scheme.sparsity is None:
        return 0
    return tensors["values"].shape[0] * scheme.weight_type.per_byte


def to_portable(
    quantized: QuantizedWeight, scheme: Scheme, in_features: int, act: ActScale | None = None
) -> dict[str, Tensor]:
    """The portable tensors of a weight. The zeros of a sparse one have the code WeightType.middle.

    act: the scale of the activations, of a static scheme.

    Raises:
        ValueError: the scheme is static and act is None, or the other way round.
    """
    check_act(scheme, act)
    weight = _to_weight(quantized, scheme, in_features)
    return weight if act is None else {**weight, **act.tensors()}


def check_act(scheme: Scheme, act: ActScale | None) -> None:
    """Raises ValueError where the scheme is static and act is None, or the other way round."""
    if scheme.static is not (act is not None):
        raise ValueError(f"act={act}, scheme={str(scheme)!r}: must be an ActScale for a static scheme, or else None")


def check_quantized(quantized: QuantizedWeight, scheme: Scheme, out_features: int, in_features: int) -> None:
    """Raises ValueError where the tensors are not a weight of this scheme and shape, its n of m included."""
    check_portable(quantized, scheme, out_features, in_features)
    form = scheme.sparsity
    if not isinstance(form, NofM):
        return
    if scheme.weight_bits in native.SPARSE_BITS and quantized.qweight.device.type == "cpu":
        native.check_kept(quantized, scheme, in_features)
    else:
        codes = scheme.weight_type.unpack(quantized.qweight, in_features)
        _check_n_of_m(codes != scheme.weight_type.middle, form)


def _check_n_of_m(kept: Tensor, form: NofM) -> None:
    if (zero_pad(kept, (0, -kept.shape[1] % form.m)).unflatten(1, (-1, form.m)).sum(-1) > form.n).any():
        raise ValueError(f"mask: keeps more than {form.n} of {form.m} inputs")


def _to_weight(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    if scheme.sparsity is None:
        return quantized.tensors()
    device = quantized.qweight.device
    qweight = quantized.qweight.cpu()
    if isinstance(scheme.sparsity, Block):
        codes = _to_blocks(qweight, scheme.sparsity)
    else:
        pack = native.to_bitmask if scheme.weight_bits in native.SPARSE_BITS else _to_bitmask
        mask, values = pack(qweight, scheme, in_features)
        codes = {"mask": mask, "values": values}
    return {**{name: tensor.to(device) for name, tensor in codes.items()}, "scale": quantized.scale}


def from_portable(
    tensors: Mapping[str, Tensor], scheme: Scheme, out_features: int, in_features: int
) -> QuantizedWeight:
    """The inverse of to_portable. The tensors are checked.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype, or holds values that the scheme does not allow.
    """
    names = set(spec_of(scheme, out_features, in_features, form=Form.of(tensors, scheme)))
    if set(tensors) != names:
        raise ValueError(f"{scheme} needs the tensors {sorted(names)}, got {sorted(tensors)}")
    if scheme.static:
        ActScale.of_tensors(tensors, scheme.act_type)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in activations.SPEC}
    if scheme.sparsity is None:
        quantized = QuantizedWeight(**tensors)
    else:
        if tensors["values"].dim() < 1:
            raise ValueError(f"values: {tuple(tensors['values'].shape)}, must have at least one dimension")
        for name, (shape, dtype) in _weight_spec(scheme, out_features, in_features, stored_in(scheme, tensors)).items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, must be {shape} {dtype}")
        device = tensors["scale"].device
        held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        if isinstance(scheme.sparsity, Block):
            qweight = _from_blocks(held, scheme.sparsity, out_features, in_features)
        else:
            unpack = native.from_bitmask if scheme.weight_bits in native.SPARSE_BITS else _from_bitmask
            qweight = unpack(held["mask"], held["values"], scheme, out_features, in_features)
        quantized = QuantizedWeight(qweight.to(device), tensors["scale"].detach())
    check_portable(quantized, scheme, out_features, in_features)
    return quantized


def _to_bitmask(qweight: Tensor, scheme: Scheme, in_features: int) -> tuple[Tensor, Tensor]:
    """As native.to_bitmask, for any type of weights."""
    kind = scheme.weight_type
    codes = kind.unpack(qweight, in_features)
    kept = codes != kind.middle
    bits = zero_pad(kept, (0, -in_features % 8)).view(len(kept), -1, 8)
    return (bits * _bits(bits)).sum(-1, dtype=torch.uint8), kind.pack(codes[kept][None])[0]


def _from_bitmask(mask: Tensor, values: Tensor, scheme: Scheme, out_features: int, in_features: int) -> Tensor:
    """As native.from_bitmask, for any type of weights."""
    kind, form = scheme.weight_type, scheme.sparsity
    bits = ((mask[..., None] & _bits(mask)) != 0).flatten(1)
    kept = bits[:, :in_features]
    if bits[:, in_features:].any():
        raise ValueError("mask: has bits beyond the last input")
    count = int(kept.sum())
    if -(-count // kind.per_byte) != len(values):
        raise ValueError(f"values: {len(values)}, but the mask keeps {count}")
    if isinstance(form, NofM):
        _check_n_of_m(kept, form)
    stored = kind.unpack(values[None], len(values) * kind.per_byte)[0]
    if stored[count:].any():
        raise ValueError("values: the bits beyond the last code must be 0")
    codes = torch.full((out_features, in_features), kind.middle, dtype=stored.dtype)
    codes[kept] = stored[:count]
    return kind.pack(codes)


def _bits(like: Tensor) -> Tensor:
    """A byte with each bit, uint8 (8,)."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=like.device)


def _to_blocks(qweight: Tensor, block: Block) -> dict[str, Tensor]:
    tiled = _tiled(qweight, block)
    kept = tiled.flatten(2).any(-1)
    strip, index = kept.nonzero(as_tuple=True)
    start = zero_pad(kept.sum(1).cumsum(0), (1, 0)).int()
    return {"block_start": start, "block_index": index.int(), "values": tiled[strip, index].contiguous()}


def _tiled(qweight: Tensor, block: Block) -> Tensor:
    """(strips, width, rows, columns) of (N, K), padded with 0."""
    n, k = qweight.shape
    padded = zero_pad(qweight, (0, -k % block.columns, 0, -n % block.rows))
    strips, width = padded.shape[0] // block.rows, padded.shape[1] // block.columns
    return padded.view(strips, block.rows, width, block.columns).transpose(1, 2)


def _from_blocks(tensors: Mapping[str, Tensor], block: Block, out_features: int, in_features: int) -> Tensor:
    start, index, values = tensors["block_start"], tensors["block_index"], tensors["values"]
    strips, width = len(start) - 1, -(-in_features // block.columns)
    native.check_blocks(start, index, width)
    tiled = torch.zeros(strips, width, block.rows, block.columns, dtype=torch.int8)
    strip = torch.arange(strips).repeat_interleave(start.diff().long())
    tiled[strip, index.long()] = values
    whole = tiled.transpose(1, 2).reshape(strips * block.rows, width * block.columns)
    if whole[out_features:].any() or whole[:, in_features:].any():
        raise ValueError("values: must be 0 beyond the weight's edges")
    return whole[:out_features, :in_features].contiguous()
