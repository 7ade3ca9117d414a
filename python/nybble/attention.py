"""The torch op ``nybble::attention``: softmax(q k^T * scale + mask) v on CPUs, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from . import batching, flops, gradients, native, ops
from .dispatch.registry import fastest
from .dispatch.spec import FLOATS

_LIBRARY = torch.library.Library("nybble", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? slopes=None, Tensor? k_scale=None,"
    " Tensor? v_scale=None, *, float? scale=None, bool causal=False, int window=0, bool int8=False)"
    " -> Tensor"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    int8: bool = False,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, in q's dtype, with sums in float32.

    q: (batch, heads, queries, D); k: (batch, kv_heads, keys, D); v: (batch, kv_heads, keys, Dv); float32, bfloat16 or
    float16, any strides (a copy is made unless the last one is 1). Head h reads keys and values of head
    h // (heads // kv_heads). The result (batch, heads, queries, Dv) lies in memory as (batch, queries, heads, Dv), so
    that ``.transpose(1, 2).flatten(2)`` copies nothing.

    mask: broadcastable to (batch, heads, queries, keys); bool (True: the query sees the key), or float, added to the
    scaled scores. slopes: (heads,), ALiBi: adds slope * (key - position of the query). scale: None: 1 / sqrt(D).
    causal: the last query sees every key, each query before it one less. window: with causal, a query sees only the last
    so many of those; 0: all. A query that sees no key gives 0. A key that no query of a call sees may not be read, so
    that a NaN there has no effect.

    k_scale, v_scale: (batch, kv_heads, keys), float32: k and v are int8 codes, and a key or value is its codes times its
    scale, as a cache in 8 bits holds them.

    int8: products of codes of 8 bits, see docs/how-it-works.md: less time for many keys, and an error of a hundredth or
    so. Calls that it would not serve in less time, such as those of few queries, are computed in floats.

    Gradients flow to q, k and v, but not with int8 codes or products.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by name.
        NotImplementedError: mask or slopes requires a gradient, or any tensor with int8 codes or products.
    """
    optional = mask, slopes, k_scale, v_scale
    how = {"scale": scale, "causal": causal, "window": window, "int8": int8}
    if is_compiling() or _watched(q, k, v, *optional):
        out: Tensor = torch.ops.nybble.attention.default(q, k, v, *optional, **how)
        return out
    return _attention(q, k, v, *optional, scale=scale, causal=causal, window=window, int8=int8)


def _watched(q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None) -> bool:
    """Whether the call must go through torch's dispatcher, as ops does it."""
    return (
        ops._watched(q, k, v)
        or k.is_neg()
        or (k.requires_grad and is_grad_enabled())
        or any(one is not None and _unusual(one) for one in optional)
    )


def _unusual(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor or tensor.requires_grad or tensor.is_neg()


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    int8: bool = False,
) -> Tensor:
    scales = _checked_scales(k, k_scale, v_scale)
    batch, heads, queries, width = _checked_shape(q, k, v, scales is not None)
    if window < 0 or (window and not causal):
        raise ValueError(f"window={window}: must be 0, or positive with causal=True")
    if mask is not None:
        shape = batch, heads, queries, k.shape[2]
        _check_mask(mask, shape)
        mask = mask.expand(shape)
    if slopes is not None:
        if slopes.dim() != 1 or len(slopes) != heads or not slopes.is_cpu:
            raise ValueError(f"slopes: shape {tuple(slopes.shape)} on {slopes.device}, must be ({heads},) on cpu")
        slopes = slopes.float().contiguous()
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    how = native.AttentionHow(
        width**-0.5 if scale is None else scale, causal, window, scales, _kernel("attention8") if int8 else ""
    )
    native.attention(_kernel("attention"), q, k, v, out, mask, slopes, how)
    return out


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@lru_cache
def _kernel(op: str) -> str:
    return fastest(op)


def _checked_scales(k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The scales of int8 keys and values, after a check."""
    if k_scale is None and v_scale is None:
        return None
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            raise ValueError(f"{name}=None: int8 keys and values need both scales")
        if scale.shape != k.shape[:3] or scale.dtype is not torch.float32 or not scale.is_cpu:
            raise ValueError(
                f"{name}: {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}, must be float32"
                f" {tuple(k.shape[:3])} on cpu"
            )
    assert k_scale is not None  # noqa: S101
    assert v_scale is not None  # noqa: S101
    return k_scale, v_scale


def _checked_shape(q: Tensor, k: Tensor, v: Tensor, codes: bool) -> torch.Size:
    """The shape of q, after a check of all three. codes: k and v are int8."""
    dtype, shape = q.dtype, q.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, must have four dimensions")
        if codes and tensor is not q:
            if tensor.dtype is not torch.int8:
                raise ValueError(f"{name}: {tensor.dtype}, must be torch.int8 with k_scale and v_scale")
        elif tensor.dtype is not dtype or dtype not in FLOATS:
            raise ValueError(f"{name}: {tensor.dtype}, must be one of {FLOATS} and that of q")
        if not tensor.is_cpu:
            raise ValueError(f"{name}: on {tensor.device}, must be on cpu; elsewhere use scaled_dot_product_attention")
    batch, heads, _, width = shape
    kv_batch, kv_heads, keys, kv_width = k.shape
    if kv_batch != batch or kv_width != width or width < 1:
        raise ValueError(f"k: shape {tuple(k.shape)}, must be ({batch}, kv_heads, keys, {width}) as q {tuple(shape)}")
    value_batch, value_heads, values, value_width = v.shape
    if (value_batch, value_heads, values) != (kv_batch, kv_heads, keys) or value_width < 1:
        raise ValueError(f"v: shape {tuple(v.shape)}, must be ({kv_batch}, {kv_heads}, {keys}, any) as k")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads, must divide the {heads} heads of q")
    return shape


def _check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    if mask.dtype is not torch.bool and mask.dtype not in FLOATS:
        raise ValueError(f"mask: {mask.dtype}, must be bool or one of {FLOATS}")
    if not mask.is_cpu:
        raise ValueError(f"mask: on {mask.device}, must be on cpu")
    missing = 4 - mask.dim()
    fits = missing >= 0 and all(
        size in (1, whole) for size, whole in zip(mask.shape, shape[max(missing, 0) :], strict=False)
    )
    if not fits:
        raise ValueError(f"mask: shape {tuple(mask.shape)}, must broadcast to {shape}")


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, slopes: Tensor | None, scale: float, causal: bool, window: int
) -> Tensor:
    """softmax(q k^T * scale + mask) in float32; 0 where a query sees no key. k has as many heads as q."""
    scores = q.float() @ k.float().transpose(2, 3) * scale
    place = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    distance = torch.arange(k.shape[2], device=q.device) - place
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype is torch.bool else scores + mask
    if slopes is not None:
        scores = scores + slopes.float()[:, None, None] * distance
    if causal:
        scores = torch.where(distance > 0, -torch.inf, scores)
    if window:
        scores = torch.where(distance <= -window, -torch.inf, scores)
    seen = (scores != -torch.inf).any(-1, keepdim=True)
    weights: Tensor = torch.where(seen, scores, 0).softmax(-1) * seen
    return weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    if inputs[5] is not None:
        raise NotImplementedError(
            "nybble::attention has no gradient with int8 keys and values: detach q, or attend to float keys and values"
        )
    if keyword_only_inputs["int8"]:
        raise NotImplementedError(
            "nybble::attention has no gradient with int8=True: detach q, k and v, or leave it off"
        )
    if any(ctx.needs_input_grad[3:5]):
        raise NotImplementedError(
            "nybble::attention has no gradient for mask and slopes: detach them, or use scaled_dot_product_attention"
        )
    ctx.save_for_backward(*inputs[:5])
    ctx.how = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, slopes = ctx.saved_tensors
    scale, causal, window = (ctx.how[name] for name in ("scale", "causal", "window"))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, 1).float() for t in (k, v))
    weights = _weights(q, keys, mask, slopes, scale, causal, window)
    grad = grad.float()
    of_weights = grad @ values.transpose(2, 3)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale

    def summed(each: Tensor, like: Tensor) -> Tensor:
        total: Tensor = each.unflatten(1, (-1, group)).sum(2).to(like.dtype)
        return total

    of_k, of_v = of_scores.transpose(2, 3) @ q.float(), weights.transpose(2, 3) @ grad
    return (of_scores @ keys).to(q.dtype), summed(of_k, k), summed(of_v, v), None, None, None, None


def _batched(op: Any, info: Any, in_dims: Sequence[Any], *args: Any, **keywords: Any) -> tuple[Any, Any]:
    """The rule of vmap: the batch of vmap becomes part of that of attention. Slopes with a batch are looped over."""
    given, dims, places = list(args), list(in_dims), {0, 1, 2, 5, 6}
    if len(args) > 3 and args[3] is not None:
        mask, dim = args[3], in_dims[3]
        own = mask.dim() - (dim is not None)
        if dim is not None:
            batch = _sizes_without(args[0], in_dims[0])[0]
            mask = mask.movedim(dim, 0)
            mask = mask.view(len(mask), *[1] * (4 - own), *mask.shape[1:])
            given[3], dims[3] = mask.expand(-1, batch, -1, -1, -1), 0
        if dim is not None or (own == 4 and mask.shape[0] > 1):
            places.add(3)
    rule = batching.merged({place: 0 for place in sorted(places) if place < len(args)})
    return rule(op, info, dims, *given, **keywords)


def _sizes_without(tensor: Tensor, dim: int | None) -> list[int]:
    return [size for place, size in enumerate(tensor.shape) if place != dim]


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
gradients.register(_LIBRARY, "attention", _backward, _setup_context)
batching.register(_LIBRARY, "attention", _batched)
flops.register("attention")


@torch.library.register_fake("nybble::attention", lib=_LIBRARY)
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    int8: bool = False,
) -> Tensor:
    torch._check(q.dim() == 4, lambda: f"q: shape {tuple(q.shape)}, must have four dimensions")
    torch._check(k.shape[3] == q.shape[3], lambda: f"k: the last dimension must be {q.shape[3]} as q's")
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
