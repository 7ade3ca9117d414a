"""LSTMs, GRUs, and a speech net of convolutions and an LSTM in the shape of Silero's voice detector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..whole import lines
from ..whole.goals import Goal, everywhere
from ..whole.models import Model
from ..whole.nybble_models import by_scheme, contestant
from ..whole.subject import Call, Inputs, Subject
from ..whole.torch_models import QUANTIZE_DYNAMIC, REFERENCE

_UNITS, _LAYERS, _STEPS = 512, 2, 100
_CASE, _SPEECH_CASE = "batch 1", "10 s"
_SAMPLES = 160_000  # 10 s


class Outputs(nn.Module):
    """The outputs of an LSTM or GRU, without its states."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        """x (steps, batch, inputs) -> (steps, batch, units)."""
        y: Tensor = self.rnn(x)[0]
        return y


class Speech(nn.Module):
    """The probability of speech every 32 ms: magnitudes of a spectrum, four convolutions, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        sides = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.Sequential(
            *(part for i, o, stride in sides for part in (nn.Conv1d(i, o, 3, stride, 1), nn.ReLU()))
        )
        self.rnn = nn.LSTM(128, 128)
        self.decoder = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, samples) -> (batch, frames)."""
        both = self.spectrum(nn.functional.pad(x.unsqueeze(1), (64, 64), mode="reflect"))
        real, imaginary = both.chunk(2, 1)
        frames = self.encoder((real.square() + imaginary.square()).sqrt())
        y = self.rnn(frames.permute(2, 0, 1))[0]
        return torch.sigmoid(self.decoder(y.permute(1, 2, 0).relu())).squeeze(1)


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make().eval()


def _random(*shape: int) -> Inputs:
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def _ready(model: nn.Module, inputs: Inputs) -> Call:
    @torch.inference_mode()
    def call() -> object:
        return model(**inputs)

    return call


def _rows(output: Any, _: Inputs) -> Tensor:
    found = torch.as_tensor(output).float()
    return found.reshape(-1, found.shape[-1])


def _stack(dense: type[nn.RNNBase]) -> nn.Module:
    layers: Any = dense  # torch gives the types of the base class
    return Outputs(layers(_UNITS, _UNITS, _LAYERS))


def _subject(name: str, make: Callable[[], nn.Module], case: str, *shape: int) -> Subject:
    return Subject(name, partial(_built, make), {case: partial(_random, *shape)}, _rows, ready=_ready)


_W8A8 = contestant("w8a8", by_scheme("w8a8"), least_cosine=0.999)
_W4A8 = contestant("w4a8g128", by_scheme("w4a8g128"), least_cosine=0.98)
_RECURRENT = tuple(
    _subject(
        f"{dense.__name__} {_LAYERS} x {_UNITS}",
        partial(_stack, dense),
        _CASE,
        *(_STEPS, 1, _UNITS),
    )
    for dense in (nn.LSTM, nn.GRU)
)
SPEECH = _subject("speech net", Speech, _SPEECH_CASE, 1, _SAMPLES)
MODELS = (
    *(Model(one, (REFERENCE, QUANTIZE_DYNAMIC, _W8A8, _W4A8), (lines.COSINE,)) for one in _RECURRENT),
    Model(SPEECH, (REFERENCE, QUANTIZE_DYNAMIC, _W8A8), (lines.COSINE,)),
)
GOALS = (
    *(Goal(one.name, _CASE, everywhere(1.5), (QUANTIZE_DYNAMIC.name,), least_cosine=0.999) for one in _RECURRENT),
    Goal(SPEECH.name, _SPEECH_CASE, everywhere(1.5), (REFERENCE.name,), least_cosine=0.999),
)
