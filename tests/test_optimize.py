"""nybble.optimize: the passes of a recipe in their order, and a model that is changed as a whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble import Recipe
from nybble.nn import Linear, SparseLinear
from nybble.passes import optimize as module
from nybble.passes.model_copy import ModelCopy
from nybble.recipe.recipe import Stage, data_sha256


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    threads(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (4, 16), generator=generator) for _ in range(3)]


def recipe(*stages: tuple[str, dict[str, Any]], **fields: Any) -> Recipe:
    return Recipe(tuple(Stage(name, {"goal": "memory", **arguments}) for name, arguments in stages), **fields)


def schemes(model: nn.Module) -> dict[str, str]:
    return {
        name: str(layer.scheme) if isinstance(layer, Linear) else "dense"
        for name, layer in model.named_modules()
        if isinstance(layer, (Linear, nn.Linear))
    }


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every object of the model, and the content of its tensors."""
    return [
        *((name, id(module), module.training) for name, module in model.named_modules()),
        *((name, id(t), t._version, t.sum().item()) for name, t in (*model.named_parameters(), *model.named_buffers())),
    ]


ALL = {"blocks.0.up": "w8a8", "blocks.0.down": "w8a8", "blocks.1.up": "w8a8", "blocks.1.down": "w8a8", "head": "w8a8"}


class TestStages:
    def test_one_stage_is_the_pass_itself(self) -> None:
        model = Stack()
        alone = copy.deepcopy(model)
        done = nybble.optimize(model, recipe(("quantize", {"scheme": "w4a16g32", "method": "mse"})))
        report = nybble.quantize(alone, "w4a16g32", method="mse", goal="memory")
        assert str(done.reports[0]) == str(report)
        for (name, mine), (_, theirs) in zip(model.state_dict().items(), alone.state_dict().items(), strict=True):
            assert torch.equal(mine, theirs), name

    def test_stages_run_in_order(self) -> None:
        model = Stack()
        stages = [
            ("sparsify", {"pattern": "2:4", "method": "magnitude", "include": "blocks.*"}),
            ("quantize", {"scheme": "w8a8"}),
        ]
        nybble.optimize(model, recipe(*stages))
        assert schemes(model) == {name: "sp24w8a8" if "blocks" in name else "w8a8" for name in ALL}
        assert isinstance(model.blocks[0].up, SparseLinear)
        model = Stack()
        nybble.optimize(model, recipe(*stages[::-1][:1], ("quantize", {"scheme": "w4a16"})))
        assert schemes(model) == ALL, "what the first has quantized the second leaves alone"

    def test_calibration_reaches_the_passes(self) -> None:
        model = Stack()
        done = nybble.optimize(model, recipe(("sparsify", {"pattern": "50%"})), calibration=iter(batches()))
        assert {row.pruned.method for row in done.reports[0].layers if row.pruned} == {"wanda"}

    def test_resume_has_a_place_for_each_stage(self, tmp_path: Any) -> None:
        stages = [("quantize", {"include": "head"}), ("sparsify", {"pattern": "50%"})]
        first, second = Stack(), None
        second = copy.deepcopy(first)
        for model in (first, second):
            nybble.optimize(model, recipe(*stages), calibration=batches(), resume=tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0", "stage-1"]
        assert torch.equal(first(batches()[0]), second(batches()[0]))


class TestLayers:
    def test_the_first_pattern_that_matches_counts(self) -> None:
        model = Stack()
        layers = {"blocks.0.up": "dense", "*.up": "w4a16g32", "blocks.*": "w8a16"}
        done = nybble.optimize(model, recipe(("quantize", {"layers": layers})))
        expected = {
            "blocks.0.up": "dense",
            "blocks.1.up": "w4a16g32",
            "blocks.0.down": "w8a16",
            "blocks.1.down": "w8a16",
        }
        assert schemes(model) == {**expected, "head": "dense"}
        rows = {row.name: row for row in done.reports[0].layers}
        assert {name: row.after for name, row in rows.items() if row.swapped} == {
            name: scheme for name, scheme in expected.items() if scheme != "dense"
        }
        assert done.reports[0].scheme == "w4a16g32, w8a16"
        assert done.reports[0].coverage == pytest.approx(100 * 3 * 2048 / (4 * 2048 + 2 * 1600))

    def test_layers_that_match_none_take_the_scheme_of_the_stage(self) -> None:
        model = Stack()
        nybble.optimize(model, recipe(("quantize", {"layers": {"head": "dense"}, "scheme": "w8a16"})))
        assert schemes(model) == {**dict.fromkeys(ALL, "w8a16"), "head": "dense"}

    def test_sparse_schemes(self) -> None:
        model = Stack()
        layers = {"*.up": "sp24w4a16g32", "*.down": "sp70w8a8"}
        nybble.optimize(model, recipe(("sparsify", {"layers": layers, "method": "magnitude"})))
        expected = {name: "sp24w4a16g32" if name.endswith("up") else "sp70w8a8" for name in ALL if "blocks" in name}
        assert schemes(model) == {**expected, "head": "dense"}
        share = (model.blocks[0].down.dequantized_weight() != 0).float().mean()
        assert share == pytest.approx(0.3, abs=0.02)

    def test_sparse_layers_beside_a_pattern_for_the_rest(self) -> None:
        model = Stack()
        arguments = {"layers": {"head": "sp50w8a16"}, "pattern": "2:4", "scheme": "w8a8", "method": "magnitude"}
        nybble.optimize(model, recipe(("sparsify", arguments)))
        assert schemes(model) == {**dict.fromkeys(ALL, "sp24w8a8"), "head": "sp50w8a16"}

    def test_of_schemes_gives_each_layer_its_own(self) -> None:
        model = Stack()
        plan = {"head": "dense", "*.down": "w8a16", "blocks.*": "sp24w8a8"}
        more = {"goal": "memory"}
        made = Recipe.of_schemes(plan, quantize=more, sparsify={**more, "method": "magnitude"})
        nybble.optimize(model, made)
        ups = {name: "sp24w8a8" if name.endswith("up") else "w8a16" for name in ALL}
        assert schemes(model) == {**ups, "head": "dense"}

    def test_all_dense_is_a_choice(self) -> None:
        model = Stack()
        done = nybble.optimize(model, recipe(("quantize", {"layers": {"*": "dense"}})))
        assert set(schemes(model).values()) == {"dense"}
        assert not done.reports[0].swapped

    def test_names_with_the_characters_of_globs(self) -> None:
        model = nn.Sequential()
        model.add_module("a[0]", nn.Linear(8, 8))
        model.add_module("a0", nn.Linear(8, 8))
        nybble.optimize(model, recipe(("quantize", {"layers": {"a[[]0]": "w8a8"}})))
        assert schemes(model) == {"a[0]": "w8a8", "a0": "dense"}

    def test_the_schemes_of_a_stage_share_its_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[float] = []
        real = module.PASSES["quantize"]

        def quantize(aside: nn.Module, **arguments: Any) -> Any:
            given.append(arguments["timing_s"])
            return dataclasses.replace(real(aside, **arguments), timing_s=2.0)

        quantize.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
        monkeypatch.setitem(module.PASSES, "quantize", quantize)
        layers = {"head": "w8a16", "blocks.0.*": "w8a8", "blocks.1.*": "w4a16"}
        done = nybble.optimize(Stack(), recipe(("quantize", {"layers": layers, "timing_s": 6})))
        assert given == pytest.approx([2.0, 2.0, 2.0])
        assert (done.reports[0].timing_s, done.reports[0].timing_limit_s) == (6.0, 6.0)  # type: ignore[attr-defined]


class TestAllOrNothing:
    def test_what_is_not_swapped_is_the_same_object(self) -> None:
        model = Stack()
        kept = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers()) if "blocks" not in name}
        bias, block = model.blocks[0].up.bias, model.blocks[0]
        model.train()
        nybble.optimize(model, recipe(("quantize", {"include": "blocks.*"})))
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if "blocks" not in name:
                assert id(t) == kept[name], name
        assert model.blocks[0] is block
        assert block.up.bias is bias
        assert all(module.training for module in model.modules())

    def test_pruned_floats_reach_the_model(self) -> None:
        model = Stack()
        linear, weight = model.blocks[0].up, model.blocks[0].up.weight
        nybble.optimize(model, recipe(("sparsify", {"pattern": "2:4", "scheme": None, "method": "magnitude"})))
        assert model.blocks[0].up is linear
        assert linear.weight is not weight
        assert (linear.weight == 0).sum() == linear.weight.numel() / 2
        assert weight.count_nonzero() == weight.numel()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_exception_in_a_later_stage(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
        model = Stack()
        before = state(model)
        calls = []

        def fail(aside: nn.Module, pattern: str, **_: Any) -> None:
            calls.append(schemes(aside))
            raise error("stop")

        monkeypatch.setitem(module.PASSES, "sparsify", fail)
        with pytest.raises(error):
            nybble.optimize(model, recipe(("quantize", {"include": "head"}), ("sparsify", {"pattern": "2:4"})))
        assert calls == [{**dict.fromkeys(ALL, "dense"), "head": "w8a8"}], "the first stage was through"
        assert state(model) == before

    def test_an_exception_while_the_model_is_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Stack()
        before = state(model)
        real, count = module.ModelCopy.adopt, []

        class Tricky(dict[str, Any]):
            def __setitem__(self, key: str, value: Any) -> None:
                count.append(key)
                if len(count) == 1:
                    raise KeyboardInterrupt
                super().__setitem__(key, value)

        def adopt(self: ModelCopy) -> None:
            model.blocks[1].__dict__["_modules"] = Tricky(model.blocks[1]._modules)
            real(self)

        monkeypatch.setattr(module.ModelCopy, "adopt", adopt)
        with pytest.raises(KeyboardInterrupt):
            nybble.optimize(model, recipe(("quantize", {})))
        assert count
        assert state(model) == before

    def test_until_the_end_the_model_is_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Stack().train()
        before = state(model)
        real, seen = module.PASSES["quantize"], []

        def quantize(aside: nn.Module, **arguments: Any) -> Any:
            report = real(aside, **arguments)
            seen.append(state(model) == before)
            return report

        monkeypatch.setitem(module.PASSES, "quantize", quantize)
        nybble.optimize(model, recipe(("quantize", {}), ("quantize", {"scheme": "w8a16"})))
        assert seen == [True, True]
        assert schemes(model) == ALL

    def test_tied_layers_stay_tied(self) -> None:
        model = Stack()
        model.blocks[1].up.weight = model.blocks[0].up.weight
        shared = model.add_module("again", model.blocks[0].down) or model.again
        nybble.optimize(model, recipe(("quantize", {})))
        assert model.blocks[0].up.weight_id == model.blocks[1].up.weight_id
        assert model.again is model.blocks[0].down
        assert model.again is not shared

    def test_a_model_that_cannot_be_copied(self) -> None:
        import threading

        model = Stack()
        model.lock = threading.Lock()  # type: ignore[assignment]
        with pytest.raises(TypeError, match="model=Stack: cannot be copied"):
            nybble.optimize(model, recipe(("quantize", {})))


class TestReport:
    def test_text_and_json(self) -> None:
        model = Stack()
        done = nybble.optimize(
            model, recipe(("quantize", {"include": "head"}), ("quantize", {"scheme": "w8a16"}), seed=3)
        )
        assert "stage 1 of 2: quantize" in str(done)
        assert "stage 2 of 2: quantize" in str(done)
        data = json.loads(done.to_json())
        assert Recipe.from_dict(data["recipe"]) == done.recipe
        assert [report["scheme"] for report in data["reports"]] == ["w8a8", "w8a16"]

    def test_other_data_and_versions_are_noted(self) -> None:
        made = {"versions": {"torch": "0.1", "nybble": nybble.__version__, "none-such": "1"}}
        done = nybble.optimize(Stack(), recipe(("quantize", {}), data_sha256="0" * 64, **made), calibration=batches())
        notes = "\n".join(done.notes)
        assert len(done.notes) == 3
        for word in ("torch 0.1", "none-such 1", "other calibration data"):
            assert word in notes
        assert notes.splitlines()[0] in str(done)
        same = recipe(("quantize", {}), data_sha256=data_sha256(batches()))
        assert nybble.optimize(Stack(), same, calibration=batches()).notes == ()
        assert nybble.optimize(Stack(), same).notes == (
            "the recipe was made with calibration data, and this run has none",
        )


@pytest.mark.parametrize(
    ("model", "arguments", "error", "why"),
    [
        (nn.Linear(8, 8), {}, ValueError, "is itself a layer"),
        (Stack(), {"recipe": "r.yaml"}, TypeError, "recipe=str: must be a nybble.Recipe"),
        (Stack(), {"calibration": []}, ValueError, "calibration: has no batches"),
        (Stack(), {"progress": 1}, TypeError, "progress=1"),
        (Stack(), {"recipe": recipe(("quantize", {"layers": {"nothing": "w8a8"}}))}, ValueError, "'nothing' match no"),
        (Stack(), {"recipe": recipe(("sparsify", {"pattern": "2:4"}))}, ValueError, "needs calibration data"),
    ],
)
def test_wrong_arguments(model: nn.Module, arguments: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        nybble.optimize(model, **{"recipe": recipe(("quantize", {})), **arguments})
