"""What attention computes: its heads, rotary embedding, masks and caches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import recognize
from .compare import attended, attending, attends, constant, grouped, integers, same_flat, same_memory
from .forms import NotUnderstood
from .modules import Modules
from .nodes import Attend, CacheStep, Mask, Product, Ref, Rotate, Run, Scale, rotated
from .watch import CACHE, Event

_MULTI_HEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
# Functions that a mask may be computed by: they take no sizes.
_REPLAYED = {"where", "add", "contiguous", "to", "expand_as", "logical_not", "float", "bool"}
_REPLAYED |= {"unsqueeze", "zeros_like", "masked_fill"}
# Functions that write their first argument, and the same without that: a replay must not change a tensor of the call.
_WRITING = {"masked_fill_": Tensor.masked_fill}


class Attention(Modules):
    """Explains calls of attention."""

    def attention(self, event: Event) -> Ref:
        q, k, v = (event.argument(i, name) for i, name in enumerate(("query", "key", "value")))
        mask, causal = event.argument(3, "attn_mask"), bool(event.argument(5, "is_causal", False))
        scale = event.kwargs.get("scale")
        if event.argument(4, "dropout_p", 0.0) or q.dim() != 4:
            raise NotUnderstood("attention with dropout, or without a dimension of heads")
        if self.length == 1:
            raise NotUnderstood("attention of a single token: whether it is causal cannot be seen")
        heads, groups = q.shape[1], event.kwargs.get("enable_gqa", False)
        k, v = (grouped(one, heads, groups) for one in (k, v))
        cached = self.cache_of(k, v)
        if cached is not None:
            new_k, new_v, cache = cached
        else:
            new_k, new_v, cache = k, v, None
        before = event.number
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        query = self.heads(q, before)
        if isinstance(scaled := query.node, Scale) and query.whole:
            query, scale = scaled.x, scale * scaled.factor
        node = Attend(
            rows=self.rows(event.outputs[0].transpose(1, 2)),
            q=query,
            k=self.heads(new_k, before),
            v=self.heads(new_v, before),
            heads=heads,
            kv_heads=k.shape[1],
            scale=scale,
            causal=causal,
            mask=None if mask is None else self.mask(mask, before),
            cache=cache,
        )
        return self.add(node)

    def multi_head(self, event: Event) -> Ref:
        """torch's multi_head_attention_forward, of a module that attends to its own input."""
        given = dict(zip(_MULTI_HEAD, event.args, strict=False)) | dict(event.kwargs)
        x, heads, weight = given["query"], given["num_heads"], given["in_proj_weight"]
        extra = [given.get(name) is not None for name in ("bias_k", "bias_v", "static_k", "static_v", "attn_mask")]
        own = all(same_flat(x, given[name]) for name in ("key", "value"))
        if not own or weight is None or any(extra) or given.get("add_zero_attn") or x.dim() != 3:
            raise NotUnderstood("multi_head_attention_forward with other things than its own tokens and a padding mask")
        value, rows = self.value(x.transpose(0, 1), event.number), self.batch * self.length
        run = Run(self.batch, self.length, {value.node: value.node.rows}, {})
        first = Product(rows=x.new_empty(rows, len(weight)), x=value, weight=weight, bias=given["in_proj_bias"])
        first.rows = run.values[first] = first.compute(run)
        width, mask = len(weight) // 3, self.padding(given.get("key_padding_mask"))
        q, k, v = (Ref(first, i * width, width) for i in range(3))
        scale = (width // heads) ** -0.5
        options = {"heads": heads, "kv_heads": heads, "scale": scale, "causal": False, "mask": mask, "cache": None}
        attend = Attend(rows=first.rows, q=q, k=k, v=v, **options)
        run.tables.update(self.tensors)
        attend.rows = attend.compute(run)
        self.nodes += [first, attend]
        out = event.outputs[0].transpose(0, 1)
        return self.add(
            Product(
                rows=self.rows(out),
                x=Ref(attend, 0, width),
                weight=given["out_proj_weight"],
                bias=given["out_proj_bias"],
            )
        )

    def padding(self, given: Tensor | None) -> Mask | None:
        """The mask of multi_head_attention_forward: -inf where a bool tensor of the call is true."""
        if given is None:
            return None
        for path, tensor in self.tensors.items():
            if tensor.dtype == torch.bool and tensor.shape == given.shape and tensor.equal(given == -torch.inf):
                return Mask(what=attended, args=(Mask(path),))
        raise NotUnderstood("the padding mask is not a bool tensor of the call")

    def cache_of(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, CacheStep] | None:
        """The new keys and values of the cache update that returned all of them."""
        for event in self.call.events:
            if event.name == CACHE and len(event.outputs) == 2:
                keys, values = event.outputs
                # Attention may read only the first of the keys that a cache of fixed size holds.
                if same_flat(keys[:, :, : k.shape[2]], k) and same_flat(values[:, :, : v.shape[2]], v):
                    for path, cache in self.caches():
                        if cache is event.what:
                            new_k, new_v = event.argument(0, "key_states"), event.argument(1, "value_states")
                            options = tuple((key, one) for key, one in event.kwargs.items())
                            if not all(constant(one) for one in (*event.args[2:], *dict(options).values())):
                                raise NotUnderstood("the update of the cache takes tensors beside keys and values")
                            return new_k, new_v, CacheStep(path, tuple(event.args[2:]), options)
        return None

    def heads(self, tensor: Tensor, before: int) -> Ref:
        """What (batch, heads, length, width) is computed from: rows, rotated or not."""
        if tensor.shape[0] != self.batch or tensor.shape[2] != self.length:
            raise NotUnderstood(f"attention to other tokens: shape {tuple(tensor.shape)}")
        rows = self.rows(tensor.transpose(1, 2))
        if (found := self.find(rows, same_memory)) is not None:
            return found
        if (turned := self.rotation(tensor, before)) is not None:
            return turned
        return self.of_rows(rows, before)

    def rotation(self, tensor: Tensor, before: int) -> Ref | None:
        """Explains heads as rotary position embedding of an earlier value, by tensors cos and sin of the call."""
        shape = (self.length, tensor.shape[-1])
        tables = [path for path, one in self.tensors.items() if one.dim() == 3 and one.shape[1:] == shape]
        pairs = [(cos, sin) for cos in tables for sin in tables if cos != sin]
        if not pairs:
            return None
        for event in self.call.events[:before]:
            for output in event.outputs:
                if output.shape != tensor.shape or output.dtype != tensor.dtype:
                    continue
                for cos, sin in pairs:
                    for interleaved in (False, True):
                        turned = rotated(
                            output, self.tensors[cos].unsqueeze(1), self.tensors[sin].unsqueeze(1), interleaved
                        )
                        if recognize.close(turned, tensor):
                            x = self.heads(output, event.number + 1)
                            rows, heads = self.rows(tensor.transpose(1, 2)), tensor.shape[1]
                            return self.add(
                                Rotate(rows=rows, x=x, heads=heads, cos=cos, sin=sin, interleaved=interleaved)
                            )
        return None

    def mask(self, tensor: Tensor, before: int) -> Mask:
        """The mask as a tensor of the call, or as torch functions of such."""
        for path, given in self.tensors.items():
            if given is tensor or (given.shape == tensor.shape and given.dtype == tensor.dtype and given.equal(tensor)):
                return Mask(path)
            # Token ids that are 0 at padding are not the mask.
            if (
                path != self.hidden
                and integers(given)
                and tensor.dtype == torch.bool
                and tensor.dim() == 4
                and attends(given, tensor)
            ):
                return Mask(what=attending, args=(Mask(path),))
        # The last one: what a function writes or returns as it is has been the output of another before.
        events = reversed(self.call.events[:before])
        event = next((one for one in events if any(out is tensor for out in one.outputs)), None)
        if event is None or event.name not in {*_REPLAYED, *_WRITING} or len(event.outputs) != 1:
            raise NotUnderstood("the mask of attention is computed in a way that is not understood")
        args, kwargs = event.args, event.kwargs
        if not all(isinstance(one, Tensor) or constant(one) for one in (*args, *kwargs.values())):
            raise NotUnderstood(f"the mask of attention is computed by {event.name} with unusual arguments")

        def part(one: Any) -> Any:
            return self.mask(one, event.number) if isinstance(one, Tensor) else one

        return Mask(
            what=_WRITING.get(event.name, event.what),
            args=tuple(part(one) for one in args),
            kwargs=tuple((key, part(one)) for key, one in kwargs.items()),
        )
