"""Figures of start-up: from a directory to the vector of a first sentence, each start in a process of its own.

All starts begin after the same imports: torch, transformers with the class of the model, and nybble. torch's start reads the
float32 checkpoint of the encoder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ..checkpoint.io import load, save
from ..demo.model import embed, empty, model_dir, no_loading_bar
from ..passes.quantize import quantize
from .apart import apart
from .figures import Figure

SCHEME = "w8a8"
SENTENCE = "The first sentence that a user asks about."
MOST_OVER_TORCH, MOST_OVER_ANEW = 1.2, 1.0
_LEAST_ROUNDS = 3


def _transformers() -> Any:
    return import_module("transformers")


def _dense(_: Path) -> nn.Module:
    with no_loading_bar():
        model: nn.Module = _transformers().AutoModel.from_pretrained(model_dir(), local_files_only=True)
    return model.eval()


def _anew(directory: Path) -> nn.Module:
    model = _dense(directory)
    quantize(model, SCHEME, goal="memory", progress=False)
    return model


def _saved(directory: Path) -> nn.Module:
    return load(empty(), directory)


WAYS: dict[str, Callable[[Path], nn.Module]] = {
    "torch from_pretrained": _dense,
    "nybble quantize": _anew,
    "nybble load": _saved,
}


def _write(directory: str, _: int) -> None:
    save(_anew(Path()), directory)


def _start(way: str, threads: int, directory: Path) -> float:
    """Seconds from nothing but imports and a tokenized sentence to its vector."""
    torch.set_num_threads(threads)
    transformers, path = _transformers(), model_dir()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    getattr(transformers, config.architectures[0])  # imports its module
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    batch = dict(tokenizer([SENTENCE], return_tensors="pt"))
    start = time.perf_counter()
    embed(WAYS[way](directory), batch)
    return time.perf_counter() - start


def startup_figures(budget_s: float) -> Iterator[Figure]:
    """Starts in turns, medians; rounds until the budget is spent, at least three.

    Raises:
        DemoUnavailable: the encoder is not installed.
    """
    model_dir()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    end = time.perf_counter() + budget_s
    with tempfile.TemporaryDirectory() as directory:
        threads = torch.get_num_threads()
        apart(_write, directory, threads)
        start = partial(_start, directory=Path(directory))
        while len(times["nybble load"]) < _LEAST_ROUNDS or time.perf_counter() < end:
            for way, seconds in times.items():
                seconds.append(apart(start, way, threads))
    dense, anew, loaded = (median(seconds) for seconds in times.values())
    name = f"MiniLM {SCHEME}, load to the first sentence ({1e3 * loaded:.0f} ms)"
    topic = "start-up"
    yield Figure(f"{name} over torch's ({1e3 * dense:.0f} ms)", loaded / dense, "x", MOST_OVER_TORCH, topic=topic)
    yield Figure(f"{name} over quantizing anew ({1e3 * anew:.0f} ms)", loaded / anew, "x", MOST_OVER_ANEW, topic=topic)
