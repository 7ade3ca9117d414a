"""The other figures of ``--preset accuracy``: plans under budgets, the sentence encoder, and a monitor's cost."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import mean

import torch
from torch import nn

from ..demo.accuracy.language import Language
from ..demo.data import all_sentences
from ..demo.model import embed
from ..demo.model import load as load_encoder
from ..monitor import Monitor
from ..passes.choose import plan
from ..passes.measure import interleaved
from ..passes.optimize import optimize
from ..passes.quantize import quantize
from .figures import Figure

FAST = "w8a8"
CANDIDATES = ("w4a8g128", "w8a16")
M = 16
PLANNED = 24  # sequences
SENTENCES, ROWS, SECONDS = 256, 32, 20.0
LEAST_COSINE = {"w4a8g128": 0.99, "w8a8": 0.998}
LEAST_NOISE = 0.01  # that two runs of one model differ by at least
MOST_WATCHING = 0.02


def by_time(language: Language) -> Iterator[Figure]:
    """A plan that is as fast as uniform w8a8, beside that, one after the other."""
    data = language.calibrating(PLANNED, seed=0)
    with torch.inference_mode():
        chosen = plan(language.model, CANDIDATES, data, budget={"ms": FAST}, m=M)
        ours, uniform = copy.deepcopy(language.model), copy.deepcopy(language.model)
        optimize(ours, chosen.recipe)
        quantize(uniform, FAST, goal="memory")
        ids = language.held_out[:1, :M]
        models = {"plan": ours, "uniform": uniform, "again": copy.deepcopy(uniform)}
        times = interleaved({name: partial(model, ids) for name, model in models.items()}, SECONDS)
    # Never slower, as far as two copies of one model can tell.
    noise = max(LEAST_NOISE, abs(1 - times["again"] / times["uniform"]))
    name = f"plan at the time of {FAST}, M = {M}: its speed over uniform"
    yield Figure(name, times["uniform"] / times["plan"], "x", 1 - noise, False)


def encoder(_: Language) -> Iterator[Figure]:
    """Mean cosine of the sentence encoder's vectors with those of fp32."""
    found = load_encoder()
    sentences = all_sentences()
    judged = found.tokenize(sentences[:SENTENCES], ROWS)
    calibration = found.tokenize(sentences[SENTENCES : 3 * SENTENCES], ROWS)
    for scheme, least in LEAST_COSINE.items():
        cosines = {}
        for method in ("rtn", "awq", "gptq") if scheme.startswith("w4") else ("rtn",):
            model = copy.deepcopy(found.model)
            quantize(model, scheme, method=method, goal="memory", calibration=None if method == "rtn" else calibration)
            pairs = [(embed(model, batch), embed(found.model, batch)) for batch in judged]
            cosines[method] = mean(float((a * b).sum(1).mean()) for a, b in pairs)
        best = max(cosines, key=lambda method: cosines[method])
        yield Figure(f"encoder {scheme} {best}, mean cosine", cosines[best], "", least, False)


def watched(_: Language) -> Iterator[Figure]:
    """What a monitor adds to the time of a quantized encoder that reads one sentence a call.

    Calls that it lets pass and calls that it looks at are timed apart, each beside those of a model without a monitor:
    together, as they come, what it adds would be lost in how much one second differs from the next.
    """
    found = load_encoder()
    quantize(found.model, FAST, goal="memory")
    sentences = found.tokenize(all_sentences()[:ROWS], 1)
    usual = Monitor(found.model).every
    models = {"off": found.model, "passed": copy.deepcopy(found.model), "sampled": copy.deepcopy(found.model)}

    def serve(model: nn.Module) -> None:
        for sentence in sentences:
            model(**sentence)

    with ExitStack() as stack:
        for name, every in (("passed", sys.maxsize), ("sampled", 1)):
            monitor = Monitor(models[name], every=every)
            monitor.calibrate(sentences)
            stack.enter_context(monitor)
        stack.enter_context(torch.inference_mode())
        times = interleaved({name: partial(serve, model) for name, model in models.items()}, SECONDS)
    share = (times["passed"] + (times["sampled"] - times["passed"]) / usual) / times["off"] - 1
    yield Figure(f"monitor, one call in {usual}, of a call's time", share, "", MOST_WATCHING)


more = (by_time, encoder, watched)
