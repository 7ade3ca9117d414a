"""torch.nn.MultiheadAttention whose projections are Linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from .composite import CompositeKind, CompositeModule
from .experts_form import with_parameters
from .linear import Linear
from .module import QuantizedModule
from .weight import WeightView

if TYPE_CHECKING:
    from typing_extensions import Self

_SEPARATE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class _Held:
    """A dense layer as WeightView reads it."""

    layer: nn.Linear

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    scheme: Any = "dense"

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    def dequantized_weight(self) -> Tensor:
        return self.layer.weight


class MultiheadAttention(CompositeModule):
    """nn.MultiheadAttention with the Linear layers ``in_proj``, or ``q_proj``, ``k_proj`` and ``v_proj`` where keys or values
    have other sizes than queries, and ``out_proj``.

    While all are dense and unwatched, torch's own forward runs on their parameters. Else the layers are called, with
    torch's attention between them. Queries that are not the keys pass through the first third of ``in_proj``, keys and
    values through the rest; a watched ``in_proj`` is called as a whole.

    Args:
        shell: the dense module, with parameters without values.
        members: the layers.
    """

    def __init__(self, shell: nn.MultiheadAttention, members: dict[str, nn.Module]) -> None:
        super().__init__(members)
        self._shell = (shell,)  # in a tuple: it is no submodule
        self.embed_dim, self.num_heads, self.head_dim = shell.embed_dim, shell.num_heads, shell.head_dim
        self.kdim, self.vdim, self._qkv_same_embed_dim = shell.kdim, shell.vdim, shell._qkv_same_embed_dim
        self.dropout, self.batch_first, self.add_zero_attn = shell.dropout, shell.batch_first, shell.add_zero_attn
        self.bias_k: nn.Parameter | None
        self.bias_v: nn.Parameter | None
        self.train(shell.training)

    @classmethod
    def from_dense(cls, dense: nn.Module) -> Self:
        """A module on the memory of the dense module's parameters. The dense module does not change.

        Raises:
            TypeError: not an nn.MultiheadAttention.
        """
        if type(dense) is not nn.MultiheadAttention:
            raise TypeError(f"dense: must be a torch.nn.MultiheadAttention, got {type(dense).__name__}")
        bias = dense.in_proj_bias
        if dense._qkv_same_embed_dim:
            members: dict[str, nn.Module] = {"in_proj": _linear(dense.in_proj_weight, bias)}
        else:
            weights: tuple[Any, ...] = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
            biases: tuple[Any, ...] = (None,) * 3 if bias is None else bias.detach().chunk(3)
            parts = [None if one is None else nn.Parameter(one, bias.requires_grad) for one in biases]
            members = {
                name: _linear(weight, part) for name, weight, part in zip(_SEPARATE, weights, parts, strict=True)
            }
        members["out_proj"] = _linear(dense.out_proj.weight, dense.out_proj.bias)
        shell = _with(dense, {name: _empty(one) for name, one in dense._parameters.items()}, _emptied(dense.out_proj))
        new = cls(shell, members)
        for name in ("bias_k", "bias_v"):
            new.register_parameter(name, getattr(dense, name))
        return new

    @property
    def in_proj_weight(self) -> WeightView | None:
        """Shape, dtype and device of ``in_proj``'s weight. It is no tensor, so that torch's fused paths, which would
        never call the layers, are not taken."""
        layer: Any = self._modules.get("in_proj")
        if layer is None:
            return None
        held: Any = layer if isinstance(layer, QuantizedModule) else _Held(layer)
        return WeightView(held)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias of ``in_proj``, or of the three layers in its place."""
        layer: Any = self._modules.get("in_proj")
        if layer is not None:
            held: Tensor | None = layer.bias
            return held
        biases = [self._layer(name).bias for name in _SEPARATE]
        return None if biases[0] is None else torch.cat(biases)

    def close(self) -> nn.MultiheadAttention:
        """The dense module with the weights as they are now; those of quantized layers are dequantized."""
        return self._dense({name: _dequantized(self._layer(name)) for name in self._names})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention."""
        if not is_compiling() and self.is_dense and not self.is_watched():
            dense = self._dense({name: self._layer(name) for name in self._names})
            out: tuple[Tensor, Tensor | None] = dense(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return out
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True: is a hint about attn_mask, which must be given")
        self._check(query, key, value)
        batched = query.dim() == 3
        mask = self._mask(attn_mask, key_padding_mask, query.dtype)
        q, k, v = self._heads(self._projected(query, key, value), batched)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None and mask.shape[-1] != k.shape[2]:  # what is added to the keys is seen
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        y, weights = _attended(q, k, v, mask, dropout, need_weights)
        y = self._layer("out_proj")(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _layer(self, name: str) -> Any:
        return self._modules[name]

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = self.embed_dim, self.kdim, self.vdim
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width or x.is_nested:
                rule = f"must have 2 or 3 dimensions, as query has, the last of them {width}"
                raise ValueError(f"{name}: {tuple(x.shape) if not x.is_nested else 'nested'}, {rule}")

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if "in_proj" not in self._modules:
            found = (self._layer(name)(x) for name, x in zip(_SEPARATE, (query, key, value), strict=True))
            return tuple(found)
        width = self.embed_dim
        if query is key and key is value:
            return tuple(self._layer("in_proj")(query).chunk(3, -1))
        q = self._part(query, 0, width)
        if key is value:
            return (q, *self._part(key, width, 3 * width).chunk(2, -1))
        return q, self._part(key, width, 2 * width), self._part(value, 2 * width, 3 * width)

    def _part(self, x: Tensor, begin: int, end: int) -> Tensor:
        """Outputs of ``in_proj``, which only a watched one computes all."""
        layer = self._layer("in_proj")
        if self.is_watched():
            whole: Tensor = layer(x)
            return whole[..., begin:end]
        if isinstance(layer, Linear):
            return layer.part(x, begin, end)
        return F.linear(x, layer.weight[begin:end], None if layer.bias is None else layer.bias[begin:end])

    def _heads(self, rows: tuple[Tensor, ...], batched: bool) -> tuple[Tensor, ...]:
        """(batch, heads, length, head_dim) of queries, keys and values."""
        if not batched:
            rows = tuple(x.unsqueeze(0) for x in rows)
        elif not self.batch_first:
            rows = tuple(x.transpose(0, 1) for x in rows)
        q, k, v = rows
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)], 1)
        return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))

    def _mask(self, attn: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (batch or 1, heads or 1, queries or 1, keys)."""
        found = None
        if attn is not None:
            attn = _added(attn, dtype)
            found = attn.unsqueeze(0).unsqueeze(0) if attn.dim() == 2 else attn.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            # By functions that nybble.fuse can replay for other lengths.
            padding = _added(padding, dtype)
            padding = (padding.unsqueeze(0) if padding.dim() == 1 else padding).unsqueeze(1).unsqueeze(1)
            found = padding if found is None else found + padding
        return found

    def _dense(self, layers: dict[str, Any]) -> nn.MultiheadAttention:
        """The dense module with the parameters of dense layers."""
        held: dict[str, Any] = {"bias_k": self.bias_k, "bias_v": self.bias_v}
        if "in_proj" in layers:
            held |= {"in_proj_weight": layers["in_proj"].weight, "in_proj_bias": layers["in_proj"].bias}
        else:
            held |= {f"{name}_weight": layers[name].weight for name in _SEPARATE}
            biases = [layers[name].bias for name in _SEPARATE]
            grad = biases[0] is not None and biases[0].requires_grad
            held["in_proj_bias"] = None if biases[0] is None else nn.Parameter(torch.cat(biases).detach(), grad)
        out = with_parameters(
            self._shell[0].out_proj, {"weight": layers["out_proj"].weight, "bias": layers["out_proj"].bias}
        )
        return _with(self._shell[0], held, out).train(self.training)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A layer with these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _empty(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _emptied(layer: nn.Module) -> nn.Module:
    new = with_parameters(layer, {})
    new.__dict__["_parameters"] = {name: _empty(one) for name, one in layer._parameters.items()}
    return new


def _with(dense: nn.MultiheadAttention, parameters: dict[str, Any], out_proj: nn.Module) -> nn.MultiheadAttention:
    """A copy of a module with other parameters and another last layer."""
    new = with_parameters(dense, {})
    new.__dict__["_parameters"] = {**dense._parameters, **parameters}
    new.__dict__["_modules"] = {**dense._modules, "out_proj": out_proj}
    assert isinstance(new, nn.MultiheadAttention), "a copy of one"  # noqa: S101
    return new


def _dequantized(layer: Any) -> Any:
    return layer.dequantize() if isinstance(layer, QuantizedModule) else layer


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: of a bool one, -inf where it is true."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention, and its weights (batch, heads, queries, keys) if they are wanted."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights


def _matches(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention


MULTIHEAD_KIND = CompositeKind("MultiheadAttention", _matches, MultiheadAttention.from_dense)
