"""From the output of a watched call back to its inputs: what computes it, in the vocabulary of ``nodes``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.eligible import is_linear_like
from . import recognize
from .nodes import (
    ACTIVATIONS,
    IDENTITY,
    Activate,
    Add,
    Attend,
    CacheStep,
    Input,
    Linear,
    Lookup,
    Mask,
    Multiply,
    Node,
    Norm,
    NormKind,
    Path,
    Product,
    Ref,
    Rotate,
    Run,
    Scale,
    rotated,
)
from .watch import CACHE, CONTAINER, MODULE, Call, Event, caches_in, tensors_of

ATTENTION, MULTI_HEAD = "scaled_dot_product_attention", "multi_head_attention_forward"
_MULTI_HEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


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


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The arguments of a call, those in tuples and lists one by one, each with its path."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, (tuple, list)):
            yield from (((key, i), part) for i, part in enumerate(value))
        else:
            yield (key,), value


@dataclass
class _Explainer:
    call: Call
    names: dict[nn.Module, str]
    nodes: list[Node] = field(default_factory=list)
    known: dict[tuple[int, int], Ref] = field(default_factory=dict)
    tensors: dict[Path, Tensor] = field(default_factory=dict)
    hidden: Path = ()
    batch: int = 1
    length: int = 1
    dims: int = 3

    def start(self) -> None:
        """Finds the hidden states among the arguments: the first float tensor with batch, length and width. A model of
        texts has none: then the first tensor of integers (batch, length)."""
        self.tensors = {
            path: leaf for path, leaf in leaves_of(self.call.args, self.call.kwargs) if isinstance(leaf, Tensor)
        }
        for path, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.dim() in (2, 3) and tensor.numel():
                self.hidden, self.dims = path, tensor.dim()
                self.batch, self.length = (1, len(tensor)) if tensor.dim() == 2 else tensor.shape[:2]
                return
        for path, tensor in self.tensors.items():
            if _integers(tensor) and tensor.dtype != torch.bool:
                self.hidden, (self.batch, self.length) = path, tensor.shape
                return
        raise NotUnderstood("it is called without a tensor of tokens")

    # --- values ---

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of tokens as a matrix of rows."""
        rows = self.batch * self.length
        if not tensor.numel() or tensor.numel() % rows:
            raise NotUnderstood(f"a value of shape {tuple(tensor.shape)} is not a row for each of {rows} tokens")
        return tensor.reshape(rows, -1)

    def add(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(node, 0, node.width)

    def find(self, rows: Tensor) -> Ref | None:
        """A value that is explained already and has these rows, or has them in neighbouring columns."""
        width = rows.shape[1]
        for node in self.nodes:
            for offset in range(0, node.width - width + 1, width):
                if _same(node.rows[:, offset : offset + width], rows):
                    return Ref(node, offset, width)
        return None

    def value(self, tensor: Tensor, before: int) -> Ref:
        """What a tensor of tokens is computed from, by the events before a number."""
        return self.of_rows(self.rows(tensor), before, tuple(tensor.shape))

    def of_rows(self, rows: Tensor, before: int, shape: tuple[int, ...]) -> Ref:
        found = self.find(rows)
        if found is not None:
            return found
        for path, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.numel() == rows.numel() and _same(self.rows(tensor), rows):
                return self.add(Input(rows=rows, path=path))
        event, output = self.producer(rows, before)
        return self.explained(event, output, rows, shape)

    def producer(self, rows: Tensor, before: int) -> tuple[Event, Tensor]:
        """The first event whose output has these rows, or has them in some of its columns, and that output.

        Later ones are copies, and a module whose inside is not needed comes after the functions in it.
        """
        inside = None
        for event in self.call.events[:before]:
            if event.name in _MOVES or event.name == CONTAINER:
                continue
            for output in event.outputs:
                if not output.is_floating_point() or output.numel() % len(rows):
                    continue
                if event.name in _TOKENS_INSIDE and output.dim() > 2:
                    output = output.transpose(*_TOKENS_INSIDE[event.name])
                if output.numel() == rows.numel() and _same(self.rows(output), rows):
                    return self.outermost(event, rows), output
                if inside is None and event.name == MODULE and output.numel() > rows.numel():
                    wide, width = self.rows(output), rows.shape[1]
                    starts = range(0, wide.shape[1] - width + 1, width)
                    if any(_same(wide[:, start : start + width], rows) for start in starts):
                        inside = (event, output)
        if inside is not None:
            return inside
        raise NotUnderstood(f"a value is computed by {self.source(rows, before)}, which is not understood")

    def source(self, rows: Tensor, before: int) -> str:
        """The name of the function whose output was moved to these rows."""
        moved = [
            event
            for event in self.call.events[:before]
            if event.name in _MOVES and any(_same_flat(output, rows) for output in event.outputs)
        ]
        tensor = moved[0].args[0] if moved else None
        for event in reversed(self.call.events[: moved[0].number if moved else 0]):
            if any(output is tensor for output in event.outputs):
                if event.name not in _MOVES:
                    return f"the torch function {event.name}"
                tensor = event.args[0]
        return "something that was not seen"

    def outermost(self, event: Event, rows: Tensor) -> Event:
        """The leaf module that ends with this event, if its output is the same; else the event."""
        for later in self.call.events[event.number :]:
            if later.name == MODULE and later.first <= event.number and later.outputs[0].numel() == rows.numel():
                return later if _same(self.rows(later.outputs[0]), rows) else event
        return event

    def explained(self, event: Event, output: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Ref:
        if event.name == MODULE:
            ref = self.module(event)
            if ref is None:
                inside = [one for one in self.call.events[event.first : event.number] if one.outputs]
                same = next((one for one in inside if _same_flat(one.outputs[0], output)), None)
                if same is None:
                    raise NotUnderstood(f"{self.name(event.what)} is neither a Linear, a norm nor an activation")
                ref = self.function(same)
        else:
            ref = self.function(event)
        found = ref if _same(ref.node.rows, rows) else self.find(rows)
        if found is None:
            raise NotUnderstood(f"{event.name} gives rows in an order that is not understood")
        return found

    def name(self, module: nn.Module) -> str:
        kind = type(module).__name__
        return f"{self.names[module]} ({kind})" if module in self.names else kind

    # --- leaf modules ---

    def module(self, event: Event) -> Ref | None:
        layer, x, out = event.what, event.argument(0, "input"), event.outputs[0]
        if isinstance(x, Tensor) and not x.is_floating_point():
            return self.lookup(layer, x, out)
        if not isinstance(x, Tensor):
            x = next((value for value in event.kwargs.values() if isinstance(value, Tensor)), None)
            if x is None:
                return None
        if is_linear_like(layer):
            return self.linear(layer, x, out, event)
        if x.shape != out.shape:
            return None
        act = recognize.activation_of(layer, x)
        if act == IDENTITY:
            return self.value(x, event.first)
        if act is not None:
            return self.add(Activate(rows=self.rows(out), x=self.value(x, event.first), act=act))
        norm = recognize.norm_of(layer, x)
        if norm is None:
            return None
        return self.norm(norm, x, out, event.first)

    def lookup(self, layer: nn.Module, ids: Tensor, out: Tensor) -> Ref | None:
        """Explains the rows of an embedding."""
        weight, given = getattr(layer, "weight", None), self.path_of(ids)
        if given is None or not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not _integers(ids):
            return None
        return self.add(Lookup(rows=self.rows(out), weight=weight, path=given)) if _looks_up(ids, weight, out) else None

    def path_of(self, tensor: Tensor) -> Path | None:
        """Where a tensor stands among the arguments."""
        return next((path for path, one in self.tensors.items() if one is tensor), None)

    def positions(self, tensor: Tensor, before: int) -> Ref:
        """Explains a value that is the same in each text, (1, length, width), as rows of an embedding by position.

        The positions must come from a buffer, so that they do not depend on the call.
        """
        for event in self.call.events[:before]:
            if event.name == MODULE and event.outputs[0] is tensor and isinstance(event.args[0], Tensor):
                ids, weight = event.args[0], getattr(event.what, "weight", None)
                held = {buffer.untyped_storage().data_ptr() for buffer in self.call.module.buffers()}
                if ids.untyped_storage().data_ptr() not in held or not isinstance(weight, nn.Parameter):
                    continue
                first = int(ids.reshape(-1)[0])
                in_order = torch.equal(ids.reshape(-1), torch.arange(first, first + self.length))
                if in_order and _looks_up(ids, weight, tensor):
                    rows = tensor.reshape(self.length, -1).repeat(self.batch, 1)
                    return self.add(Lookup(rows=rows, weight=weight, path=None, first=first))
        raise NotUnderstood(f"a value of shape {tuple(tensor.shape)} is added to all texts")

    def linear(self, layer: nn.Module, x: Tensor, out: Tensor, event: Event) -> Ref:
        if layer not in self.names:
            raise NotUnderstood(f"a {type(layer).__name__} that is not inside it")
        ref = self.value(x, event.first)
        return self.add(Linear(rows=self.rows(out), x=ref, layer=layer, name=self.names[layer]))

    def norm(self, norm: NormKind, x: Tensor, out: Tensor, before: int) -> Ref:
        rows, ref = self.rows(out), self.value(x, before)
        return self.add(Norm(rows=rows, x=ref, norm=norm, heads=rows.shape[1] // x.shape[-1]))

    # --- torch functions ---

    def function(self, event: Event) -> Ref:
        name = event.name
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](self, event)
        if name in ACTIVATIONS:
            return self.add(
                Activate(
                    rows=self.rows(event.outputs[0]), x=self.value(event.args[0], event.number), act=_act_of(event)
                )
            )
        raise NotUnderstood(f"the torch function {name} is not understood")

    def binary(self, event: Event, make: Callable[..., Node]) -> Ref:
        out, operands = event.outputs[0], event.args[:2]
        numbers = [one for one in operands if isinstance(one, (int, float))]
        if make is Multiply and len(numbers) == 1 and not event.kwargs:
            x = next(one for one in operands if isinstance(one, Tensor))
            return self.add(Scale(rows=self.rows(out), x=self.value(x, event.number), factor=float(numbers[0])))
        alone = (1, self.length, out.shape[-1])
        fits = all(isinstance(one, Tensor) and (one.numel() == out.numel() or one.shape == alone) for one in operands)
        if not fits or len(event.args) > 2 or event.kwargs:
            raise NotUnderstood(f"{event.name} of other things than two values of one shape")
        a, b = (
            self.value(one, event.number)
            if one.numel() == out.numel() and one.shape != alone
            else self.alone(one, event)
            for one in operands
        )
        return self.add(make(rows=self.rows(out), a=a, b=b))

    def alone(self, tensor: Tensor, event: Event) -> Ref:
        """A value (1, length, width): that of the only text, or rows by position."""
        try:
            return self.positions(tensor, event.number)
        except NotUnderstood:
            if self.batch > 1:
                raise
            return self.value(tensor, event.number)

    def product(self, event: Event) -> Ref:
        x, weight, bias = (event.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
        held = {id(one): one for one in self.call.module.parameters()}
        if id(weight) not in held or (bias is not None and id(bias) not in held):
            raise NotUnderstood("linear with a weight that is not a parameter")
        return self.add(
            Product(rows=self.rows(event.outputs[0]), x=self.value(x, event.number), weight=weight, bias=bias)
        )

    def layer_norm(self, event: Event) -> Ref:
        x, shape = event.args[0], event.argument(1, "normalized_shape")
        if tuple(shape) != (x.shape[-1],):
            raise NotUnderstood("layer_norm over more than the last dimension")
        weight, bias = event.argument(2, "weight"), event.argument(3, "bias")
        norm = NormKind("layer", weight, bias, event.argument(4, "eps", 1e-5))
        return self.norm(norm, x, event.outputs[0], event.number)

    def attention(self, event: Event) -> Ref:
        q, k, v = (event.argument(i, name) for i, name in enumerate(("query", "key", "value")))
        mask, causal = event.argument(3, "attn_mask"), bool(event.argument(5, "is_causal", False))
        scale = event.kwargs.get("scale")
        if event.argument(4, "dropout_p", 0.0) or q.dim() != 4:
            raise NotUnderstood("attention with dropout, or without a dimension of heads")
        if self.length == 1:
            raise NotUnderstood("attention of a single token: whether it is causal cannot be seen")
        heads, groups = q.shape[1], event.kwargs.get("enable_gqa", False)
        k, v = (_grouped(one, heads, groups) for one in (k, v))
        cached = self.cache_of(k, v)
        if cached is not None:
            new_k, new_v, cache = cached
        else:
            new_k, new_v, cache = k, v, None
        before = event.number
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        query = self.heads(q, before)
        if isinstance(query.node, Scale) and query.whole:
            query, scale = query.node.x, scale * query.node.factor
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
        same = all(_same_flat(x, given[name]) for name in ("key", "value"))
        if not same or weight is None or any(extra) or given.get("add_zero_attn") or x.dim() != 3:
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
                if _same_flat(keys[:, :, : k.shape[2]], k) and _same_flat(values[:, :, : v.shape[2]], v):
                    for path, cache in self.caches():
                        if cache is event.what:
                            new_k, new_v = event.argument(0, "key_states"), event.argument(1, "value_states")
                            options = tuple((key, one) for key, one in event.kwargs.items())
                            if not all(_constant(one) for one in (*event.args[2:], *dict(options).values())):
                                raise NotUnderstood("the update of the cache takes tensors beside keys and values")
                            return new_k, new_v, CacheStep(path, tuple(event.args[2:]), options)
        return None

    def caches(self) -> Iterator[tuple[Path, Any]]:
        for path, value in leaves_of(self.call.args, self.call.kwargs):
            yield from caches_in(value, path)

    def heads(self, tensor: Tensor, before: int) -> Ref:
        """What (batch, heads, length, width) is computed from: rows, rotated or not."""
        if tensor.shape[0] != self.batch or tensor.shape[2] != self.length:
            raise NotUnderstood(f"attention to other tokens: shape {tuple(tensor.shape)}")
        rows = self.rows(tensor.transpose(1, 2))
        if (found := self.find(rows)) is not None:
            return found
        if (turned := self.rotation(tensor, before)) is not None:
            return turned
        return self.of_rows(rows, before, tuple(tensor.shape))

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
                        factors = [self.tensors[path].unsqueeze(1) for path in (cos, sin)]
                        if recognize.close(rotated(output, *factors, interleaved), tensor):
                            x = self.heads(output, event.number + 1)
                            rows, heads = self.rows(tensor.transpose(1, 2)), tensor.shape[1]
                            return self.add(
                                Rotate(rows=rows, x=x, heads=heads, cos=cos, sin=sin, interleaved=interleaved)
                            )
        return None

    def applied(self, value: Tensor) -> Applied:
        """Explains a part of the result that is not a row for each token."""
        for event in self.call.events:
            if event.name in (MODULE, CONTAINER) and event.outputs[0] is value and event.what in self.names:
                inputs = tensors_of((event.args, event.kwargs))
                if len(inputs) == 1 == len(event.args) and inputs[0].shape[:-1] == (self.batch, self.length):
                    return Applied(self.value(inputs[0], event.first), event.what)
        raise NotUnderstood(f"it returns a tensor of shape {tuple(value.shape)}")

    def ones(self, result: Any) -> tuple[Path, ...]:
        """The tensors of integers (batch, length) without zeros that nothing was computed from, such as the mask of texts
        without padding: with zeros they might count."""
        used: set[Path | None] = {self.hidden}
        for node in _needed(self.nodes, result):
            if isinstance(node, Lookup):
                used.add(node.path)
            if isinstance(node, Attend) and node.mask is not None:
                used |= node.mask.paths()
        left = [path for path, one in self.tensors.items() if _integers(one) and path not in used]
        return tuple(path for path in left if bool(self.tensors[path].all()))

    def mask(self, tensor: Tensor, before: int) -> Mask:
        """The mask as a tensor of the call, or as torch functions of such."""
        for path, given in self.tensors.items():
            if given is tensor or (given.shape == tensor.shape and given.dtype == tensor.dtype and given.equal(tensor)):
                return Mask(path)
            # Token ids that are 0 at padding are not the mask.
            if (
                path != self.hidden
                and _integers(given)
                and tensor.dtype == torch.bool
                and tensor.dim() == 4
                and _attends(given, tensor)
            ):
                return Mask(what=attending, args=(Mask(path),))
        event = next((one for one in self.call.events[:before] if any(out is tensor for out in one.outputs)), None)
        if event is None or event.name not in _REPLAYED or len(event.outputs) != 1:
            raise NotUnderstood("the mask of attention is computed in a way that is not understood")
        args, kwargs = event.args, event.kwargs
        if not all(isinstance(one, Tensor) or _constant(one) for one in (*args, *kwargs.values())):
            raise NotUnderstood(f"the mask of attention is computed by {event.name} with unusual arguments")

        def part(one: Any) -> Any:
            return self.mask(one, event.number) if isinstance(one, Tensor) else one

        return Mask(
            what=event.what,
            args=tuple(part(one) for one in args),
            kwargs=tuple((key, part(one)) for key, one in kwargs.items()),
        )


_FUNCTIONS: dict[str, Callable[[_Explainer, Event], Ref]] = {
    "add": lambda self, event: self.binary(event, Add),
    "mul": lambda self, event: self.binary(event, Multiply),
    "linear": _Explainer.product,
    "layer_norm": _Explainer.layer_norm,
    ATTENTION: _Explainer.attention,
    MULTI_HEAD: _Explainer.multi_head,
}
# Functions whose outputs have the tokens in other dimensions than the first two: what to exchange.
_TOKENS_INSIDE = {ATTENTION: (1, 2), MULTI_HEAD: (0, 1)}
# Functions that compute nothing: they give the same values in other places.
_MOVES = {
    *("transpose", "permute", "movedim", "swapaxes", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *(
        "dropout",
        "contiguous",
        "clone",
        "__getitem__",
        "expand",
        "chunk",
        "split",
        "unbind",
        "detach",
        "type_as",
        "view_as",
    ),
}
# Functions that a mask may be computed by: they take no sizes.
_REPLAYED = {"where", "add", "contiguous", "to", "expand_as", "logical_not", "float", "bool"}


def _act_of(event: Event) -> str:
    if event.name == "gelu" and event.kwargs.get("approximate", "none") == "tanh":
        return "gelu_tanh"
    return event.name


def attended(padding: Tensor) -> Tensor:
    """The mask (batch, 1, 1, length) of attention, true where to attend, of a padding mask (batch, length)."""
    return padding.logical_not()[:, None, None]


def attending(kept: Tensor) -> Tensor:
    """The mask (batch, 1, 1, length) of attention, true where to attend, of one (batch, length) that is 0 at padding."""
    return kept.bool()[:, None, None]


def _attends(kept: Tensor, mask: Tensor) -> bool:
    """Whether a mask is that of attention to what is kept. If everything is, that cannot be told."""
    full = attending(kept)
    fits = mask.shape[0] == full.shape[0] and mask.shape[-1] == full.shape[-1]
    return fits and not bool(full.all()) and torch.equal(full.expand_as(mask), mask)


def _integers(tensor: Tensor) -> bool:
    """Whether it may hold a number for each token (batch, length)."""
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.numel() > 0


def _looks_up(ids: Tensor, weight: Tensor, out: Tensor) -> bool:
    return torch.equal(F.embedding(ids, weight).reshape(-1), out.reshape(-1))


def _constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _grouped(tensor: Tensor, heads: int, grouped: bool) -> Tensor:
    """Keys or values (batch, heads, length, width) without the heads that were repeated for the queries."""
    if grouped or tensor.shape[1] != heads:
        return tensor
    for count in range(1, heads):
        if heads % count == 0:
            each = tensor.unflatten(1, (count, heads // count))
            if bool((each == each[:, :, :1]).all()):
                return each[:, :, 0]
    return tensor


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a[0], b[0]) and torch.equal(a, b)


def _same_flat(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.dtype == b.dtype and torch.equal(a.reshape(-1), b.reshape(-1))


def explain(call: Call, names: dict[nn.Module, str]) -> Explanation:
    """What a watched call computes.

    names: the modules inside the call's module, with their names in it.

    Raises:
        NotUnderstood: what it computes is not in the vocabulary; the message says what.
    """
    self = _Explainer(call, names)
    self.start()

    def part(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(part(one) for one in value)
        if is_dataclass(value) and isinstance(value, dict):
            return Record(type(value), tuple((key, part(one)) for key, one in value.items()))
        if isinstance(value, Tensor):
            given = next((path for path, one in self.tensors.items() if one is value), None)
            if given is not None:
                return Given(given)
            prefix = (self.batch, self.length) if self.dims == 3 else (self.length,)
            if tuple(value.shape[:-1]) != prefix:
                return self.applied(value)
            return Out(self.value(value, len(call.events)))
        if _constant(value):
            return Given(None, value)
        path = next((where for where, one in leaves_of(call.args, call.kwargs) if one is value), None)
        if path is None:
            raise NotUnderstood(f"it returns a {type(value).__name__}")
        return Given(path)

    result = part(call.result)
    ones = self.ones(result)
    caches = {node.cache.path for node in self.nodes if isinstance(node, Attend) and node.cache is not None}
    if len(caches) != sum(event.name == CACHE for event in call.events):
        raise NotUnderstood("it updates a cache that its attention does not read")
    return Explanation(self.hidden, result, tuple(_needed(self.nodes, result)), self.dims, ones)


def _needed(nodes: list[Node], result: Any) -> list[Node]:
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
