"""Chains of compiled steps against the same layers called one by one from torch, at the shapes of whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import Linear
from ..testing.chains import Tensors, layer
from .figures import Figure
from .timing import Runner, in_turns

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Encoder:
    """The shape of an encoder with the norm after each sum, and of its input."""

    batch: int
    length: int
    hidden: int = 384
    wide: int = 1536
    heads: int = 12
    layers: int = 6
    scheme: str = "w8a8"


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder layer that makes one token, with keys in a cache."""

    batch: int = 1
    keys: int = 256
    hidden: int = 2048
    wide: int = 5632
    heads: int = 32
    shared: int = 4
    layers: int = 4
    scheme: str = "w4a8g128"


def chain_figures(budget_s: float) -> Iterator[Figure]:
    """How many times faster a chain is than separate calls, and its time."""
    for shape in (Encoder(1, 12), Encoder(32, 40)):
        name = f"MiniLM shape, {shape.batch} x {shape.length} tokens"
        yield from _figures(name, encoder_chain(shape), encoder_calls(shape), budget_s)
    one = Decoder()
    yield from _figures(f"{one.layers} Llama layers, 1 token", decoder_chain(one), decoder_calls(one), budget_s)


def _figures(name: str, chain: Call, calls: Call, budget_s: float) -> Iterator[Figure]:
    with torch.inference_mode():
        timings, _ = in_turns([Runner([chain]), Runner([calls])], budget_s)
    fast, slow = (timing.median for timing in timings)
    yield Figure(f"{name}, chain over separate calls", slow / fast, "x", 1.0, at_most=False)
    yield Figure(f"{name}, chain", fast * 1e3, " ms", slow * 1e3)


def _input(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def _square(shape: Encoder | Decoder, width: int, seed: int) -> Linear:
    return layer(shape.scheme, width, shape.hidden, seed=seed, bias=isinstance(shape, Encoder))


def _mlp(shape: Encoder | Decoder, seed: int) -> tuple[Linear, Linear]:
    bias = isinstance(shape, Encoder)
    up = layer(shape.scheme, shape.wide, shape.hidden, seed=seed, bias=bias)
    return up, layer(shape.scheme, shape.hidden, shape.wide, seed=seed, bias=bias)


def encoder_chain(shape: Encoder) -> Call:
    hidden, x = shape.hidden, _input(shape.batch * shape.length, shape.hidden)
    mask = torch.ones(shape.batch, 1, 1, shape.length, dtype=torch.bool)
    chain, ones, zeros = (
        Tensors([x, torch.empty_like(x)], [hidden] * 7 + [shape.wide]),
        torch.ones(hidden),
        torch.zeros(hidden),
    )
    here = 0
    for i in range(shape.layers):
        q, k, v, o = (_square(shape, hidden, 9 * i + j) for j in range(4))
        up, down = _mlp(shape, i)
        chain.linears(here, [chain.weight(one, 2 + j) for j, one in enumerate((q, k, v))])
        width = hidden // shape.heads
        chain.chain.add_attention(2, 3, 4, 5, shape.heads, shape.heads, width, width**-0.5, causal=False, mask=0)
        chain.linears(5, [chain.weight(o, 2, residual=here)])
        chain.linears(2, [chain.weight(up, 9, "gelu")], norm=("layer", ones, zeros, 1e-12), normed=3)
        chain.linears(9, [chain.weight(down, 4, residual=3)])
        here = 1 if i == shape.layers - 1 else 6
        chain.norm(4, here, "layer", ones, zeros, eps=1e-12)
    return _runs(chain, shape.batch, [mask])


def encoder_calls(shape: Encoder) -> Call:
    hidden, x = shape.hidden, _input(shape.batch * shape.length, shape.hidden).view(shape.batch, shape.length, -1)
    mask = torch.ones(shape.batch, 1, 1, shape.length, dtype=torch.bool)
    ones, zeros = torch.ones(hidden), torch.zeros(hidden)
    layers = [(*(_square(shape, hidden, 9 * i + j) for j in range(4)), *_mlp(shape, i)) for i in range(shape.layers)]

    def heads(y: Tensor) -> Tensor:
        return y.view(shape.batch, shape.length, shape.heads, -1).transpose(1, 2)

    def run() -> Tensor:
        y = x
        for q, k, v, o, up, down in layers:
            mixed = F.scaled_dot_product_attention(heads(q(y)), heads(k(y)), heads(v(y)), mask)
            y = F.layer_norm(o(mixed.transpose(1, 2).reshape(x.shape)) + y, (hidden,), ones, zeros, 1e-12)
            y = F.layer_norm(down(F.gelu(up(y))) + y, (hidden,), ones, zeros, 1e-12)
        return y

    return run


def _runs(chain: Tensors, batch: int, tables: Sequence[Tensor]) -> Call:
    """Runs the chain, and gives its second matrix."""

    def run() -> Tensor:
        chain.run(torch.get_num_threads(), batch, tables)
        return chain.given[1]

    return run


def _cache(shape: Decoder) -> tuple[Tensor, Tensor]:
    size = (shape.batch, shape.shared, shape.keys, shape.hidden // shape.heads)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def _decoder_layers(shape: Decoder) -> list[tuple[Linear, ...]]:
    small = shape.shared * shape.hidden // shape.heads
    return [
        (
            *(_square(shape, width, 9 * i + j) for j, width in enumerate((shape.hidden, small, small, shape.hidden))),
            *_mlp(shape, i),
            _mlp(shape, i + 99)[0],
        )
        for i in range(shape.layers)
    ]


def decoder_chain(shape: Decoder) -> Call:
    hidden, width = shape.hidden, shape.hidden // shape.heads
    x, ones, cache = _input(shape.batch, hidden), torch.ones(hidden), _cache(shape)
    small = shape.shared * width
    chain = Tensors([x, torch.empty_like(x)], [hidden, small, small, hidden, hidden, hidden, shape.wide, shape.wide])
    here = 0
    for i, (q, k, v, o, up, down, gate) in enumerate(_decoder_layers(shape)):
        last = i == shape.layers - 1
        weights = [chain.weight(one, 2 + j) for j, one in enumerate((q, k, v))]
        chain.linears(here, weights, norm=("rms", ones, None, 1e-6))
        chain.chain.add_attention(2, 0, 1, 5, shape.heads, shape.shared, width, width**-0.5, causal=True, cached=True)
        chain.linears(5, [chain.weight(o, 6, residual=here)])
        pair = [chain.weight(up, 8), chain.weight(gate, 9, "silu", other=8)]
        chain.linears(6, pair, norm=("rms", ones, None, 1e-6))
        here = 1 if last else 7
        chain.linears(9, [chain.weight(down, here, residual=6)])
    return _runs(chain, shape.batch, cache)


def decoder_calls(shape: Decoder) -> Call:
    x, ones, (keys, values) = _input(shape.batch, shape.hidden), torch.ones(shape.hidden), _cache(shape)
    layers = _decoder_layers(shape)

    def run() -> Tensor:
        y = x
        for q, k, v, o, up, down, gate in layers:
            normed = F.rms_norm(y, (shape.hidden,), ones, 1e-6)
            head, _, _ = (q(normed).view(shape.batch, shape.heads, 1, -1), k(normed), v(normed))
            mixed = F.scaled_dot_product_attention(head, keys, values, enable_gqa=True)
            y = y + o(mixed.reshape(x.shape))
            normed = F.rms_norm(y, (shape.hidden,), ones, 1e-6)
            y = y + down(F.silu(gate(normed)) * up(normed))
        return y

    return run
