"""Small models and data for tests of the passes, and helpers to inspect what a pass did to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model.inputs import Inputs
from ..nn import Linear
from ..passes.sensitivity.variants import PRUNE, apply
from ..passes.sparsify import sparsify
from ..report.report import Report
from ..weights.scheme import Scheme


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.down(torch.relu(self.up(self.norm(x)))), None


class Stack(nn.Module):
    """A small model with Linear layers before, in and after repeated blocks: ids (B, T) in 0..49 -> logits (B, T, 8)."""

    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits; the mask is ignored here, but passes use it to leave out padding."""
        x = self.first(self.embed(ids))
        for block in self.blocks:
            x = block(x, scale=0.5)[0]
        logits: Tensor = self.head(x)
        return logits


def token_batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    """Calibration batches for a Stack: token ids, int64 (4, 24) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (4, 24), generator=generator) for _ in range(count)]


def correlated_inputs(rows: int = 2048, k: int = 256) -> Tensor:
    """Rows (rows, k) of Gaussian noise; channels i and j have correlation 0.9^|i - j|."""
    distance = (torch.arange(k)[:, None] - torch.arange(k)).abs()
    root: Tensor = torch.linalg.cholesky(0.9 ** distance.float())
    return torch.randn(rows, k) @ root.T


def gathered(x: Tensor) -> Inputs:
    """The input statistics, with Hessian, of a layer with inputs x (T, K)."""
    inputs = Inputs(x.shape[1], hessian=True)
    for batch in x.split(512):
        inputs.add(batch)
    return inputs


class Residual(nn.Module):
    """Maps x (..., width) to logits (..., width); its layers, without bias, contribute equally to the output."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        for layer in self.layers:
            layer.weight.data = torch.randn(width, width, generator=draw) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Add each layer's output; its input is normalized to a root mean square of 1."""
        for layer in self.layers:
            x = x + layer(nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5)
        return x


def sparsify_small(model: nn.Module, pattern: Any = "50%", **options: Any) -> Report:
    """``sparsify`` with goal="memory" and a Stack's calibration batches, unless ``options`` says otherwise."""
    return sparsify(model, pattern, **{"goal": "memory", "calibration": token_batches(), **options})


def give_scheme(model: nn.Module, scheme: str) -> None:
    """Give all layers a scheme: round to nearest and, for a sparse scheme, prune by magnitude."""
    parsed = Scheme.parse(scheme)
    apply(model, parsed, {} if parsed.sparsity is None else PRUNE)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers by name, quantized or not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Linear))}


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight (N, K) of a Linear layer."""
    weight: Tensor = layer.dequantized_weight() if isinstance(layer, Linear) else layer.weight.detach()  # type: ignore[operator]
    return weight


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """The modules and tensors of a model, to compare before and after: equal lists mean that nothing has changed."""
    return [
        *((name, id(module), module.training) for name, module in model.named_modules()),
        *((name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())),
        *((name, tensor.double().sum().item()) for name, tensor in model.state_dict().items()),
    ]


class Reads(nn.Module):
    """An embedding, a convolution over the tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image, self.head = nn.Embedding(50, 32), nn.Conv1d(32, 40, 3), nn.Linear(40, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (batch, tokens) -> (batch, 3)."""
        result: Tensor = self.head(self.image(self.words(ids).transpose(1, 2)).mean(-1))
        return result

    @staticmethod
    def batches() -> list[Tensor]:
        """Ids of two lengths."""
        return [torch.arange(tokens)[None] for tokens in (7, 12)]
