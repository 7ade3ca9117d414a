"""Linear layers of other libraries on a GPU (peers): torch's own, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .gpu_wheels import WHEELS
from .peers.torch_int import int8_rows

# x (M, K) bfloat16 -> y (M, N)
Layer = Callable[[Tensor], Tensor]
_GROUP = 128


@dataclass(frozen=True)
class GpuPeer:
    """A linear layer of another library.

    make: builds a layer from a bfloat16 weight (N, K) on the GPU; may raise any exception of the library.
    weight_bits: stored bits per weight. needs: the module that must be installed.
    """

    name: str
    weight_bits: int
    make: Callable[[Tensor], Layer]
    needs: str | None = None

    @property
    def travels(self) -> bool:
        """Whether it is available on a machine without a network: part of torch, or packed by gpu_prepare.sh."""
        return self.needs is None or self.needs in {wheel.module for wheel in WHEELS}

    def why_not(self) -> str | None:
        """Why it cannot be timed here; None if it can."""
        return f"{self.needs} is not installed" if self.needs and find_spec(self.needs) is None else None


def _bf16(weight: Tensor) -> Layer:
    return partial(linear, weight=weight.clone())


def _int_mm(weight: Tensor) -> Layer:
    """torch._int_mm of per-token quantized activations and an int8 weight; requires more than 16 rows."""
    codes, scale = int8_rows(weight)
    transposed, scale_row = codes.t(), scale.t().bfloat16()

    def layer(x: Tensor) -> Tensor:
        rows, row_scale = int8_rows(x)
        return torch._int_mm(rows, transposed).bfloat16() * (row_scale.bfloat16() * scale_row)

    return layer


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int32 codes (N, K) in 0..15, scale and minimum (N, groups) for groups of 128: weight = code * scale + minimum.

    Raises:
        ValueError: K is not a multiple of 128.
    """
    n, k = weight.shape
    if k % _GROUP:
        raise ValueError(f"K={k}: must be a multiple of {_GROUP}")
    groups = weight.float().view(n, -1, _GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-20)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return codes.to(torch.int32).view(n, k), scale, low


def _int4pack(weight: Tensor) -> Layer:
    """torch._weight_int4pack_mm with groups of 128: weight = (code - 8) * scale + zero."""
    n, k = weight.shape
    if k % 1024 or n % 8:
        raise ValueError(f"N={n}, K={k}: must be multiples of 8 and 1024")
    codes, scale, low = _four_bits(weight)
    packed = torch._convert_weight_to_int4pack((codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    scales = torch.stack((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch._weight_int4pack_mm(x, packed, _GROUP, scales)


def _scaled_mm(weight: Tensor) -> Layer:
    """torch._scaled_mm in fp8, one scale per row, with dynamically quantized activations."""
    kind = torch.float8_e4m3fn
    largest = torch.finfo(kind).max

    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        return (rows.float() / scale).to(kind), scale

    codes, scale = rounded(weight)

    def layer(x: Tensor) -> Tensor:
        rows, row_scale = rounded(x)
        out: Tensor = torch._scaled_mm(rows, codes.t(), row_scale, scale.t(), out_dtype=torch.bfloat16)
        return out

    return layer


def _cslt(weight: Tensor) -> Layer:
    """torch._cslt_sparse_mm, 2:4 sparsity by magnitude."""
    fours = weight.view(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, dim=1).indices, True)
    compressed = torch._cslt_compress((fours * kept).view_as(weight))
    return lambda x: torch._cslt_sparse_mm(compressed, x.t().contiguous()).t()


def _torchao(weight: Tensor) -> Layer:
    quantization: Any = import_module("torchao.quantization")
    dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    dense.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    model = torch.nn.Sequential(dense)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def _nf4(weight: Tensor) -> Layer:
    nn: Any = import_module("bitsandbytes.nn")
    n, k = weight.shape
    layer: Layer = nn.LinearNF4(k, n, bias=False, compute_dtype=weight.dtype, compress_statistics=False)
    other: Any = layer
    other.weight = nn.Params4bit(weight.cpu(), requires_grad=False, compress_statistics=False, quant_type="nf4")
    moved: Layer = other.to(weight.device).eval()  # .to() quantizes
    return moved


def _gemlite(weight: Tensor, of: str) -> Layer:
    """A layer of one of gemlite.helper's converters; its first call autotunes."""
    helper: Any = import_module("gemlite.helper")
    layer: Layer = getattr(helper, of)(device=str(weight.device), dtype=weight.dtype).from_weights(weight.clone())
    return layer


def _gemlite_w4(weight: Tensor) -> Layer:
    """gemlite with weight = (code - zero) * scale."""
    helper: Any = import_module("gemlite.helper")
    codes, scale, low = _four_bits(weight)
    convert = helper.A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype).from_weights
    layer: Layer = convert(codes.to(torch.uint8), scale.to(weight.dtype), (-low / scale).to(weight.dtype))
    return layer


def _humming(weight: Tensor, weight_config: dict[str, Any], inputs: str | None = None) -> Layer:
    """humming quantizes the weight, and compiles at its first call. inputs: dtype of dynamically quantized activations."""
    made: Any = (
        import_module("humming.layer")
        .HummingLayer(
            shape_n=weight.shape[0],
            shape_k=weight.shape[1],
            weight_config=dict(weight_config),
            input_config={"dtype": inputs} if inputs else None,
            torch_dtype=weight.dtype,
        )
        .to(weight.device)
    )
    made.load_from_unquantized(weight)
    made.transform()
    layer: Layer = made
    return layer


# The type id of vllm's Marlin for unsigned 4-bit codes (bits 8 on) with bias 8 (bits 17 on).
_UINT4_LESS_8 = 4 << 8 | 8 << 17 | 1 << 50
# Order of 64 scales in Marlin's layout.
_MARLIN_SCALES = [i + 8 * j for i in range(8) for j in range(8)]


def _marlin(weight: Tensor) -> Layer:
    """Marlin from vllm's compiled library: symmetric 4-bit weights, groups of 128."""
    ops = _vllm_ops()
    n, k = weight.shape
    groups = weight.float().view(n, -1, _GROUP)
    scale = (groups.abs().amax(-1) / 7).clamp(min=1e-20).to(weight.dtype)
    codes = ((groups / scale.float()[..., None]).round() + 8).clamp(0, 15).to(torch.int32).view(n, k // 8, 8)
    words = torch.zeros(n, k // 8, dtype=torch.int32, device=weight.device)
    for place in range(8):
        words |= codes[..., place] << 4 * place
    nothing = torch.empty(0, dtype=torch.int32, device=weight.device)
    packed = ops.gptq_marlin_repack(words.t().contiguous(), nothing, k, n, 4, False)
    scales = scale.t().reshape(-1, 64)[:, _MARLIN_SCALES].reshape(-1, n).contiguous()
    blocks = torch.cuda.get_device_properties(weight.device).multi_processor_count
    locks = torch.zeros(blocks, dtype=torch.int32, device=weight.device)

    def layer(x: Tensor) -> Tensor:
        sizes, flags = (len(x), n, k), (True, False, True, False)
        made: Tensor = ops.marlin_gemm(
            x, None, packed, None, scales, None, None, None, None, None, locks, _UINT4_LESS_8, *sizes, *flags
        )
        return made

    return layer


def _vllm_ops() -> Any:
    """The ops of vllm's compiled library, loaded without its Python package."""
    spec = find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    torch.ops.load_library(str(Path(next(iter(folders or ["vllm"]))) / "_C.abi3.so"))
    return torch.ops._C


_HUMMING_W4 = {"dtype": "uint4", "group_size": _GROUP}
PEERS = (
    GpuPeer("torch bf16", 16, _bf16),
    GpuPeer("torch int_mm", 8, _int_mm),
    GpuPeer("torch int4pack g128", 4, _int4pack),
    GpuPeer("torch scaled_mm fp8", 8, _scaled_mm),
    GpuPeer("torch cslt 2:4", 9, _cslt),
    GpuPeer("torchao int8 dynamic", 8, _torchao, needs="torchao"),
    GpuPeer("bitsandbytes nf4", 4, _nf4, needs="bitsandbytes"),
    GpuPeer("gemlite w4a16 g128", 4, _gemlite_w4, needs="gemlite"),
    GpuPeer("gemlite w8a16", 8, partial(_gemlite, of="A16W8_INT8"), needs="gemlite"),
    GpuPeer("gemlite w8a8", 8, partial(_gemlite, of="A8W8_INT8_dynamic"), needs="gemlite"),
    GpuPeer("humming w4a16 g128", 4, partial(_humming, weight_config=_HUMMING_W4), needs="humming"),
    GpuPeer("humming w8a16", 8, partial(_humming, weight_config={"dtype": "uint8"}), needs="humming"),
    GpuPeer("humming w4a8 g128", 4, partial(_humming, weight_config=_HUMMING_W4, inputs="int8"), needs="humming"),
    GpuPeer("humming w8a8", 8, partial(_humming, weight_config={"dtype": "uint8"}, inputs="int8"), needs="humming"),
    GpuPeer("marlin w4a16 g128", 4, _marlin, needs="vllm"),
)
