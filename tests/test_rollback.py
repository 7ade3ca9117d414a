"""`rollback=False`: dense layers are freed as they are replaced, and what is finished stays after an exception."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.evaluate.memory import has_peak
from nybble.model.walk import Edits
from nybble.passes.layerwise.work import Work
from nybble.recipe.recipe import Stage

# In 2^20 bytes. The packed weights alone are more than what is allowed above the model: two layers and 8.
PEAK = """
import sys
import torch
from torch import nn
import nybble
from nybble.evaluate.memory import peak_mb

LAYERS, N, K = 32, 2048, 1024
goal, scheme, folder = sys.argv[1:]

def layer(i):
    weight = torch.randn(16, K, generator=torch.Generator().manual_seed(i)).repeat(N // 16, 1)
    if folder:  # a mapping of its own for each
        weight.numpy().tofile(f"{folder}/{i}")
        weight = torch.from_file(f"{folder}/{i}", shared=False, size=N * K).view(N, K)
        assert weight.sum() != 0  # its pages are read
    made = nn.Linear(K, N, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made

options = {"goal": goal, "timing_s": 0.2, "m": 4, "progress": False, "fuse": False}
nybble.quantize(nn.Sequential(nn.Linear(K, N, bias=False)), scheme, **options)  # loads what it needs
model = nn.ModuleList(layer(i) for i in range(LAYERS))
peak_mb(reset=True)
before = peak_mb()
report = nybble.quantize(model, scheme, rollback=False, **options)
print(peak_mb() - before, sum(row.after == scheme for row in report.layers))
"""
LAYER_MB = 2048 * 1024 * 4 / 1e6


@pytest.mark.sampled(every=8)
@pytest.mark.skipif(not has_peak(), reason="the system reports no peak memory")
@pytest.mark.parametrize(
    ("goal", "scheme", "is_mapped"),
    [("memory", "w8a8", False), ("memory", "w4a8g128", True), ("speed", "w8a8", False)],
)
def test_the_peak_is_the_model_and_two_layers(goal: str, scheme: str, is_mapped: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, goal, scheme, str(tmp_path) if is_mapped else ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    above, replaced = map(float, done.stdout.split())
    assert goal == "speed" or replaced == 32
    assert above <= 2 * LAYER_MB + 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks, a head that shares the weight of an embedding, and two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.embedding(ids)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


DATA = [torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)]
Pass = Callable[..., Any]


def quantized(scheme: str, **options: Any) -> Pass:
    return lambda model, **more: nybble.quantize(model, scheme, goal="memory", progress=False, **options, **more)


def pruned(scheme: str | None, **options: Any) -> Pass:
    def run(model: nn.Module, **more: Any) -> Any:
        return nybble.sparsify(model, "2:4", scheme=scheme, goal="memory", progress=False, **options, **more)

    return run


PASSES: dict[str, Pass] = {
    "rtn": quantized("w8a8"),
    "untie": quantized("w4a8g32", untie=True),
    "several": quantized(("w8a8", "w4a8g32"), max_error=0.5),  # type: ignore[arg-type]
    "static": quantized("w8a8static", calibration=DATA),
    "gptq": quantized("w4a16g32", method="gptq", calibration=DATA),
    "smooth": quantized("w8a8", smooth=True, calibration=DATA),
    "awq": quantized("w4a16g32asym", method="awq", calibration=DATA),
    "magnitude": pruned("w8a8", method="magnitude"),
    "sparsegpt": pruned("w4a16g32", method="sparsegpt", calibration=DATA),
    "permuted floats": pruned(None, method="wanda", calibration=DATA, permute=True),
}


@pytest.mark.parametrize("name", PASSES)
def test_model_and_report_are_those_with_rollback(name: str, tmp_path: Path) -> None:
    one, other, again = Model().train(), Model().train(), Model().train()
    one.blocks[1].eval(), other.blocks[1].eval()
    wanted = PASSES[name](one)
    found = PASSES[name](other, rollback=False, resume=tmp_path)
    resumed = PASSES[name](again, rollback=False, resume=tmp_path)
    for report, model in ((found, other), (resumed, again)):
        assert report.layers == wanted.layers
        assert (report.weight_bytes, report.weight_bytes_changed) == (wanted.weight_bytes, wanted.weight_bytes_changed)
        assert torch.equal(model(DATA[0]), one(DATA[0]))
    assert [module.training for module in other.modules()] == [module.training for module in one.modules()]
    assert any(row.before != row.after for row in found.layers)


@pytest.mark.parametrize("name", PASSES)
def test_no_dense_layer_outlives_its_replacement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    layers = {
        key: weakref.ref(module)
        for key, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    shared = model.embedding.weight
    weights = {key: weakref.ref(one()._parameters["weight"]) for key, one in layers.items()}  # type: ignore[union-attr]
    replaced: list[str] = []
    replace = Work._replace

    def watched(work: Work, twins: Any, *rest: Any) -> None:
        replace(work, twins, *rest)
        replaced.extend(layer.site.name for layer in twins if layer.is_done)
        assert all(weights[key]() in (None, shared) for key in replaced)
        if name != "permuted floats":  # whose layers stay, with new weights
            assert {key for key, one in layers.items() if one() is None} == set(replaced)

    monkeypatch.setattr(Work, "_replace", watched)
    PASSES[name](model, rollback=False)
    assert len(replaced) >= 6


@pytest.mark.parametrize("name", PASSES)
def test_after_an_exception_what_is_finished_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = Model().train(), Model().train()
    before, bias = model(DATA[0]), model.blocks[0].up.bias
    PASSES[name](whole, rollback=False)
    replace, calls = Work._replace, []

    def interrupted(work: Work, *rest: Any) -> None:
        calls.append(rest)
        if len(calls) == 4:
            raise KeyboardInterrupt
        replace(work, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_replace", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            PASSES[name](model, rollback=False)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert re.match("rollback=False: [45] of 10 layers are finished and stay in the model", note)
    assert all(module.training for module in model.modules())
    assert torch.isfinite(model(DATA[0])).all()
    assert not torch.equal(model(DATA[0]), before)
    assert torch.equal(model.first(torch.ones(1, 64)), whole.first(torch.ones(1, 64)))
    if name != "permuted floats":
        assert isinstance(model.first, nybble.nn.Linear | nybble.nn.SparseLinear)
        assert model.second.weight_id == model.first.weight_id
        assert model.blocks[0].up.bias is bias or name in ("smooth", "awq")
        assert isinstance(model.blocks[2].down, nn.Linear)
        again = PASSES[name](model, rollback=False)
        assert not isinstance(model.blocks[2].down, nn.Linear)
        assert {row.name for row in again.layers if row.reason == "already quantized"} >= {"first", "second"}


def test_with_rollback_the_model_is_unchanged_also_in_the_middle_of_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = dict(model.named_parameters())
    put, calls, last = Edits.put, [], [0]

    def interrupted(edits: Any, *rest: Any) -> None:
        put(edits, *rest)
        calls.append(rest)
        if len(calls) == last[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Edits, "put", interrupted)
    PASSES["smooth"](Model())
    for at in range(1, len(calls) + 1, 3):
        calls.clear()
        last[0] = at
        with pytest.raises(KeyboardInterrupt):
            PASSES["smooth"](model)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[key] is before[key] for key in before)


def test_an_error_before_the_first_layer_has_no_note() -> None:
    with pytest.raises(ValueError, match="needs calibration data") as caught:
        nybble.quantize(Model(), "w8a8", method="gptq", rollback=False)
    assert not getattr(caught.value, "__notes__", [])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"strict=True, rollback=False: .*leave out one"):
        nybble.quantize(Model(), "w8a8", strict=True, rollback=False)
    with pytest.raises(TypeError, match="rollback=0"):
        nybble.quantize(Model(), "w8a8", rollback=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rollback"):
        Stage("quantize", {"rollback": False})
