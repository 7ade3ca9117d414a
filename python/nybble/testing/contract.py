"""The table of modules that the contract suite runs on: what every kind of module that nybble replaces must be able to do.

A row is a dense module in a model, inputs for it, and the schemes that it can have. The suite is tests/test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Contract:
    """A module that the suite runs on.

    Attributes:
        name: of the row.
        dense: makes the dense module, with the random state as it is.
        inputs: makes the arguments of a call.
        schemes: those that are tried.
        bad: calls that must be refused: arguments, and a pattern that the message of the error must match.
        least_coverage: percent of the weight bytes that must be quantized.
        forks: whether it runs in a forked child. False if between nybble's kernels it calls functions of torch that
            share their work among threads: there they wait for ever for the threads of the parent, as libgomp's pool
            does not survive a fork. That is so of torch's attention in MultiheadAttention, dense or quantized, if the
            parent has run a parallel function of torch before; nybble's own kernels run on one thread in such a child.
        closeness: the largest relative error of the output against the dense module, by scheme; of others 0.05.
    """

    name: str
    dense: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    schemes: tuple[str, ...]
    bad: tuple[tuple[tuple[Any, ...], str], ...] = ()
    least_coverage: float = 95.0
    forks: bool = True
    closeness: tuple[tuple[str, float], ...] = (("w4a8", 0.3), ("w4a16", 0.3))

    def error_of(self, scheme: str) -> float:
        """The largest relative error that a scheme may have."""
        return next((most for start, most in self.closeness if scheme.startswith(start)), 0.05)


class Holder(nn.Module):
    """A model that is nothing but one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        """The layer's output."""
        return self.layer(*args)


class FusedExperts(nn.Module):
    """Experts as in transformers' Mixtral, Qwen3-MoE and OLMoE."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            gate, up = self._up(hidden_states[token], expert).chunk(2, dim=-1)
            y = self._down(self.act_fn(gate) * up, expert) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _up(self, x: Tensor, expert: int) -> Tensor:
        return nn.functional.linear(x, self.gate_up_proj[expert])

    def _down(self, x: Tensor, expert: int) -> Tensor:
        return nn.functional.linear(x, self.down_proj[expert])


class InterleavedExperts(nn.Module):
    """Experts as in transformers' gpt-oss: transposed, with biases, and gates and ups in turns, which have limits."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts, self.alpha, self.limit = experts, 1.702, 2.0
        self.gate_up_proj = nn.Parameter(torch.randn(experts, hidden, 2 * inner) * 2 * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(experts, inner, hidden) * inner**-0.5)
        self.down_proj_bias = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts."""
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(router_indices == expert)
            both = hidden_states[token] @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
            gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
            inner = (up + 1) * gate * torch.sigmoid(gate * self.alpha)
            y = inner @ self.down_proj[expert] + self.down_proj_bias[expert]
            out.index_add_(0, token, (y * routing_weights[token, place, None]).to(out.dtype))
        return out


def _routed(tokens: int, experts: int, top_k: int, hidden: int) -> Callable[[], tuple[Tensor, ...]]:
    """Hidden states, the experts of each token, and their weights."""

    def make() -> tuple[Tensor, ...]:
        index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
        return torch.randn(tokens, hidden), index, torch.rand(tokens, top_k)

    return make


def _self_attention(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),) * 3


_INDEX, _WEIGHT = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)


def _rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


CONTRACTS: tuple[Contract, ...] = (
    Contract(
        "Linear",
        lambda: nn.Linear(71, 33),
        _rows(5, 71),
        ("w8a8", "w8a16", "w4a8", "w4a16g32", "w4a8g64asym"),
        bad=(((torch.zeros(5, 70),), r"K=71|71"), ((torch.zeros(5, 71, dtype=torch.float64),), "float64")),
    ),
    Contract("Linear without bias", lambda: nn.Linear(40, 1, bias=False), _rows(2, 3, 40), ("w8a8",)),
    Contract(
        "LSTM",
        lambda: nn.LSTM(33, 19, 2, bidirectional=True),
        _rows(7, 3, 33),
        ("w8a8", "w8a16", "w4a8", "w4a16g32"),
        bad=(((torch.zeros(7, 3, 32),), "input_size=33"), ((torch.zeros(7, 3, 33, dtype=torch.float64),), "float64")),
    ),
    Contract("GRU", lambda: nn.GRU(48, 64, batch_first=True), _rows(4, 5, 48), ("w8a8", "w4a8g32")),
    Contract("GRU of one sequence, without bias", lambda: nn.GRU(9, 1, bias=False), _rows(1, 9), ("w8a8",)),
    Contract(
        "Experts",
        lambda: FusedExperts(6, 64, 48),
        _routed(19, 6, 2, 64),
        ("w8a8", "w8a16", "w4a8g32"),
        bad=(
            ((torch.zeros(2, 63), _INDEX, _WEIGHT), r"x: \(2, 63\) torch.float32 on cpu, must be \(T, 64\)"),
            ((torch.zeros(2, 64), _INDEX + 7, _WEIGHT), r"index: has the expert 7, must be in \[0, 6\]"),
            ((torch.zeros(2, 64), _INDEX, _WEIGHT[:1]), r"weight: \(1, 1\)"),
            ((torch.zeros(2, 1, 64), _INDEX, _WEIGHT), r"hidden_states: \(2, 1, 64\), must be \(T, K\)"),
        ),
    ),
    Contract(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(48, 4, batch_first=True),
        _self_attention(3, 5, 48),
        ("w8a8", "w8a16", "w4a8g32"),
        bad=(((torch.zeros(3, 5, 47),) * 3, r"query: \(3, 5, 47\), must have 2 or 3 dimensions"),),
        forks=False,
    ),
    Contract(
        "MultiheadAttention to other tokens",
        lambda: nn.MultiheadAttention(48, 4, batch_first=True),
        lambda: (torch.randn(3, 5, 48), *(torch.randn(3, 7, 48),) * 2),
        ("w8a8",),
        forks=False,
    ),
    Contract(
        "MultiheadAttention with other keys and values",
        lambda: nn.MultiheadAttention(32, 2, kdim=24, vdim=40, add_bias_kv=True, add_zero_attn=True),
        lambda: (torch.randn(5, 2, 32), torch.randn(7, 2, 24), torch.randn(7, 2, 40)),
        ("w8a8",),
        forks=False,
    ),
    Contract("interleaved Experts", lambda: InterleavedExperts(4, 38, 21), _routed(1, 4, 1, 38), ("w8a8", "w4a8")),
    Contract(
        "Embedding",
        lambda: nn.Embedding(33, 71, padding_idx=2),
        lambda: (torch.randint(33, (3, 5)),),
        ("w8a8", "w4a16g32", "w4a8g64asym"),
        bad=(((torch.tensor([3, 33]),), r"33 .*item 1.*\[0, 33\)"), ((torch.zeros(5),), "float32")),
    ),
    Contract(
        "EmbeddingBag",
        lambda: nn.EmbeddingBag(19, 40, mode="sum"),
        lambda: (torch.randint(19, (9,)), torch.tensor([0, 4, 4, 7])),
        ("w8a8", "w4a16g32"),
        bad=(
            ((torch.tensor([-1]), torch.tensor([0])), r"-1 .*\[0, 19\)"),
            ((torch.zeros(5, dtype=torch.int64),), "offsets"),
        ),
    ),
    Contract(
        "Conv2d",
        lambda: nn.Conv2d(12, 20, (3, 2), 2, 1),
        _rows(2, 12, 9, 8),
        ("w8a8", "w8a16", "w4a8", "w4a16g32"),
        bad=(
            ((torch.zeros(2, 11, 9, 8),), "11 channels"),
            ((torch.zeros(2, 12, 9, 8, dtype=torch.float64),), "float64"),
        ),
    ),
    Contract("Conv2d without a batch", lambda: nn.Conv2d(5, 7, 3, bias=False), _rows(5, 8, 8), ("w8a8",)),
    Contract("Conv2d depthwise", lambda: nn.Conv2d(19, 19, 3, 1, 1, groups=19), _rows(2, 19, 6, 7), ("w8a8", "w8a16")),
    Contract("Conv2d with groups", lambda: nn.Conv2d(24, 36, 3, groups=3), _rows(1, 24, 7, 7), ("w8a8", "w4a8g32")),
    Contract(
        "Conv2d padded unevenly",
        lambda: nn.Conv2d(6, 8, 4, padding="same"),
        _rows(2, 6, 9, 9),
        ("w8a8",),
    ),
    Contract("Conv1d", lambda: nn.Conv1d(10, 24, 5, 2, 2), _rows(2, 10, 31), ("w8a8", "w4a16g32")),
    Contract("ConvTranspose1d", lambda: nn.ConvTranspose1d(20, 9, 4, 2, 1), _rows(2, 20, 11), ("w8a8", "w8a16")),
)
