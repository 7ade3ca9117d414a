"""Sentences through ``SentenceTransformer.encode``: how much of the model's gain is left with all that is around it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import nn

from ...demo.data import all_sentences
from ...demo.model import model_dir
from ..results import Row
from ..timing import Runner, in_turns
from . import lines
from .contestant import Contestant
from .files import prepared
from .nybble_models import loaded
from .subject import Call, Inputs, Subject

_SENTENCES, _ROWS, _BUDGET_S = 64, 32, 15.0
_MODULE = "sentence_transformers"


def pipeline(subject: Subject, contestants: Sequence[Contestant], root: Path, threads: int) -> list[Row]:
    """Of nybble's first contestant: its gain over torch fp32 in `encode` over its gain in the model alone."""
    one = next(one for one in contestants if not one.peer)
    if find_spec(_MODULE) is None:
        reason = f"{lines.KEPT}: {_MODULE} not installed (pip install 'nybble[peers]')"
        return [{"kind": "skip", "contestant": one.name, "reason": reason}]
    dense = subject.build()
    batches = _batches(dense)
    models = [dense, loaded(subject, prepared(root, subject, one, threads))]
    timings, _ = in_turns([Runner([call]) for model in models for call in _calls(subject, model, batches)], _BUDGET_S)
    encode, alone, through, bare = [timing.median for timing in timings]
    seconds = {"encode": through, "model": bare, "encode, fp32": encode, "model, fp32": alone}
    kept = (encode / through) / (alone / bare)
    return [lines.line(subject.name, lines.KEPT, one.name, one.peer, kept, seconds=seconds)]


def _pipe(model: nn.Module) -> Any:
    pipe: Any = import_module(_MODULE).SentenceTransformer(str(model_dir()), device="cpu")
    pipe[0].model = model
    return pipe


def _encoding(pipe: Any) -> Call:
    """All sentences through `encode`; reading them from the corpus is not part of it."""
    return partial(pipe.encode, all_sentences()[:_SENTENCES], batch_size=_ROWS, show_progress_bar=False)


def _batches(model: nn.Module) -> list[Inputs]:
    """The inputs that `encode` gives to the model, whose forward it calls past all hooks."""
    found: list[Inputs] = []
    pipe, forward = _pipe(model), model.forward

    def recorded(**inputs: Any) -> Any:
        found.append(inputs)
        return forward(**inputs)

    with patch.object(model, "forward", recorded):
        _encoding(pipe)()
    return found


def _calls(subject: Subject, model: nn.Module, batches: Sequence[Inputs]) -> tuple[Call, Call]:
    """All sentences through `encode`, and their batches through the model alone."""
    alone = [subject.ready(model, batch) for batch in batches]
    return _encoding(_pipe(model)), lambda: [call() for call in alone]
