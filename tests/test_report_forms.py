"""Every report: its lines fit a terminal, whatever a model's names are, and its HTML is escaped."""

from __future__ import annotations

import pytest

from nybble.dispatch.explanation import Explanation
from nybble.dispatch.spec import Problem
from nybble.evaluate import Evaluation, Metric
from nybble.monitor.monitor import Drift
from nybble.monitor.watch import LayerDrift
from nybble.passes.choose.result import ChosenPlan, Point
from nybble.passes.optimize import Optimized
from nybble.passes.recovery.report import Recovered, RecoveredStage
from nybble.passes.rotate.rotate import Rotation
from nybble.passes.sensitivity.result import Effect, LayerSensitivity, Sensitivity
from nybble.recipe.recipe import Recipe, Stage
from nybble.report import LayerReport, Report
from nybble.text import Shown
from nybble.weights.scheme import Scheme

NAME = "<script>" + ".".join(["encoder.layer.attention"] * 20)
WORDS = " ".join(["<script>", *["word"] * 200])
SCHEMES = tuple(f"w4a8g{2**i}" for i in range(12))

EFFECTS = {scheme: Effect(Metric(0.1), 12.5, 1000) for scheme in SCHEMES}
SENSITIVE = Sensitivity(
    (LayerSensitivity(NAME, (4096, 4096), EFFECTS, tuple(range(9)), 12.0),), SCHEMES, "kl", {WORDS: 2}
)
POINT = Point({NAME: "w8a8"}, 10**12, 1.5, 0.1, Metric(0.1, 0.05, 0.2))
REPORT = Report(
    (LayerReport(NAME, "Linear", (8, 8), "float32", "-", 4, 4, reason=WORDS),),
    "w8a8",
    "speed",
    "rtn",
    (1,),
    WORDS,
    2,
    4,
    0,
)
RECOVERED = Recovered("kl", 1.0, 0.5, (RecoveredStage(NAME, ("a",), 1.0, 0.5, 10, 0.1, True, WORDS),), {NAME: WORDS})
STAGES = Recipe((Stage("quantize", {}), Stage("quantize", {})))
FORMS = {
    "explanation": Explanation(Problem(Scheme.parse("w8a8"), 1, 8, 8), None, {NAME: WORDS, "b": "c"}),
    "report": REPORT,
    "sensitivity": SENSITIVE,
    "plan": ChosenPlan("bytes", 1e9, 1, POINT, (POINT,), dict.fromkeys(SCHEMES, POINT), (POINT,), SENSITIVE),
    "evaluation": Evaluation({NAME: Metric(1.0, 0.5, 2.0)}, 2, 8, {WORDS: 3}, WORDS, 2),
    "recovered": RECOVERED,
    "rotation": Rotation(None, WORDS),
    "drift": Drift((LayerDrift(NAME, 3, 1, 2, None, {"psi": WORDS}),), 10, 2, True),
    "optimized": Optimized(STAGES, (REPORT, RECOVERED), (WORDS,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_line_of_a_report_fits_a_terminal(form: str) -> None:
    text = str(FORMS[form])
    assert max(map(len, text.splitlines())) <= 120
    assert "<script>" in text
    assert all(scheme in text for scheme in SCHEMES if form in ("sensitivity", "plan"))


@pytest.mark.parametrize("form", FORMS)
def test_the_html_of_a_report_is_escaped_and_whole(form: str) -> None:
    shown = FORMS[form]._repr_html_()
    assert isinstance(FORMS[form], Shown)
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert form in ("rotation",) or NAME.removeprefix("<script>") in shown, "nothing is shortened"


def test_advice_of_several_stages_is_given_once_and_last() -> None:
    good = LayerReport("a", "Linear", (8, 8), "float32", "w8a8", 4, 2)
    report = Report((good,), "w8a8", "memory", "rtn", (1,), "cpu", 2, 4, 4)
    text = str(Optimized(STAGES, (report, report)))
    assert text.count("what to do next:") == text.count("nybble.save(") == 1
    assert text.index("stage 2 of 2: quantize") < text.index("what to do next:")
