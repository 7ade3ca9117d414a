"""Several schemes for one model: each layer gets the fastest that is exact enough."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble import Recipe, paired
from nybble.model.options import check_schemes
from nybble.nn.module import QuantizedModule
from nybble.passes import measure
from nybble.passes.measure import Timer
from nybble.passes.round import work
from nybble.recipe.recipe import Stage
from nybble.report.report import Report
from nybble.report.speed import Speed
from nybble.weights.scheme import Scheme

BOTH = ("w8a8", "w8a7")
# Seconds of a call.
Times = dict[str, float]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[tuple[str, str]]]:
    """clock(seconds by scheme) replaces the timer; returns the list of what was compared. Intervals are 10 % wide."""

    def install(times: Times) -> list[tuple[str, str]]:
        compared = []

        def speeds(
            timer: Timer, old: nn.Module, new: QuantizedModule, ms: Sequence[int], left: int
        ) -> dict[int, Speed]:
            names = [str(one.scheme) if isinstance(one, QuantizedModule) else "dense" for one in (old, new)]
            compared.append((names[0], names[1]))
            ratio = times[names[0]] / times[names[1]]
            return dict.fromkeys(ms, Speed(ratio, 0.9 * ratio, 1.1 * ratio, 20))

        monkeypatch.setattr(Timer, "speeds", speeds)
        return compared

    return install


def verdicts(report: Report) -> dict[str, str | None]:
    (row, *_) = report.layers
    return {one.scheme: one.why for one in row.tried}


def after(report: Report) -> set[str]:
    return {row.after for row in report.layers}


@pytest.mark.parametrize(
    ("times", "goal", "taken", "why"),
    [
        ({"dense": 4, "w8a8": 2, "w8a7": 1}, "speed", "w8a7", {"w8a8": "w8a7 is faster", "w8a7": None}),
        (
            {"dense": 4, "w8a8": 2, "w8a7": 1.95},
            "speed",
            "w8a8",
            {"w8a8": None, "w8a7": "no difference against w8a8, 1.03x [0.92, 1.13]"},
        ),
        (
            {"dense": 4, "w8a8": 2, "w8a7": 1.75},
            "speed",
            "w8a8",
            {"w8a8": None, "w8a7": "less than 3 % faster against w8a8, 1.14x [1.03, 1.26]"},
        ),
        ({"dense": 4, "w8a8": 5, "w8a7": 1}, "speed", "w8a7", {"w8a8": "slower against dense", "w8a7": None}),
        (
            {"dense": 4, "w8a8": 4, "w8a7": 6},
            "no_slower",
            "w8a8",
            {"w8a8": None, "w8a7": "slower against w8a8, 0.67x [0.60, 0.73]"},
        ),
        ({"dense": 4, "w8a8": 9, "w8a7": 1}, "memory", "w8a8", {"w8a8": None, "w8a7": "not smaller than w8a8"}),
        (
            {"dense": 4, "w8a8": 9, "w8a7": 8},
            "speed",
            "float32",
            {"w8a8": "slower against dense", "w8a7": "slower against dense"},
        ),
    ],
)
@pytest.mark.parametrize("schemes", [BOTH, BOTH[::-1]])
def test_the_fastest_is_taken_whatever_the_order(
    clock: Callable[[Times], Any], times: Times, goal: str, taken: str, why: dict[str, str | None], schemes: Any
) -> None:
    clock(times)
    model = network()
    report = nybble.quantize(model, schemes, goal=goal, m=4)
    assert after(report) == {taken}
    assert verdicts(report) == why
    assert report.scheme == ", ".join(schemes)
    for row, layer in zip(report.layers, (model[0], model[2]), strict=True):
        assert row.swapped is isinstance(layer, QuantizedModule)
        assert row.tried[0].error < row.tried[1].error, "the most exact one first"
        assert row.reason is None or all(f"not {name}: slower against dense" in row.reason for name in BOTH)


def test_each_scheme_is_measured_once(clock: Callable[[Times], list[tuple[str, str]]]) -> None:
    compared = clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    nybble.quantize(network()[:1], BOTH, m=4)
    assert compared[:2] == [("dense", "w8a8"), ("w8a8", "w8a7")]
    compared = clock({"dense": 4, "w8a8": 5, "w8a7": 1})
    nybble.quantize(network()[:1], BOTH, m=4)
    assert compared[:2] == [("dense", "w8a8"), ("dense", "w8a7")]


def test_what_follows_from_two_measurements_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_memo", {})
    measured = []

    def decide(pairs: Any, limits: Any) -> dict[int, Speed]:
        measured.append(limits)
        return dict.fromkeys(pairs, Speed(2.0, 1.9, 2.1, 30))

    monkeypatch.setattr(paired, "decide", decide)
    (row,) = nybble.quantize(network()[:1], BOTH, m=(1, 4)).layers
    assert row.after == "w8a7"
    assert len(measured) == 2
    assert row.speedup == pytest.approx({1: 4.0, 4: 4.0})
    assert row.tried[1].speed == row.mean_speed


def test_an_error_above_the_limit_rules_out(clock: Callable[[Times], list[tuple[str, str]]]) -> None:
    compared = clock({"dense": 4, "w8a8": 2, "w4a8": 0.1})
    report = nybble.quantize(network(), ("w8a8", "w4a8"), m=4)
    assert after(report) == {"w8a8"}
    assert verdicts(report)["w4a8"] == "its error is above max_error=0.05"
    assert not any("w4a8" in pair for pair in compared), "it need not be timed"
    assert after(nybble.quantize(network(), ("w8a8", "w4a8"), m=4, max_error=0.5)) == {"w4a8"}
    none = nybble.quantize(network(), BOTH, m=4, max_error=1e-4)
    assert not none.swapped
    assert none.layers[0].reason == (
        "not w8a8: its error is above max_error=0.0001; not w8a7: its error is above max_error=0.0001"
    )


@pytest.mark.parametrize("goal", ["speed", "memory"])
def test_a_limit_holds_for_a_single_scheme_too(clock: Callable[[Times], Any], goal: str) -> None:
    clock({"dense": 4, "w4a8": 2})
    for limit, taken in ((None, "w4a8"), (0.5, "w4a8"), (0.01, "float32")):
        report = nybble.quantize(network(), "w4a8", m=4, goal=goal, max_error=limit)
        assert after(report) == {taken}
    assert report.layers[0].reason == "not w4a8: its error is above max_error=0.01"


def test_an_infinite_error_is_told(clock: Callable[[Times], Any]) -> None:
    """The dense output is zero, so that any other is infinitely far from it."""
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    model = nn.Sequential(nn.Linear(64, 48))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.zero_()
        model[0].weight[:, :2] = torch.tensor([1.0, -1.0])
    x = torch.zeros(64, 64)
    x[:, :2] = 3.0
    x[:, 2] = 1000.0
    report = nybble.quantize(model, BOTH, m=4, calibration=[x])
    data = json.loads(report.to_json())
    assert {one["error"] for one in data["layers"][0]["tried"]} <= {"inf", 0.0}
    assert str(report)


def test_errors_are_those_of_calibration_data(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    x = torch.randn(64, 64)
    x[:, 0] *= 60  # takes up the codes of the other inputs
    (row, _) = nybble.quantize(network(), BOTH, m=4, calibration=[x]).layers
    (without, _) = nybble.quantize(network(), BOTH, m=4).layers
    assert row.rounded is not None
    assert row.tried[1].error == pytest.approx(row.rounded.error, rel=1e-6)
    assert row.tried[1].error > 1.1 * without.tried[1].error
    limit = (row.tried[1].error + without.tried[1].error) / 2
    for data, taken in ((None, "w8a7"), ([x], "w8a8")):
        report = nybble.quantize(network(), BOTH, m=4, calibration=data, max_error=limit)
        assert report.layers[0].after == taken


def test_the_bits_are_those_of_the_scheme_alone(clock: Callable[[Times], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = []
    original = work.round_weight
    monkeypatch.setattr(work, "round_weight", lambda *a: rounded.append(str(a[1])) or original(*a))
    clock({"dense": 4, "w8a8": 2, "w8a7": 1, "w4a8": 3})
    one, other = network(), network()
    nybble.quantize(one, (*BOTH, "w4a8"), m=4)
    assert rounded == ["w8a8", "w4a8"] * 2, "codes of equal weights are shared"
    nybble.quantize(other, "w8a7", m=4)
    x = torch.randn(5, 64)
    assert torch.equal(one(x), other(x))


def test_the_report_tells(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    text = " ".join(str(nybble.quantize(network(), BOTH, m=4)).split())
    assert "w8a7 taken: output error 0.0" in text
    assert "2.00 times dense speed [1.80, 2.20]" in text
    assert "4.00 times dense speed [3.45, 4.58]" in text, "the product of two measurements"
    assert "w8a8 not taken, w8a7 is faster: output error 0.00" in text
    clock({"dense": 1, "w8a8": 2, "w8a7": 2})
    text = " ".join(str(nybble.quantize(network(), BOTH, m=4)).split())
    assert "slower than the dense layer here" in text


def test_twins_get_one_scheme(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    report = nybble.quantize(model, BOTH, m=4)
    assert after(report) == {"w8a7"}
    assert report.layers[1].tied_to == "0"


def test_resuming_keeps_the_choice(clock: Callable[[Times], Any], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    first, again = network(), network()
    nybble.quantize(first, BOTH, m=4, resume=tmp_path)
    clock({"dense": 4, "w8a8": 1, "w8a7": 2})
    report = nybble.quantize(again, BOTH, m=4, resume=tmp_path)
    assert after(report) == {"w8a7"}
    x = torch.randn(5, 64)
    assert torch.equal(first(x), again(x))


def test_resuming_tells_what_was_tried(clock: Callable[[Times], Any], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    first = nybble.quantize(network(), BOTH, m=4, resume=tmp_path)
    again = nybble.quantize(network(), BOTH, m=4, resume=tmp_path)
    assert [row.tried for row in again.layers] == [row.tried for row in first.layers]
    longer = nybble.quantize(network(), BOTH, m=4, resume=tmp_path, timing_s=60)
    assert after(longer) == {"w8a7"}, "a run may be resumed with more time"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_scheme_that_became_slow_makes_way_for_another(
    clock: Callable[[Times], Any], tmp_path: Path, method: str
) -> None:
    pytest.importorskip("safetensors")
    given: dict[str, Any] = {"m": 4, "method": method, "calibration": [torch.randn(256, 64)]}
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    nybble.quantize(network(), BOTH, resume=tmp_path, **given)
    clock({"dense": 4, "w8a8": 2, "w8a7": 5})
    model, fresh = network(), network()
    report = nybble.quantize(model, BOTH, resume=tmp_path, **given)
    assert after(report) == {"w8a8"}
    assert verdicts(report)["w8a7"] == "slower against w8a8, 0.40x [0.36, 0.44]"
    nybble.quantize(fresh, "w8a8", goal="memory", **{**given, "m": 1})
    x = torch.randn(5, 64)
    assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize(
    "change",
    [{"error": "small"}, {"speed": {"ratio": 2.0}}, {"why": 3}, {"scheme": None}, {"more": 1}],
    ids=str,
)
def test_a_damaged_record_of_what_was_tried_is_refused(
    clock: Callable[[Times], Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    pytest.importorskip("safetensors")
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    nybble.quantize(network(), BOTH, m=4, resume=tmp_path)
    for path in tmp_path.glob("*/nybble.json"):
        index = json.loads(path.read_text())
        index["tried"][0] |= change
        path.write_text(json.dumps(index))
    with pytest.raises(nybble.checkpoint.CheckpointError, match="does not describe a layer"):
        nybble.quantize(network(), BOTH, m=4, resume=tmp_path)


def test_schemes_that_a_layer_cannot_have_are_told(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    report = nybble.quantize(nn.Sequential(nn.Linear(100_000, 2)), BOTH, m=4)
    assert after(report) == {"w8a7"}
    (taken, refused) = report.layers[0].tried
    assert (taken.scheme, taken.why) == ("w8a7", None)
    assert (refused.scheme, refused.error, refused.speed) == ("w8a8", None, None)
    assert "in_features=100000: must be at most" in str(refused.why)
    assert "w8a8 not taken: in_features=100000" in " ".join(str(report).split())


def test_a_static_scheme_that_stays_dynamic_is_called_so(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2})
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    report = nybble.quantize(model, ("w8a8static", "w8a8"), m=4, calibration=[torch.randn(64, 16)])
    assert after(report) == {"w8a8"}
    found = verdicts(report)
    assert found["w8a8"] is None
    assert found["w8a8static"] == ("dynamic activations: it shares its weight with other layers, whose inputs differ")


def test_a_static_scheme_may_be_one_of_several(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2, "w8a8static": 1})
    report = nybble.quantize(network(), ("w8a8", "w8a8static"), m=4, calibration=[torch.randn(64, 64)])
    assert after(report) == {"w8a8static"}
    with pytest.raises(ValueError, match="w8a8static"):
        nybble.quantize(network(), ("w8a8", "w8a8static"), m=4)


def test_a_recipe_may_list_schemes(clock: Callable[[Times], Any]) -> None:
    clock({"dense": 4, "w8a8": 2, "w8a7": 1})
    recipe = Recipe((Stage("quantize", {"scheme": list(BOTH), "m": 4, "max_error": 0.2}),))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["stages"][0]["scheme"] == list(BOTH)
    model = network()
    assert after(nybble.optimize(model, recipe).reports[0]) == {"w8a7"}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="w9a9"):
        Stage("quantize", {"scheme": ["w8a8", "w9a9"]})


def test_a_file_may_list_schemes(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "schema: nybble.recipe/1\nstages:\n  - pass: quantize\n    scheme: [w8a8, w8a7]\n    max_error: 0.03\n"
    )
    assert Recipe.load(path).stages[0].arguments == {"scheme": BOTH, "max_error": 0.03}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scheme": ()}, ValueError, "must be at least one scheme"),
        ({"scheme": ("w8a8", "w9a9")}, ValueError, "w9a9"),
        ({"scheme": ("w8a8", 8)}, TypeError, "8"),
        ({"scheme": BOTH, "max_error": 0}, ValueError, "max_error=0"),
        ({"scheme": BOTH, "max_error": "1"}, TypeError, "max_error='1'"),
        ({"scheme": "w8a8", "max_error": 2}, ValueError, "max_error=2"),
        ({"scheme": {}}, ValueError, "must be at least one scheme"),
        ({"scheme": 8}, TypeError, "8"),
        ({"scheme": ("w8a8", "w8a16"), "smooth": True, "calibration": [torch.ones(8, 64)]}, ValueError, "smooth=True"),
        ({"scheme": ("w4a16g32", "w8a8"), "method": "hqq"}, ValueError, "hqq"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nybble.quantize(network(), **arguments)


@pytest.mark.parametrize(
    "schemes", [list(BOTH), (one for one in BOTH), dict.fromkeys(BOTH), Scheme.parse("w8a8")], ids=type
)
def test_any_iterable_of_schemes_will_do(schemes: Iterable[str | Scheme] | Scheme) -> None:
    found = check_schemes("scheme", schemes)
    assert tuple(map(str, found)) == (BOTH if not isinstance(schemes, Scheme) else BOTH[:1])


def test_a_plan_may_choose_seven_bits() -> None:
    chosen = nybble.plan(network(), BOTH, [torch.randn(8, 64)], budget={"bytes": "w8a7"}, harm="output")
    assert set(chosen.uniform) == set(BOTH)
