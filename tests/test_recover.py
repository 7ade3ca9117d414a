"""nybble.recover: what it wins back, what it never changes, and that it goes on where it was cut off."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nybble
from nybble.nn import Linear, SparseLinear
from nybble.passes.recovery import work
from nybble.passes.recovery.report import Recovered, RecoveredStage
from nybble.passes.recovery.shadow import Shadow
from nybble.passes.recovery.train import Task, train
from nybble.recipe.recipe import Recipe, Stage
from nybble.testing.models import give_scheme, snapshot, weight_of

SCHEMES = ["w8a8", "w8a16", "w4a16g32", "w4a8g32asym", "w4a16"]
SPARSE = ["sp50w8a16", "sp24w4a16g32", "sp24w8a8"]


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    threads(1)


class Block(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width, bias), nn.Linear(2 * width, width, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(functional.gelu(self.up(self.norm(x)))), None


class Stack(nn.Module):
    def __init__(self, depth: int = 2, width: int = 48, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.blocks = nn.ModuleList(Block(width, bias) for _ in range(depth))
        self.head = nn.Linear(width, 40)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x)


class Flat(nn.Module):
    """Without repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(40, 32), nn.Linear(32, 64), nn.Linear(64, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


def data(count: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (4, 16), generator=generator) for _ in range(count)]


def lossy(scheme: str = "w4a16g32", model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A model, and what it was made of."""
    reference = model or Stack()
    changed = copy.deepcopy(reference)
    give_scheme(changed, scheme)
    return changed, reference


def error(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        outputs = [(model(ids), reference(ids)) for ids in data(8, seed=9)]
    return sum(float((a - b).square().sum() / b.square().sum()) for a, b in outputs)


def layers_of(model: nn.Module) -> dict[str, Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


class TestRecovers:
    @pytest.mark.parametrize("scheme", [*SCHEMES, *SPARSE])
    def test_the_output_comes_nearer_on_data_that_it_did_not_see(self, scheme: str) -> None:
        model, reference = lossy(scheme)
        schemes = {name: str(layer.scheme) for name, layer in layers_of(model).items()}
        before = error(model, reference)
        done = nybble.recover(model, reference, data())
        bar = 0.6 if scheme.startswith("w4") else 0.9
        assert error(model, reference) < bar * before
        assert {name: str(layer.scheme) for name, layer in layers_of(model).items()} == schemes
        assert done.after < done.before
        assert [stage.name for stage in done.stages] == ["blocks.0", "blocks.1", "end to end"]

    @pytest.mark.parametrize("scheme", SPARSE)
    def test_zeros_stay_zeros(self, scheme: str) -> None:
        model, reference = lossy(scheme)
        zeros = {name: weight_of(layer) == 0 for name, layer in layers_of(model).items()}
        done = nybble.recover(model, reference, data())
        assert any(stage.kept for stage in done.stages)
        for name, layer in layers_of(model).items():
            assert isinstance(layer, SparseLinear)
            assert not weight_of(layer)[zeros[name]].any(), name

    def test_pruned_floats(self) -> None:
        reference = Stack()
        model = copy.deepcopy(reference)
        nybble.sparsify(model, "2:4", scheme=None, method="magnitude")
        zeros = {name: p == 0 for name, p in model.named_parameters() if name.endswith(("up.weight", "down.weight"))}
        before = error(model, reference)
        nybble.recover(model, reference, data())
        assert error(model, reference) < 0.9 * before
        for name, mask in zeros.items():
            assert not model.get_parameter(name)[mask].any()
            assert model.get_parameter(name).requires_grad

    def test_under_autocast(self) -> None:
        model, reference = lossy()
        dtypes = [(name, tensor.dtype) for name, tensor in model.state_dict().items()]
        before = error(model, reference)
        with torch.autocast("cpu", torch.bfloat16):
            nybble.recover(model, reference, data(), epochs=0)
        assert error(model, reference) < 0.9 * before
        assert [(name, tensor.dtype) for name, tensor in model.state_dict().items()] == dtypes

    def test_many_batches_are_judged_by_a_few(self) -> None:
        model, reference = lossy()
        done = nybble.recover(model, reference, data(40), epochs=0, end_to_end_epochs=1, learning_rate=1e-3)
        assert done.stages[0].steps == 35
        done = nybble.recover(model, reference, data(200), epochs=0, end_to_end_epochs=1, learning_rate=1e-3)
        assert done.stages[0].steps == 200 - 200 // 13

    def test_without_blocks_and_without_biases(self) -> None:
        for made in (Flat(), Stack(bias=False)):
            model, reference = lossy(model=made)
            before = error(model, reference)
            done = nybble.recover(model, reference, data())
            assert error(model, reference) < 0.7 * before
            assert done.stages[-1].name == "end to end"
            assert model.state_dict().keys() == lossy(model=reference)[0].state_dict().keys()

    def test_kl_where_outputs_are_logits(self) -> None:
        model, reference = lossy()
        done = nybble.recover(model, reference, data(), loss="kl", epochs=1, end_to_end_epochs=1)
        assert done.loss == "kl"
        with torch.no_grad():
            held = [data()[7], data()[15]]
            kl = [
                functional.kl_div(
                    model(x).log_softmax(-1), reference(x).log_softmax(-1), log_target=True, reduction="sum"
                )
                for x in held
            ]
        assert done.after == pytest.approx(float(sum(kl)) / (2 * 64), rel=1e-3)

    def test_nothing_but_the_layers_changes(self) -> None:
        model, reference = lossy()
        model.train()
        kept = {name: (id(p), p.clone()) for name, p in model.named_parameters() if "norm" in name or "embed" in name}
        before = snapshot(reference)
        nybble.recover(model, reference, data())
        assert snapshot(reference) == before
        for name, (number, value) in kept.items():
            assert id(model.get_parameter(name)) == number
            assert torch.equal(model.get_parameter(name), value)
            assert model.get_parameter(name).grad is None
        assert all(module.training for module in model.modules())

    def test_padding_does_not_count(self) -> None:
        mask = torch.ones(4, 16, dtype=torch.long)
        mask[:, 8:] = 0
        results = []
        made = Stack()
        for fill in (1, 2):
            model, reference = lossy(model=made)
            batches = [{"ids": torch.where(mask.bool(), ids, fill), "attention_mask": mask} for ids in data(6)]
            nybble.recover(model, reference, batches, epochs=1, end_to_end_epochs=1)
            results.append(weight_of(layers_of(model)["blocks.1.down"]))
        assert torch.equal(*results)

    def test_deterministic_and_seeded(self) -> None:
        results = []
        made = Stack()
        for seed in (0, 0, 1):
            model, reference = lossy(model=made)
            nybble.recover(model, reference, data(8), epochs=1, end_to_end_epochs=1, learning_rate=1e-3, seed=seed)
            results.append(weight_of(layers_of(model)["blocks.0.up"]))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


class TestNeverWorse:
    def test_a_stage_that_does_worse_as_it_runs_is_undone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, reference = lossy()
        before = {name: id(layer) for name, layer in layers_of(model).items()}
        real = Shadow.make

        def spoil(self: Shadow) -> nn.Module:
            with torch.no_grad():
                self.latent.mul_(-1)
            return real(self)

        monkeypatch.setattr(Shadow, "make", spoil)
        done = nybble.recover(model, reference, data(8), epochs=1, end_to_end_epochs=1)
        assert {name: id(layer) for name, layer in layers_of(model).items()} == before
        assert not any(stage.kept for stage in done.stages)
        assert done.after == done.before
        assert "not better, not kept" in str(done)

    def test_blocks_that_help_themselves_but_not_the_model_are_undone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, reference = lossy()
        before = {name: id(layer) for name, layer in layers_of(model).items()}
        real, calls = work.Work._held_out, []

        def held_out(self: work.Work, scene: work.Scene) -> float:
            calls.append(scene.name)
            return 1e9 if scene.name == "end to end" and calls.count("end to end") == 2 else real(self, scene)

        monkeypatch.setattr(work.Work, "_held_out", held_out)
        done = nybble.recover(model, reference, data(8), end_to_end_epochs=0)
        assert {name: id(layer) for name, layer in layers_of(model).items()} == before
        assert done.after == done.before

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_restores_the_last_good_state(self, bad: float) -> None:
        layer, reference = nn.Linear(8, 8), nn.Linear(8, 8)
        shadow = Shadow(Linear.from_dense(layer, "w8a16"), layer)
        x = torch.randn(8, 4, 8)
        calls: list[int] = []

        def loss(b: int) -> Tensor:
            calls.append(b)
            found = (shadow(x[b]) - reference(x[b])).square().mean()
            return found * bad if len(calls) == 15 else found

        task = Task([shadow], loss, range(6), range(6, 8))
        fit = train(task, 1e-2, 8, 0)
        assert (fit.ended, fit.steps) == ("loss not finite", 6)
        assert fit.after < fit.before
        assert task.held_out() == pytest.approx(fit.after)

    def test_training_that_does_not_help_stops_early_and_changes_nothing(self) -> None:
        layer = nn.Linear(8, 8)
        shadow = Shadow(Linear.from_dense(layer, "w8a16"), layer)
        before = [p.clone() for p in shadow.parameters()]
        x = torch.randn(4, 8)
        task = Task([shadow], lambda b: shadow(x).sum() * (1 if b else -1), [0], [1])
        fit = train(task, 1e-2, 50, 0)
        assert (fit.ended, fit.steps, fit.after) == ("no progress", 2, fit.before)
        assert all(torch.equal(a, b) for a, b in zip(before, shadow.parameters(), strict=True))

    @pytest.mark.parametrize("when", [1, 2, 3])
    def test_an_interrupt_leaves_the_model_as_it_was(self, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
        model, reference = lossy()
        before, calls, real = snapshot(model), [], work.train

        def interrupt(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == when:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(work, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            nybble.recover(model, reference, data(8), learning_rate=1e-3)
        assert snapshot(model) == before


class TestResume:
    @pytest.mark.parametrize("scheme", ["w4a16g32", "sp50w8a16", None])
    def test_a_run_that_was_cut_off_ends_with_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str | None
    ) -> None:
        reference, models = Stack(), []
        for _ in range(2):
            model = copy.deepcopy(reference)
            if scheme is None:
                nybble.sparsify(model, "50%", scheme=None, method="magnitude")
            else:
                give_scheme(model, scheme)
            models.append(model)
        whole = nybble.recover(models[0], reference, data(8))
        real, calls = work.train, []

        def cut(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(work, "train", cut)
        with pytest.raises(KeyboardInterrupt):
            nybble.recover(models[1], reference, data(8), resume=tmp_path)
        done = nybble.recover(models[1], reference, data(8), resume=tmp_path)
        assert len(calls) == 4, "two stages were taken from the directory"
        assert done == whole
        for (name, a), (_, b) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
            assert torch.equal(a, b), name

    def test_other_settings_start_anew(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            model, reference = lossy()
            nybble.recover(model, reference, data(4), epochs=1, end_to_end_epochs=0, seed=seed, resume=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4


def test_a_recipe_recovers_from_the_model_as_it_was() -> None:
    model, reference = Stack(), Stack()
    reference.load_state_dict(model.state_dict())
    plain = copy.deepcopy(model)
    nybble.quantize(plain, "w4a16g32", goal="memory")
    stages = (
        Stage("quantize", {"scheme": "w4a16g32", "goal": "memory"}),
        Stage("recover", {"epochs": 1, "end_to_end_epochs": 1}),
    )
    done = nybble.optimize(model, Recipe(stages, seed=5), calibration=data(8))
    assert error(model, reference) < 0.8 * error(plain, reference)
    nybble.recover(plain, reference, data(8), epochs=1, end_to_end_epochs=1, seed=5)
    assert torch.equal(model(data()[0]), plain(data()[0]))
    assert json.loads(done.to_json())["reports"][1]["schema"] == "nybble.recovered/1"


def test_shared_weights_are_left_alone() -> None:
    reference = Stack()
    reference.blocks[1].up.weight = reference.blocks[0].up.weight
    model, _ = lossy(model=reference)
    done = nybble.recover(model, reference, data(4), epochs=1, end_to_end_epochs=1)
    assert set(done.left) == {"blocks.0.up", "blocks.1.up"}
    assert layers_of(model)["blocks.0.up"].weight_id == layers_of(model)["blocks.1.up"].weight_id


@pytest.mark.parametrize(
    ("arguments", "kind", "why"),
    [
        ({"data": data(1)}, ValueError, "data has 1 batches: must be at least 2"),
        ({"reference": 1}, TypeError, "reference=int"),
        ({"reference": nn.Sequential(nn.Linear(4, 4))}, ValueError, "has no dense Linear layer 'embed'"),
        ({"reference": Stack(width=32)}, ValueError, r"'embed' has shape \(40, 32\)"),
        ({"model": Stack()}, ValueError, "no quantized or pruned"),
        ({"epochs": -1}, ValueError, "epochs=-1"),
        ({"learning_rate": 2}, ValueError, "learning_rate=2"),
        ({"loss": "l1"}, ValueError, "loss='l1'"),
        ({"progress": 1}, TypeError, "progress=1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], kind: type[Exception], why: str) -> None:
    model, reference = lossy()
    with pytest.raises(kind, match=why):
        nybble.recover(**{"model": model, "reference": reference, "data": data(2), **arguments})


def test_a_reference_that_shares_modules_is_refused() -> None:
    model, _ = lossy()
    with pytest.raises(ValueError, match="shares modules"):
        nybble.recover(model, model, data(2))


class TestOldNames:
    """The names of earlier versions: they mean the same, and warn where they are used."""

    def test_keyword_arguments(self) -> None:
        with (
            pytest.warns(DeprecationWarning, match=r"recover\(\w+=\) is now \w+=") as warned,
            pytest.raises(ValueError, match=r"^end_to_end_epochs=-3"),
        ):
            nybble.recover(Stack(), Stack(), data(8), rate=0.1, end_to_end=-3)
        assert {str(one.message).split(";")[0] for one in warned} == {
            "recover(rate=) is now learning_rate=",
            "recover(end_to_end=) is now end_to_end_epochs=",
        }
        assert {one.filename for one in warned} == {__file__}

    def test_both_names_are_refused(self) -> None:
        with pytest.raises(TypeError, match="rate is the old name of learning_rate; give learning_rate alone"):
            nybble.recover(Stack(), Stack(), data(8), rate=0.1, learning_rate=0.1)

    def test_the_report(self) -> None:
        stage = RecoveredStage("end to end", (), 1.0, 0.5, 8, 1e-3, True, "")
        with pytest.warns(DeprecationWarning, match="RecoveredStage.rate is now learning_rate"):
            assert stage.rate == 1e-3
        (written,) = json.loads(Recovered("kl", 1.0, 0.5, (stage,), {}).to_json())["stages"]
        assert written["rate"] == written["learning_rate"] == 1e-3
