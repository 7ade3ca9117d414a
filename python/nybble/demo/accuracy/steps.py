"""The steps of the accuracy demo: 4 bits by several methods, a plan of the same size, and recovery."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...evaluate import Evaluation, evaluate
from ...evaluate.memory import held_bytes
from ...passes.choose import ChosenPlan, plan
from ...passes.optimize import optimize
from ...passes.quantize import quantize
from .language import BATCH, Language

UNIFORM = "w4a16g128"
CANDIDATES = ("sp50w4a16g128", "w4a16g32", "w8a16")
METHODS = ("rtn", "awq", "gptq")
DENSE, RTN = "dense, float32", f"all {UNIFORM}, rtn"


@dataclass(frozen=True)
class Sizes:
    """Numbers of sequences for evaluation, planning, calibration and distillation."""

    held_out: int = 128
    planned: int = 16
    calibration: int = 32
    distilling: int = 256


@dataclass(frozen=True)
class Step:
    """One model: the megabytes (10^6 bytes) that it holds, and its evaluation against the dense model."""

    name: str
    megabytes: float
    found: Evaluation


@dataclass(frozen=True)
class Story:
    """All steps, the dense model first, and the plan, which holds the harm of each layer."""

    steps: tuple[Step, ...]
    plan: ChosenPlan

    def share(self, step: Step) -> float:
        """The loss increase of a step, relative to that of rounding all layers to nearest."""
        (nearest,) = (one for one in self.steps if one.name == RTN)
        return step.found["delta_ln_ppl"] / nearest.found["delta_ln_ppl"]


def tell(language: Language, sizes: Sizes, advance: Callable[[str], None]) -> Story:
    """Make and evaluate every model; ``advance`` is called after each."""
    calibration = language.calibrating(sizes.calibration, seed=0)
    chosen = plan(
        language.model,
        (UNIFORM, *CANDIDATES),
        calibration[: -(-sizes.planned // BATCH)],
        budget={"bytes": UNIFORM},
        quantize={"method": "gptq", "calibration": calibration},
        sparsify={"method": "sparsegpt", "calibration": calibration},
    )
    advance("plan")
    steps = []
    for name, model in _models(language, chosen, calibration, sizes.distilling):
        found = evaluate(model, language.model, language.held_out_batches(sizes.held_out), ("perplexity", "kl"))
        steps.append(Step(name, held_bytes(model) / 1e6, found))
        advance(name)
    return Story(tuple(steps), chosen)


def _models(
    language: Language, chosen: ChosenPlan, calibration: Sequence[Tensor], distilling: int
) -> Iterator[tuple[str, nn.Module]]:
    """Name and model of each step."""
    yield DENSE, language.model
    for method in METHODS:
        model = copy.deepcopy(language.model)
        data = None if f"all {UNIFORM}, {method}" == RTN else calibration
        quantize(model, UNIFORM, goal="memory", method=method, calibration=data)
        yield f"all {UNIFORM}, {method}", model
    model = copy.deepcopy(language.model)
    optimize(model, chosen.recipe, calibration=calibration)
    yield "plan of the same bytes, gptq and sparsegpt", model
    model = copy.deepcopy(language.model)
    quantize(model, UNIFORM, goal="memory")
    language.recover(model, distilling, seed=0)
    yield f"{RTN}, recovered", model


STEPS = 7  # calls of `advance` by `tell`


def rows(story: Story) -> Iterator[tuple[str, ...]]:
    """The cells of the table, see HEADERS."""
    for step in story.steps:
        loss = step.found.metrics["delta_ln_ppl"]
        interval = "" if loss.low is None else f"[{loss.low:.4f}, {loss.high:.4f}]"
        yield (
            step.name,
            f"{step.megabytes:.2f}",
            f"{step.found['perplexity']:.3f}",
            f"{loss.value:.4f}",
            interval,
            f"{step.found['kl']:.4f}",
            "-" if step.name == DENSE else f"{story.share(step):.2f}",
        )


HEADERS = ("model", "MB", "perplexity", "d ln ppl", "95 %", "KL", "of rtn's")
