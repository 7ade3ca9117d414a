"""Checks of calibration on several ranks, one process for each; tests/test_parallel_calibration.py runs them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nybble
from nybble.parallel import calibrate_alone, share_batches
from nybble.recipe import Stage

sys.path.insert(0, str(Path(__file__).parent))
import ranks

RARE = 7
Run = Callable[[nn.Module, list[Any]], Any]


class Block(nn.Module):
    """An MLP with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens to logits, by a chain of blocks and a layer that a first token calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(64, 32), nn.ModuleList([Block(), Block()]), nn.Linear(32, 64)
        self.rare = nn.Linear(32, 32)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        if tokens[0, 0] == RARE:
            x = x + self.rare(x)
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
    recipe = nybble.Recipe((Stage("quantize", {"scheme": "w8a8static", "goal": "memory"}),))
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
            with pytest.raises(ValueError, match=f"{name}torch.distributed has {dist.get_world_size()} ranks"):
                call()
    nybble.quantize(made(), "w8a8", goal="memory")


def one_rank_calibrates_alone(folder: Path) -> None:
    if dist.get_rank() == 0:
        model = made()
        with calibrate_alone():
            nybble.quantize(model, "w8a8static", calibration=tokens(), goal="memory")
        with pytest.raises(ValueError, match=f"{dist.get_world_size()} ranks"):
            nybble.quantize(made(), "w8a8static", calibration=tokens(), goal="memory")
        assert str(model.head.scheme) == "w8a8static"
    dist.barrier()


def quantize(*args: Any, **more: Any) -> Run:
    return lambda model, data: nybble.quantize(model, *args, **more, calibration=data, goal="memory")


def sparsify(*args: Any, **more: Any) -> Run:
    return lambda model, data: nybble.sparsify(model, *args, **more, calibration=data, goal="memory")


RUNS: dict[str, Run] = {
    "gptq": quantize("w4a16g32", method="gptq"),
    "gptq of whole rows, static": quantize("w8a8static", method="gptq", observer="minmax"),
    "static": quantize("w8a8static"),
    "percentile": quantize("w4a8g32static", observer="percentile"),
    "choice, by gptq": quantize(("w8a8", "w4a16g32", "w4a8g32static"), method="gptq", max_error=0.05),
    "awq": quantize("w4a16g32", method="awq"),
    "smooth, static": quantize("w8a8static", smooth=True),
    "wanda": sparsify("2:4"),
    "wanda, permuted": sparsify("2:4", permute=[("blocks.0.up", "blocks.0.down"), ("blocks.1.up", "blocks.1.down")]),
    "sparsegpt": sparsify("50%", method="sparsegpt", scheme="w4a16g32"),
    "sparsegpt in floats": sparsify("50%", method="sparsegpt", scheme=None),
    "wanda by layer": sparsify("50%", per_layer=True, scheme="w8a8static"),
}


# What the report of a run must say, so that the case is what it is meant to be.
SAID = {
    "awq": "inputs scaled",
    "smooth, static": "inputs scaled",
    "wanda, permuted": "permutation_gain=0.",
    "gptq": "method='gptq'",
    "sparsegpt": "method='sparsegpt'",
}


def same_as_one_process(run: Run, data: list[Any], name: str, make: Callable[[], nn.Module] = made) -> nn.Module:
    """Ranks that share the batches get the codes and masks of one process that has them all, and all ranks the same bits."""
    alone, shared = make(), make()
    with calibrate_alone():
        wanted = run(alone, data)
    with share_batches():
        found = run(shared, own(data))
    same(shared, alone, name)
    assert str(found.layers) == str(wanted.layers), name
    assert SAID.get(name, "") in str(found.layers), name
    same_on_all_ranks(shared, name)
    return shared


def same(model: nn.Module, other: nn.Module, name: str) -> None:
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys(), name
    for key, one in model.state_dict().items():
        assert torch.equal(bits(state[key]), bits(one)), f"{name}: {key}"


def same_on_all_ranks(model: nn.Module, name: str) -> None:
    for key, one in model.state_dict().items():
        first = bits(one).clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, bits(one)), f"{name}: {key}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def batches_of_all_ranks_count(folder: Path) -> None:
    for name, run in RUNS.items():
        shared = same_as_one_process(run, tokens(), name)
        lone = made()
        with calibrate_alone():
            run(lone, own(tokens()))
        codes = [{key: one.tolist() for key, one in each.state_dict().items()} for each in (lone, shared)]
        assert codes[0] != codes[1], f"{name}: the batches of one rank give the same model"


def held_out_rows_are_those_of_one_process(folder: Path) -> None:
    """Where the other ranks have fewer rows than may be held out, more, or a number that is not a multiple of eight."""
    for lengths in ((3, 2, 1, 1), (5, 700, 9, 300), (700, 900, 900, 700)):
        draw = torch.Generator().manual_seed(2)
        data = [torch.randint(64, (1, length), generator=draw) for length in lengths]
        for name in ("gptq", "static", "wanda by layer"):
            same_as_one_process(RUNS[name], data, f"{name} {lengths}")


def batches_that_are_padded_bad_or_call_other_layers(folder: Path) -> None:
    """A layer that one rank alone calls, NaN on one rank, padding, and a model in bfloat16."""

    def broken() -> nn.Module:
        model = made().bfloat16()
        model.embed.weight.data[63] = math.nan
        return model

    draw = torch.Generator().manual_seed(3)
    data = []
    for i in range(5):
        ids = torch.randint(RARE + 1, 63, (2, 20), generator=draw)
        ids[0, 0], ids[1, 1] = (RARE if i == 4 else 8), (63 if i == 1 else 8)
        data.append({"tokens": ids, "attention_mask": torch.arange(20) < torch.tensor([[20], [3 + i]])})
    for name in ("gptq of whole rows, static", "percentile", "wanda", "sparsegpt"):
        same_as_one_process(RUNS[name], data, name, broken)


def arguments_that_ranks_cannot_share(folder: Path) -> None:
    data, rank = own(tokens()), dist.get_rank()
    refused: dict[str, Run] = {
        "goal='speed': within share_batches, ranks may": lambda model, data: nybble.quantize(model, calibration=data),
        "fuse=True: within": quantize("w8a8", fuse=True),
        "resume='somewhere': within": quantize("w8a8static", resume="somewhere"),
        "the same arguments; rank 0 has": quantize("w8a8static" if rank else "w4a8g32static"),
        "data: within share_batches only": lambda model, data: nybble.recover(model, reference=made(), data=data),
    }
    with share_batches():
        for text, run in refused.items():
            with pytest.raises(ValueError, match=text):
                run(made(), data)
        other = made()
        other.head.bias.data.add_(rank)
        with pytest.raises(ValueError, match="must have the same model; rank 0 has"):
            RUNS["static"](other, data)


def recipes_run_on_all_ranks(folder: Path) -> None:
    """Two stages, the second of which sees what the first made."""
    stages = (
        Stage("sparsify", {"layers": {"*.up": "sp24w8a8"}, "goal": "memory"}),
        Stage("quantize", {"scheme": "w4a16g32", "method": "gptq", "goal": "memory"}),
    )
    alone, shared = made(), made()
    with calibrate_alone():
        nybble.optimize(alone, nybble.Recipe(stages), calibration=tokens())
    with share_batches():
        nybble.optimize(shared, nybble.Recipe(stages), calibration=own(tokens()))
    assert str(shared.blocks[1].up.scheme) == "sp24w8a8"
    assert str(shared.blocks[1].down.scheme) == "w4a16g32"
    same(shared, alone, "recipe")
    same_on_all_ranks(shared, "recipe")


def sensitivity_is_that_of_one_process(folder: Path) -> None:
    """Also where a scheme needs calibration data, and where batches are left out."""
    data = tokens()
    bad = [torch.empty(0, 4, dtype=torch.int64)] if dist.get_rank() == 1 else []
    for harm, schemes in (("kl", ("w4a16g32", "sp24w8a8")), ("output", ("w8a8static",))):
        more = {} if harm == "kl" else {"quantize": {"calibration": data}}
        with calibrate_alone():
            wanted = nybble.sensitivity(made(), schemes, data, harm=harm, **more)
            lone = nybble.sensitivity(made(), schemes, own(data), harm=harm, **more)
        more = {} if harm == "kl" else {"quantize": {"calibration": own(data)}}
        with share_batches():
            found = nybble.sensitivity(made(), schemes, own(data), harm=harm, **more)
            assert found.to_json() == wanted.to_json()
            assert found.to_json() != lone.to_json()
            skipped = nybble.sensitivity(made(), "w8a8", [*own(data), *bad], on_bad="skip").skipped
            assert sum(skipped.values()) == 1
    broken = made()
    broken.embed.weight.data[1] = math.nan  # for rank 1 alone
    with share_batches(), pytest.raises(ValueError, match="output on the data has NaN or Inf"):
        nybble.sensitivity(broken, "w8a8", [torch.full((1, 4), dist.get_rank())])


CHECKS = {
    one.__name__: one
    for one in (
        data_without_a_word_is_refused,
        one_rank_calibrates_alone,
        arguments_that_ranks_cannot_share,
        batches_of_all_ranks_count,
        held_out_rows_are_those_of_one_process,
        batches_that_are_padded_bad_or_call_other_layers,
        recipes_run_on_all_ranks,
        sensitivity_is_that_of_one_process,
    )
}

if __name__ == "__main__":
    ranks.main(CHECKS)
