"""nybble.quantize: why a layer is left alone, the arguments, strict=True, and failures that change nothing."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble import paired
from nybble.nn import Linear
from nybble.passes import measure
from nybble.report.speed import Speed

from .small_quantize import mlp, rows, small


def snapshot(model: nn.Module) -> list[object]:
    """Everything that must not move when quantize fails: objects, values, flags."""
    state: list[object] = []
    for name, module in model.named_modules(remove_duplicate=False):
        state.append((name, id(module), module.training))
        for key, parameter in module._parameters.items():
            if parameter is not None:
                values = parameter.detach().reshape(-1).tolist() if not parameter.is_meta else None
                state.append((name, key, id(parameter), parameter.requires_grad, repr(values)))
    return state


class Sub(nn.Linear):
    """A user's layer that is more than a Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def hook(*_: Any) -> None:
    return None


def lazy() -> nn.Module:
    return nn.LazyLinear(8)


def normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(8, 8))


def changed(change: Callable[[nn.Linear], object], **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(8, 8, **kwargs)
        change(layer)
        return layer

    return make


def unplain(layer: nn.Linear) -> None:
    del layer._parameters["weight"]
    layer.weight = torch.zeros(8, 8)  # type: ignore[assignment]


def empty(k: int, n: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(1, 1)
        layer.weight, layer.bias = nn.Parameter(torch.zeros(n, k)), nn.Parameter(torch.zeros(n))
        return layer

    return make


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Sub(8, 8), "Sub is a subclass"),
    "lazy": (lazy, "lazy"),
    "parametrized": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), r"parametrized \(weight\)"),
    "weight_norm": (normed, r"forward pre-hooks \(WeightNorm\)"),
    "forward hook": (changed(lambda fc: fc.register_forward_hook(hook)), r"forward hooks \(hook\)"),
    "pre-hook": (changed(lambda fc: fc.register_forward_pre_hook(hook)), r"forward pre-hooks \(hook\)"),
    "backward hook": (changed(lambda fc: fc.register_full_backward_hook(hook)), "backward hooks"),
    "state_dict hook": (changed(lambda fc: fc.register_state_dict_post_hook(hook)), "state_dict hooks"),
    "own forward": (changed(lambda fc: setattr(fc, "forward", hook)), "forward was replaced"),
    "more": (changed(lambda fc: fc.register_buffer("gain", torch.ones(8))), "more than weight and bias: gain"),
    "no parameter": (changed(unplain), "not a parameter"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "is on meta"),
    "float64": (lambda: nn.Linear(8, 8, dtype=torch.float64), "float64"),
    "mixed": (changed(lambda fc: fc.bias.data.zero_(), dtype=torch.bfloat16), "its bias is float32"),
    "nan": (changed(lambda fc: fc.weight.data[3, 4].fill_(math.nan)), "NaN or Inf"),
    "inf": (changed(lambda fc: fc.weight.data[0, 0].fill_(-math.inf)), "NaN or Inf"),
    "too wide": (lambda: nn.Linear(140_000, 1, bias=False), "in_features=140000"),
    "no inputs": (empty(0, 8), r"shape \(8, 0\)"),
    "no outputs": (empty(8, 0), r"shape \(0, 8\)"),
}


@pytest.mark.parametrize("case", REASONS)
def test_left_alone_with_the_reason(case: str) -> None:
    make, pattern = REASONS[case]
    model = nn.ModuleList([make(), nn.Linear(8, 8)])
    if case == "mixed":
        model[0].bias = nn.Parameter(torch.zeros(8))
    odd = model[0]
    report = small(model)
    row = rows(report)["0"]
    assert re.search(pattern, str(row.reason)), row.reason
    assert model[0] is odd
    assert row.nbytes_before == row.nbytes_after
    assert (row.kernel, row.sqnr_db, row.after) == (None, None, row.before)
    assert isinstance(model[1], Linear)
    assert str(row.reason) in str(report)


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"scheme": "w3a8"}, ValueError, ("scheme", "w3a8")),
            ({"scheme": 8}, TypeError, ("scheme", "8")),
            ({"method": "best"}, ValueError, ("method", "gptq", "rtn", "mse")),
            ({"goal": "size"}, ValueError, ("goal", "size", "speed", "memory")),
            ({"m": ()}, ValueError, ("m=", "at least one")),
            ({"m": 0}, ValueError, ("m=", "0")),
            ({"m": (1, -2)}, ValueError, ("m=", "-2")),
            ({"m": (1, 2.5)}, TypeError, ("m=", "2.5")),
            ({"m": (True,)}, TypeError, ("m=", "True")),
            ({"m": "16"}, TypeError, ("m=", "'16'")),
            ({"m": 1 << 40}, ValueError, ("m=",)),
            ({"strict": 1}, TypeError, ("strict", "1")),
            ({"untie": None}, TypeError, ("untie", "None")),
            ({"include": 3}, TypeError, ("include", "3")),
            ({"include": ["0", 3]}, TypeError, ("include", "3")),
            ({"include": "fc*"}, ValueError, ("include", "fc*", "matches no Linear layer")),
            ({"include": "2"}, ValueError, ("include", "'2'", "matches no")),
            ({"exclude": ["0", "typo"]}, ValueError, ("exclude", "typo", "matches no layer")),
            ({"exclude": "2"}, ValueError, ("exclude", "'2'", "globs")),
        ],
    )
    def test_wrong_argument_is_named_and_changes_nothing(
        self, change: dict[str, Any], error: type[Exception], words: tuple[str, ...]
    ) -> None:
        model = mlp()
        before = snapshot(model)
        with pytest.raises(error) as caught:
            nybble.quantize(model, **change)
        for word in words:
            assert word in str(caught.value)
        assert snapshot(model) == before

    def test_model_must_be_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            nybble.quantize(torch.zeros(3))  # type: ignore[arg-type]

    @pytest.mark.parametrize("model", [nn.Linear(8, 8), Sub(8, 8)])
    def test_root_linear_is_refused_with_the_way_out(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"torch\.nn\.Sequential\(model\)"):
            nybble.quantize(model)

    def test_include_and_exclude(self) -> None:
        for kwargs, names in [
            ({"include": "2.*"}, ["2.0"]),
            ({"include": ["0", "2.*"], "exclude": "0"}, ["2.0"]),
            ({"exclude": ("*.0",)}, ["0"]),
            ({"include": "*"}, ["0", "2.0"]),
            ({"exclude": "1"}, ["0", "2.0"]),
        ]:
            model = mlp()
            assert [row.name for row in small(model, **kwargs).swapped] == names
        report = small(mlp(), exclude="0")
        assert rows(report)["0"].reason == "excluded by '0'"
        assert rows(small(mlp(), include="0"))["2.0"].reason == "not matched by include"

    def test_any_name_of_a_shared_module_counts(self) -> None:
        block = nn.Sequential(nn.Linear(16, 16))
        model = nn.ModuleDict({"a": block, "b": block})
        assert rows(small(model, exclude="b.*"))["a.0"].reason == "excluded by 'b.*'"


class TestStrict:
    def test_lists_every_layer_left_and_changes_nothing(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), Sub(8, 8), Sub(8, 8))
        before = snapshot(model)
        with pytest.raises(ValueError, match="strict=True: 2 of 3 layers") as caught:
            small(model, strict=True)
        assert "1: " in str(caught.value)
        assert "2: " in str(caught.value)
        assert snapshot(model) == before

    def test_layers_that_the_user_excluded_do_not_count(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), Sub(8, 8), nn.Bilinear(4, 4, 4))
        assert len(small(model, strict=True, exclude="1").swapped) == 1

    def test_slow_layers_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "_memo", {})
        slow = Speed(0.5, 0.4, 0.6, 30)
        monkeypatch.setattr(paired, "decide", lambda pairs, limits: dict.fromkeys(pairs, slow))
        model = mlp()
        before = snapshot(model)
        with pytest.raises(ValueError, match="slower here"):
            nybble.quantize(model, strict=True)
        assert snapshot(model) == before


class TestFailureMidway:
    @pytest.mark.parametrize("error", [RuntimeError, ValueError, MemoryError, KeyboardInterrupt])
    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_in_building(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int) -> None:
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        before, count, original = snapshot(model), [0], Linear.from_quantized

        def failing(*args: Any, **kwargs: Any) -> Linear:
            count[0] += 1
            if count[0] > after:
                raise error("midway")
            return original(*args, **kwargs)

        monkeypatch.setattr(Linear, "from_quantized", failing)
        with pytest.raises(error, match="midway"):
            small(model)
        assert snapshot(model) == before
        monkeypatch.undo()
        assert len(small(model).swapped) == 3

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("name", ["layerwise.run.make_report", "layerwise.work.Builder", "walk.Edits.swap"])
    def test_in_every_stage(self, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]) -> None:
        def failing(*args: Any) -> None:
            raise error("midway")

        model = mlp()
        before = snapshot(model)
        monkeypatch.setattr(f"nybble.passes.{name}", failing)
        with pytest.raises(error, match="midway"):
            small(model)
        assert snapshot(model) == before

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("after", [0, 1, 2, 3])
    def test_in_swapping(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int) -> None:
        walk = importlib.import_module("nybble.model.walk")
        fc = nn.Linear(16, 16)
        model = nn.ModuleList([fc, nn.Linear(16, 16), nn.Sequential(fc, nn.Linear(16, 4))])
        before, original, count = snapshot(model), walk.Place.put, [0]

        def failing(self: Any, module: nn.Module) -> None:
            count[0] += 1
            original(self, module)
            if count[0] == after + 1:
                raise error("midway")

        monkeypatch.setattr(walk.Place, "put", failing)
        with pytest.raises(error, match="midway"):
            small(model)
        assert snapshot(model) == before
        assert not any(isinstance(module, Linear) for module in model.modules())
