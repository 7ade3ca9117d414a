"""``--preset accuracy``: perplexity loss of each method on the demo's language model, against its targets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import mean

from torch import nn

from ..demo.accuracy.language import Language, load
from ..demo.table import text_table
from ..evaluate import evaluate
from .accuracy_methods import METHODS, TARGETS, Method, Target
from .accuracy_more import more
from .figures import Figure
from .results import Row

CALIBRATION, DISTILLING, HELD_OUT = 64, 1024, 128  # numbers of sequences


def _asked(only: Sequence[str]) -> tuple[list[Method], list[Callable[[Language], Iterator[Figure]]]]:
    """Methods and other figures whose setting or name matches a glob of ``only``; all if it is empty.

    Raises:
        ValueError: a glob matches nothing.
    """
    names = [*dict.fromkeys(method.setting for method in METHODS), *(run.__name__ for run in more)]
    for glob in only:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"--only {glob}: matches none of {'; '.join(names)}")
    taken = {name for name in names if not only or any(fnmatchcase(name, glob) for glob in only)}
    return [one for one in METHODS if one.setting in taken], [run for run in more if run.__name__ in taken]


def steps(only: Sequence[str]) -> int:
    """Number of progress steps of a run."""
    methods, others = _asked(only)
    return sum(len(method.seeds) * len(method.names) for method in methods) + len(others)


@dataclass(frozen=True)
class Loss:
    """ln(perplexity / perplexity of the dense model), one value per seed of the calibration data."""

    setting: str
    name: str
    nats: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.nats)

    @property
    def spread(self) -> float:
        """Largest minus smallest value."""
        return max(self.nats) - min(self.nats)


class Evaluator:
    """Measures losses on held-out text."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._data = language.held_out_batches(HELD_OUT)
        self.dense = self._nats(language.model)

    def _nats(self, model: nn.Module) -> float:
        return math.log(evaluate(model, None, self._data, "perplexity")["perplexity"])

    def losses(self, method: Method, seed: int) -> Iterator[float]:
        """The loss of a copy of the model after a method, with calibration data of a seed; then after recovery, if any."""
        model = copy.deepcopy(self.language.model)
        method.make(model, self.language.calibrating(CALIBRATION, seed))
        yield self._nats(model) - self.dense
        if method.recovered:
            self.language.recover(model, DISTILLING, seed)
            yield self._nats(model) - self.dense


Known = Mapping[tuple[str, str, int], float]  # setting, name, seed -> nats


def known(lines: Iterable[Row]) -> Known:
    """The losses in result lines."""
    found = (line for line in lines if line["kind"] == "accuracy")
    return {(line["setting"], line["name"], line["seed"]): line["nats"] for line in found}


def accuracy(
    put: Callable[[Sequence[Row]], None],
    advance: Callable[[str], None],
    done: Iterable[Row] = (),
    only: Sequence[str] = (),
) -> Iterator[str]:
    """Runs the methods selected by ``only``, except for losses in ``done``; yields the table of losses, then each target."""
    methods, others = _asked(only)
    evaluator, before = Evaluator(load()), known(done)
    losses = []
    for method in methods:
        nats: dict[str, list[float]] = {name: [] for name in method.names}
        for seed in method.seeds:
            keys = [(method.setting, name, seed) for name in method.names]
            there = [before[key] for key in keys] if before.keys() >= set(keys) else evaluator.losses(method, seed)
            for name, found in zip(method.names, there, strict=True):
                nats[name].append(found)
                put([{"kind": "accuracy", "setting": method.setting, "name": name, "seed": seed, "nats": found}])
                advance(f"{method.setting} {name}")
        losses += [Loss(method.setting, name, tuple(found)) for name, found in nats.items()]
    yield f"dense: perplexity {math.exp(evaluator.dense):.3f} on {HELD_OUT} held-out sequences of 256 tokens"
    if losses:
        yield table(losses)
    for figure in figures(losses):
        put([figure.line()])
        yield str(figure)
    for run in others:
        for figure in run(evaluator.language):
            put([figure.line()])
            yield str(figure)
        advance(run.__name__)


def figures(losses: Sequence[Loss]) -> Iterator[Figure]:
    """The targets of all measured settings, with the mean over the seeds."""
    means = {(loss.setting, loss.name): loss.mean for loss in losses}
    for target in (one for one in TARGETS if any(loss.setting == one.setting for loss in losses)):
        value = _value(target, means)
        if target.over is None:
            yield Figure(f"{target.setting} {target.name}, loss in nats", value, "", target.bound)
        else:
            yield Figure(f"{target.setting} {target.name}, loss over {target.over}'s", value, "", target.bound)


def _value(target: Target, means: Mapping[tuple[str, str], float]) -> float:
    own = {name: nats for (setting, name), nats in means.items() if setting == target.setting}
    value = min(own.values()) if target.name == "best" else own[target.name]
    return value if target.over is None else value / own[target.over]


def table(losses: Sequence[Loss]) -> str:
    """The losses of all methods. R: loss over that of the setting's first method."""
    losses = sorted(losses, key=lambda loss: [one.setting for one in losses].index(loss.setting))
    first = {loss.setting: loss.mean for loss in reversed(losses)}
    rows = [
        (
            loss.setting,
            loss.name,
            f"{loss.mean:.4f}",
            f"{loss.spread:.4f}" if len(loss.nats) > 1 else "-",
            f"{loss.mean / first[loss.setting]:.2f}" if first[loss.setting] > 0 else "-",
        )
        for loss in losses
    ]
    heads = ("setting", "method", "d ln ppl", "spread", "R")
    return text_table(heads, rows, right=range(2, 5))
