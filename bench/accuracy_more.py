"""Other figures of ``--preset accuracy``: a plan's speed, the sentence encoder's accuracy, the monitor's overhead."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from ..demo.accuracy.language import Language
from ..demo.data import all_sentences
from ..demo.model import embed
from ..demo.model import load as load_encoder
from ..monitor.monitor import Monitor
from ..paired import Call, Limits, Pairs, decide
from ..passes.choose import plan
from ..passes.optimize import optimize
from ..passes.quantize import quantize
from .figures import Figure

FAST = "w8a8"
CANDIDATES = ("w4a8g128", "w8a16")
M = 16
PLANNED = 24  # sequences used to choose a plan
SENTENCES, ROWS, SECONDS = 256, 32, 20.0
LEAST_COSINE = {"w4a8g128": 0.99, "w8a8": 0.998}
LEAST_NOISE = 0.01  # smallest assumed difference between two runs of one model
MOST_WATCHING = 0.02
PASSING = 1000  # calls of a small model per measurement


def by_time(language: Language) -> Iterator[Figure]:
    """Speed of a plan chosen with the time budget of uniform w8a8, over uniform w8a8, timed in turns."""
    data = language.calibrating(PLANNED, seed=0)
    with torch.inference_mode():
        chosen = plan(language.model, CANDIDATES, data, budget={"ms": FAST}, m=M)
        ours, uniform = copy.deepcopy(language.model), copy.deepcopy(language.model)
        optimize(ours, chosen.recipe)
        quantize(uniform, FAST, goal="memory")
        ids = language.held_out[:1, :M]
        models = {"plan": ours, "again": copy.deepcopy(uniform)}
        speeds = {name: _in_pairs(partial(uniform, ids), partial(model, ids))[1] for name, model in models.items()}
    # Must not be slower, within the difference between two copies of one model.
    noise = max(LEAST_NOISE, abs(1 - 1 / speeds["again"]))
    name = f"plan at the time of {FAST}, M = {M}: its speed over uniform"
    yield Figure(name, speeds["plan"], "x", 1 - noise, False)


def _in_pairs(first: Call, second: Call) -> tuple[float, float]:
    """Median seconds of the first one, and the median ratio of its time to that of the second."""
    pairs = Pairs(first, second)
    speed = decide({0: pairs}, Limits(SECONDS / 2, SECONDS / 2, lambda _: False))[0]
    return median(pairs.firsts), speed.ratio


def encoder(_: Language) -> Iterator[Figure]:
    """Mean cosine similarity of the quantized sentence encoder's embeddings with the fp32 ones."""
    found = load_encoder()
    sentences = all_sentences()
    held_out = found.tokenize(sentences[:SENTENCES], ROWS)
    calibration = found.tokenize(sentences[SENTENCES : 3 * SENTENCES], ROWS)
    for scheme, least in LEAST_COSINE.items():
        cosines = {}
        for method in ("rtn", "awq", "gptq") if scheme.startswith("w4") else ("rtn",):
            model = copy.deepcopy(found.model)
            quantize(model, scheme, method=method, goal="memory", calibration=None if method == "rtn" else calibration)
            pairs = [(embed(model, batch), embed(found.model, batch)) for batch in held_out]
            cosines[method] = mean(float((a * b).sum(1).mean()) for a, b in pairs)
        best = max(cosines, key=lambda method: cosines[method])
        yield Figure(f"encoder {scheme} {best}, mean cosine", cosines[best], "", least, False)


def watched(_: Language) -> Iterator[Figure]:
    """Overhead of a monitor on a quantized encoder, one sentence per call.

    A call that is not sampled costs two module hooks, whatever the model. They are timed on a small model, because
    beside the encoder they would be lost in the noise.
    """
    found = load_encoder()
    quantize(found.model, FAST, goal="memory")
    sentences = found.tokenize(all_sentences()[:ROWS], 1)
    off, sampled = _times(found.model, sentences, every=1)
    small, row = nn.Sequential(nn.Linear(8, 8)), {"input": torch.zeros(1, 8)}
    without, passing = _times(small, PASSING * [row], every=sys.maxsize)
    usual = Monitor(small).every
    share = (passing - without + (sampled - off) / usual) / off
    yield Figure(f"monitor, one call in {usual}, of a call's time", share, "", MOST_WATCHING)


def _times(model: nn.Module, calls: Sequence[Mapping[str, Any]], every: int) -> tuple[float, float]:
    """Seconds per call without a monitor, and with one that samples one call in ``every``."""
    monitor = Monitor(model, every=every)
    monitor.calibrate(calls)

    def serve(watching: bool) -> None:
        with torch.inference_mode(), monitor if watching else nullcontext():
            for call in calls:
                model(**call)

    off, speed = _in_pairs(partial(serve, False), partial(serve, True))
    return off / len(calls), off / speed / len(calls)


more = (by_time, encoder, watched)
