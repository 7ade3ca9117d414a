"""Where a transformer in Llama form keeps the weights that write to and read from what flows between its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn

_READERS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
_VALUES = ("self_attn.v_proj", "self_attn.o_proj")
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

_Kind = TypeVar("_Kind", bound=nn.Module)


@dataclass(frozen=True)
class Llama:
    """embedding: the first to write. readers: each norm, and the layers that alone read it. writers: layers that add.

    values: of each block the layers that make the values of its heads, and that take what these are mixed to.
    head_size: of these heads, or None where the model does not say.
    """

    embedding: nn.Embedding
    readers: tuple[tuple[nn.Module, tuple[nn.Linear, ...]], ...]
    writers: tuple[nn.Linear, ...]
    values: tuple[tuple[nn.Linear, nn.Linear], ...]
    head_size: int | None

    def layers(self) -> list[nn.Linear]:
        """All readers and writers."""
        return [layer for _, read in self.readers for layer in read] + list(self.writers)


def find(model: nn.Module) -> Llama:
    """The parts, by the names that Llama's have. Raises ValueError that names what is missing, or of another type."""
    inner = _get(model, "model", nn.Module)
    blocks = list(_get(inner, "layers", nn.ModuleList))
    readers = [
        (_norm(block, norm), tuple(_get(block, name, nn.Linear) for name in names))
        for block in blocks
        for norm, names in _READERS
    ]
    readers.append((_norm(inner, "norm"), (_get(model, "lm_head", nn.Linear),)))
    values = [tuple(_get(block, name, nn.Linear) for name in _VALUES) for block in blocks]
    size = getattr(_get(blocks[0], "self_attn", nn.Module), "head_dim", None) if blocks else None
    return Llama(
        embedding=_get(inner, "embed_tokens", nn.Embedding),
        readers=tuple(readers),
        writers=tuple(_get(block, name, nn.Linear) for block in blocks for name in _WRITERS),
        values=tuple((v, o) for v, o in values),
        head_size=size if isinstance(size, int) else None,
    )


def _get(parent: nn.Module, name: str, kind: type[_Kind]) -> _Kind:
    found: object = parent
    for key in name.split("."):
        found = getattr(found, key, None)
    exact = type(found) is kind or kind is nn.Module
    if not isinstance(found, kind) or not exact:
        raise ValueError(f"model: not in Llama form, {name} is a {type(found).__name__}, wants {kind.__name__}")
    return found


def _norm(parent: nn.Module, name: str) -> nn.Module:
    norm = _get(parent, name, nn.Module)
    if {key for key, value in norm._parameters.items() if value is not None} != {"weight"} or norm._modules:
        raise ValueError(
            f"model: not in Llama form, {name} is a {type(norm).__name__}, wants a norm with a weight alone"
        )
    return norm
