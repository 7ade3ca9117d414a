"""Find the layers of a Llama-like transformer that read and write the residual stream, by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

_READERS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
_VALUES = ("self_attn.v_proj", "self_attn.o_proj")
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

_Kind = TypeVar("_Kind", bound=nn.Module)


class Readers(NamedTuple):
    """A norm and the layers that read its output. one_plus: it multiplies by 1 + its weight, as Gemma's do."""

    norm: nn.Module
    layers: tuple[nn.Linear, ...]
    one_plus: bool


@dataclass(frozen=True)
class Llama:
    """The parts of a Llama-like model around its residual stream.

    embedding: writes it first. readers: each norm with the layers that read it. writers: layers whose output is added.
    values: the value and output projection of each block. head_size: of the values, or None if the model does not say.
    """

    embedding: nn.Embedding
    readers: tuple[Readers, ...]
    writers: tuple[nn.Linear, ...]
    values: tuple[tuple[nn.Linear, nn.Linear], ...]
    head_size: int | None

    def layers(self) -> list[nn.Linear]:
        """All readers and writers."""
        return [layer for read in self.readers for layer in read.layers] + list(self.writers)


def find(model: nn.Module) -> Llama:
    """Find the parts by transformers' Llama names.

    Raises:
        ValueError: a part is missing or of another type, or the blocks have further norms; the message names it.
    """
    inner = _get(model, "model", nn.Module)
    blocks = list(_get(inner, "layers", nn.ModuleList))
    for block in blocks:
        _refuse_more_norms(block)
    readers = [
        _readers(block, norm, tuple(_get(block, name, nn.Linear) for name in names))
        for block in blocks
        for norm, names in _READERS
    ]
    readers.append(_readers(inner, "norm", (_get(model, "lm_head", nn.Linear),)))
    values = [tuple(_get(block, name, nn.Linear) for name in _VALUES) for block in blocks]
    size = getattr(_get(blocks[0], "self_attn", nn.Module), "head_dim", None) if blocks else None
    return Llama(
        embedding=_embedding(inner),
        readers=tuple(readers),
        writers=tuple(_get(block, name, nn.Linear) for block in blocks for name in _WRITERS),
        values=tuple((v, o) for v, o in values),
        head_size=size if isinstance(size, int) else None,
    )


def _get(parent: nn.Module, name: str, kind: type[_Kind]) -> _Kind:
    found: object = parent
    for key in name.split("."):
        found = getattr(found, key, None)
    if found is None:
        raise ValueError(f"model: not in Llama form: has no {name}")
    exact = type(found) is kind or kind is nn.Module
    if not isinstance(found, kind) or not exact:
        got = f"{type(found).__module__}.{type(found).__qualname__}"
        rule = "a module" if kind is nn.Module else f"exactly torch.nn.{kind.__name__}"
        raise ValueError(f"model: not in Llama form: {name} is {got}, must be {rule}")
    return found


def _embedding(parent: nn.Module) -> nn.Embedding:
    """An embedding that returns rows of its weight, or, as Gemma's does, rows times a constant."""
    found = getattr(parent, "embed_tokens", None)
    if isinstance(found, nn.Embedding) and type(found) is not nn.Embedding:
        ones = found.weight.detach().new_ones(1, 1).expand_as(found.weight)
        given = functional_call(found, {"weight": ones}, (torch.zeros(1, 1, dtype=torch.int64, device=ones.device),))
        if isinstance(given, Tensor) and given.shape == (1, 1, ones.shape[1]) and bool((given == given[0, 0, 0]).all()):
            return found
    return _get(parent, "embed_tokens", nn.Embedding)


def _readers(parent: nn.Module, name: str, layers: tuple[nn.Linear, ...]) -> Readers:
    norm = _get(parent, name, nn.Module)
    if {key for key, value in norm._parameters.items() if value is not None} != {"weight"} or norm._modules:
        raise ValueError(
            f"model: not in Llama form: {name} is {type(norm).__name__}, must be a norm with only a weight"
        )
    weight = cast(Tensor, norm.weight).detach()
    x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)[None]
    for one_plus in (False, True):
        # The weight that makes its output 0 shows whether it multiplies by weight or by 1 + weight.
        if not functional_call(norm, {"weight": torch.full_like(weight, -float(one_plus))}, (x,)).any():
            return Readers(norm, layers, one_plus)
    raise ValueError(
        f"model: not in Llama form: {name} is {type(norm).__name__}, which multiplies neither by its weight nor by "
        "1 + its weight"
    )


def _refuse_more_norms(block: nn.Module) -> None:
    """Refuse blocks with norms of a layer's output: the rotation does not commute with them."""
    known = {name for name, _ in _READERS}
    more = [name for name, child in block.named_children() if "norm" in name.lower() and name not in known]
    if more:
        raise ValueError(f"model: not in Llama form: its blocks have further norms: {', '.join(more)}")
