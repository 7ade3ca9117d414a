"""AWQ and SmoothQuant: folds that are exact, or refused; scales that help where there are outliers, and never harm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import nybble
from nybble.model.batches import model_calls
from nybble.model.options import Options
from nybble.model.stages import Stage
from nybble.model.walk import Edits, sites
from nybble.passes.plan import Plan
from nybble.passes.round.clip import clip
from nybble.passes.round.folds import Fold, find_folds, try_fold
from nybble.passes.round.methods import round_weight
from nybble.passes.round.scales import Awq, Consumer, Smooth, choose
from nybble.report.report import Report
from nybble.testing.models import Stack, correlated_inputs, gathered, token_batches
from nybble.weights.rounding import dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

HEADS, SIZE = 4, 8


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],)) * (1 + self.weight)


class Layer(nn.Module):
    """A decoder layer: values for ``kv`` of four heads, a gated MLP, norms of a kind."""

    def __init__(self, kv: int = HEADS, norm: Any = nn.RMSNorm) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v = (nn.Linear(width, heads * SIZE) for heads in (HEADS, kv, kv))
        self.o = nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                nn.init.uniform_(module.weight, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape != q.shape)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


class Relu(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), act, nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Post(Relu):
    """The residual reads the norm's output too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.fc2(self.act(self.fc1(h)))


def options(scheme: str = "w4a16g32") -> Options:
    return Options(Scheme.parse(scheme), None, (), "awq", (1,), "memory")


def folds_of(model: nn.Module, x: Tensor) -> tuple[Plan, list[Fold]]:
    plan = Plan(sites(nn.Sequential(model)), options())
    layers = plan.open_layers()
    stage = Stage("all", tuple(layer.site.module for layer in layers), *model_calls(model, [x]))
    with torch.no_grad():
        return plan, find_folds(stage, layers, plan)


def named(model: nn.Module, folds: list[Fold]) -> dict[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(t.site.module)]: names[id(fold.producer)] for fold in folds for t in fold.consumers}


class TestFolds:
    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            (Layer(), {"q": "norm1", "k": "norm1", "v": "norm1", "o": "v", "gate": "norm2", "up": "norm2", "down": "up"}),
            (Layer(1), {"q": "norm1", "k": "norm1", "v": "norm1", "o": "v", "gate": "norm2", "up": "norm2", "down": "up"}),
            (Layer(2, OnePlus), {"q": "norm1", "k": "norm1", "v": "norm1", "o": "v", "gate": "norm2", "up": "norm2", "down": "up"}),
            (Layer(norm=nn.LayerNorm), {"q": "norm1", "k": "norm1", "v": "norm1", "o": "v", "gate": "norm2", "up": "norm2", "down": "up"}),
            (Relu(nn.ReLU()), {"fc1": "norm", "fc2": "fc1"}),
            (Relu(nn.GELU()), {"fc1": "norm"}),
            (Post(nn.ReLU()), {"fc2": "fc1"}),
        ],
        ids=["attention", "one-kv-head", "two-kv-heads-one-plus", "layernorm", "relu", "gelu", "residual-of-the-norm"],
    )  # fmt: skip
    def test_what_is_legal_is_found_and_exact(self, model: nn.Module, expected: dict[str, str]) -> None:
        x = torch.randn(2, 6, 32)
        plan, folds = folds_of(model, x)
        assert named(model, folds) == expected
        before, edits = model(x), Edits()
        for fold in folds:
            k = fold.consumers[0].weight.shape[1]
            assert try_fold(fold, fold.tie(torch.rand(k) * 4 + 0.2), plan, edits)
        assert ((model(x) - before).norm() / before.norm()).item() <= 1e-5
        state = copy.deepcopy(model.state_dict())
        edits.undo()
        assert torch.equal(model(x), before)
        assert any(not torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_a_shared_weight_is_left_alone(self) -> None:
        model = Relu(nn.ReLU())
        model.other = nn.Linear(64, 32)
        model.other.weight = model.fc2.weight
        assert named(model, folds_of(model, torch.randn(4, 32))[1]) == {"fc1": "norm"}

    def test_what_the_dtype_cannot_hold_is_undone(self) -> None:
        model, x = Relu(nn.ReLU()).half(), torch.randn(4, 32).half()
        plan, folds = folds_of(model, x)
        before, edits = model(x), Edits()
        assert not try_fold(folds[0], torch.full((32,), 1e8), plan, edits)
        assert torch.equal(model(x), before)


def outliers(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, [3, 77, 130, 200]] *= 30
    return x


def loss(weight: Tensor, x: Tensor, scheme: Scheme, scale: Tensor | None = None) -> float:
    s = torch.ones(weight.shape[1]) if scale is None else scale
    layer = nybble.nn.Linear.from_weight(weight * s, None, scheme)
    return (layer(x / s) - x @ weight.T).square().sum().item()


class Held:
    """Stands for a layer of a plan."""

    def __init__(self, weight: Tensor) -> None:
        module = nn.Linear(weight.shape[1], weight.shape[0])
        module.weight = nn.Parameter(weight)
        self.site = type("Site", (), {"module": module})

    def chosen(self, scaling: Awq | Smooth, x: Tensor, scheme: Scheme) -> Tensor | None:
        inputs = {id(self.site.module): gathered(x)}  # type: ignore[attr-defined]
        return choose(scaling, [self], inputs, scheme, lambda s: s)  # type: ignore[list-item]


class TestAwq:
    scheme = Scheme.parse("w4a16g128asym")

    def test_outliers_lose_less_and_others_do_not_lose_more(self) -> None:
        weight, x = torch.randn(128, 256), correlated_inputs(4096)
        ratios = []
        for data in (outliers(x), x):
            scale = Held(weight).chosen(Awq(), data, self.scheme)
            ratios.append(loss(weight, data, self.scheme, scale) / loss(weight, data, self.scheme))
        assert ratios[0] <= 0.6
        assert 0.9 <= ratios[1] <= 1.0

    def test_no_scale_is_in_the_grid(self) -> None:
        """With weights that are codes already nothing can be better."""
        weight = torch.randn(16, 64)
        weight = dequantize_weight(quantize_weight(weight, Scheme.parse("w4a16")), Scheme.parse("w4a16"), 64)
        assert Held(weight).chosen(Awq(), outliers(torch.randn(512, 256))[:, :64], Scheme.parse("w4a16")) is None

    @pytest.mark.parametrize("name", ["w4a16g128", "w4a16g32asym", "w4a16", "w8a16"])
    @pytest.mark.parametrize("k", [256, 200])
    def test_clipping_never_loses_more_than_rtn_in_any_group(self, name: str, k: int) -> None:
        scheme, x = Scheme.parse(name), correlated_inputs(1024, k)
        weight = torch.distributions.StudentT(3.0).sample((32, k))
        hessian, size = 2 / len(x) * x.T @ x, scheme.group_size or k
        changes = [
            dequantize_weight(one, scheme, k) - weight
            for one in (clip(weight, hessian, scheme), quantize_weight(weight, scheme))
        ]
        for start in range(0, k, size):
            part, block = slice(start, start + size), hessian[start : start + size, start : start + size]
            ours, theirs = (((d[:, part] @ block) * d[:, part]).sum(1) for d in changes)
            assert (ours <= theirs * (1 + 1e-4)).all()

    def test_the_ladder_is_never_worse_on_inputs_held_out(self) -> None:
        for seed in range(5):
            torch.manual_seed(seed)
            weight, inputs = torch.randn(16, 64).pow(3), gathered(torch.randn(96, 64).pow(3))
            found, nearest = (round_weight(weight, Scheme.parse("w4a16g32"), m, inputs) for m in ("awq", "rtn"))
            losses = [
                (inputs.held_out @ (dequantize_weight(one.quantized, Scheme.parse("w4a16g32"), 64) - weight).T).norm()  # type: ignore[arg-type]
                for one in (found, nearest)
            ]
            assert losses[0] <= losses[1] * (1 + 1e-6)


class TestSmooth:
    scheme = Scheme.parse("w8a8")

    def test_outliers_lose_less_than_half_of_the_error(self) -> None:
        weight, x = torch.randn(128, 256), outliers(correlated_inputs(2048))
        scale = Held(weight).chosen(Smooth(), x, self.scheme)
        assert scale is not None
        assert (loss(weight, x, self.scheme, scale) / loss(weight, x, self.scheme)) ** 0.5 <= 0.5
        half = Held(weight).chosen(Smooth((0.5,)), x, self.scheme)
        assert half is not None
        assert (loss(weight, x, self.scheme, half) / loss(weight, x, self.scheme)) ** 0.5 <= 0.5

    def test_without_outliers_it_stays_within_a_few_percent(self) -> None:
        weight, x = torch.randn(128, 256), torch.randn(2048, 256)
        scale = Smooth().scale([Consumer(weight, gathered(x))], 0.5)
        assert 0.9 < (loss(weight, x, self.scheme, scale) / loss(weight, x, self.scheme)) ** 0.5 < 1.05

    def test_a_dead_input_is_no_trouble(self) -> None:
        weight, x = torch.randn(16, 64), torch.randn(512, 64)
        x[:, 5] = 0
        for scaling in (Awq(), Smooth()):
            assert torch.isfinite(scaling.scale([Consumer(weight, gathered(x))], 0.5)).all()


def small(model: nn.Module, scheme: str, **kwargs: Any) -> Report:
    return nybble.quantize(model, scheme, goal="memory", calibration=token_batches(8), **kwargs)


def planted() -> Stack:
    """Two channels of the norms are 40 times the others; what reads them makes up for it."""
    model = Stack(width=64)
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight[[5, 17]] *= 40
            block.up.weight[:, [5, 17]] /= 4
    return model


class TestQuantize:
    @pytest.mark.parametrize(
        ("scheme", "with_it", "without"),
        [
            ("w8a8", {"smooth": True}, {}),
            ("w8a8", {"smooth": 0.5}, {}),
            ("w8a8", {"smooth": True, "method": "gptq"}, {"method": "gptq"}),
            ("w4a16g32", {"method": "awq"}, {}),
        ],
    )
    def test_planted_outliers_lose_less(self, scheme: str, with_it: dict[str, Any], without: dict[str, Any]) -> None:
        model, x = planted(), token_batches(1, seed=7)[0]
        wanted, errors = model(x), []
        for options in (with_it, without):
            new = copy.deepcopy(model)
            report = small(new, scheme, **options)
            errors.append((new(x) - wanted).norm().item())
        assert errors[0] < 0.8 * errors[1], report

    def test_the_report_says_what_was_scaled(self) -> None:
        report = small(planted(), "w8a8", smooth=True)
        notes = {row.name: row.rounded.notes for row in report.layers if row.rounded}
        assert any("inputs scaled per channel" in note for note in notes["blocks.1.up"])
        assert "inputs scaled" in str(report)

    @pytest.mark.sampled(every=3)
    @pytest.mark.parametrize("options", [{"method": "awq"}, {"smooth": True}, {"smooth": True, "method": "gptq"}])
    @pytest.mark.parametrize("at", [1, 3, 5])
    def test_a_run_that_was_cut_off_ends_with_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], at: int
    ) -> None:
        from nybble.passes.layerwise import work

        model = planted()
        whole_run, cut, again = (copy.deepcopy(model) for _ in range(3))
        small(whole_run, "w4a8g32", **options)
        original, calls = work.output_errors, [0]

        def cutting(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(work, "output_errors", cutting)
        with pytest.raises(KeyboardInterrupt):
            small(cut, "w4a8g32", resume=tmp_path, **options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, cut.state_dict()[name]), name
        small(again, "w4a8g32", resume=tmp_path, **options)
        for name, value in whole_run.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name

    @pytest.mark.parametrize(
        ("scheme", "options", "error", "rule"),
        [
            ("w8a8", {"smooth": 1.5}, ValueError, "smooth=1.5: must be True, False, or a number between 0 and 1"),
            ("w8a8", {"smooth": "yes"}, TypeError, "smooth='yes': must be"),
            ("w8a16", {"smooth": True}, ValueError, "needs a scheme with quantized activations"),
            (
                "w4a8g32",
                {"smooth": True, "method": "awq"},
                ValueError,
                "a method other than 'awq', which has scales of its own",
            ),
            ("w4a16", {"method": "hqq"}, ValueError, "needs 4-bit weights in groups"),
        ],
    )
    def test_bad_arguments(self, scheme: str, options: dict[str, Any], error: type[Exception], rule: str) -> None:
        model = Stack()
        with pytest.raises(error, match=rule):
            small(model, scheme, **options)
        assert type(model.head) is nn.Linear

    def test_they_need_data(self) -> None:
        with pytest.raises(ValueError, match="smooth: needs calibration data"):
            nybble.quantize(Stack(), "w8a8", smooth=True)
