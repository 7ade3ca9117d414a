"""Checks of calibration on several ranks, one process for each; tests/test_parallel_calibration.py runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nybble
from nybble.parallel import calibrate_alone

sys.path.insert(0, str(Path(__file__).parent))
import ranks


class Block(nn.Module):
    """An MLP with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens to logits, by a chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(64, 32), nn.ModuleList([Block(), Block()]), nn.Linear(32, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made() -> Model:
    """The same dense model on every rank."""
    torch.manual_seed(0)
    return Model().eval()


def tokens(batches: int = 6) -> list[Tensor]:
    """Batches of token ids of several lengths, the same on every rank."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(64, (2, 5 + 3 * i), generator=draw) for i in range(batches)]


def own(batches: list[Tensor]) -> list[Tensor]:
    """This rank's share, in the order of ranks."""
    places = torch.arange(len(batches)).tensor_split(dist.get_world_size())[dist.get_rank()]
    return [batches[i] for i in places]


def data_without_a_word_is_refused(folder: Path) -> None:
    """Each rank would get other codes; without data nothing is refused."""
    data = own(tokens())
    recipe = nybble.Recipe((nybble.recipe.Stage("quantize", {"scheme": "w8a8static", "goal": "memory"}),))
    calls = {
        "calibration: ": (
            lambda: nybble.quantize(made(), "w4a16g32", method="gptq", calibration=data, goal="memory"),
            lambda: nybble.sparsify(made(), "2:4", calibration=data, goal="memory"),
            lambda: nybble.optimize(made(), recipe, calibration=data),
        ),
        "data: ": (
            lambda: nybble.sensitivity(made(), "w8a8", data),
            lambda: nybble.plan(made(), "w8a8", data, budget={"bytes": 1e9}),
            lambda: nybble.recover(made(), reference=made(), data=data),
        ),
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"{name}torch.distributed has 2 ranks"):
                call()
    nybble.quantize(made(), "w8a8", goal="memory")


def one_rank_calibrates_alone(folder: Path) -> None:
    if dist.get_rank() == 0:
        model = made()
        with calibrate_alone():
            nybble.quantize(model, "w8a8static", calibration=tokens(), goal="memory")
        with pytest.raises(ValueError, match="2 ranks"):
            nybble.quantize(made(), "w8a8static", calibration=tokens(), goal="memory")
        assert str(model.head.scheme) == "w8a8static"
    dist.barrier()


CHECKS = {one.__name__: one for one in (data_without_a_word_is_refused, one_rank_calibrates_alone)}

if __name__ == "__main__":
    ranks.main(CHECKS)
