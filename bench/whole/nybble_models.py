"""nybble: quantized and saved by one process, loaded and fused by another, as users do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nybble

from .contestant import Contestant, Ready
from .subject import Subject
from .torch_models import cast

# How a model in fp32 or bf16 is quantized, in place.
Quantize = Callable[[nn.Module, Subject], object]


def by_scheme(*scheme: str, calibrated: bool = False, **options: Any) -> Quantize:
    """Every layer in a scheme. calibrated: whether the method needs data."""

    def quantize(model: nn.Module, subject: Subject) -> object:
        data = list(subject.calibration()) if calibrated else None
        return nybble.quantize(model, *scheme, goal="memory", calibration=data, **options)

    return quantize


def by_plan(candidates: tuple[str, ...], harm: float) -> Quantize:
    """The fastest mix of schemes within a harm, the relative squared change of the output; 4 bits by GPTQ."""

    def quantize(model: nn.Module, subject: Subject) -> object:
        data = list(subject.calibration())[::4]  # choosing rounds and runs all layers in all schemes
        chosen = nybble.plan(
            model,
            candidates,
            data[::4],
            budget={"harm": harm},
            save="ms",
            m=256,
            harm="output",
            quantize={"method": "gptq", "calibration": data},
        )
        return nybble.optimize(model, chosen.recipe, calibration=data)

    return quantize


def _convert(model: nn.Module, subject: Subject, quantize: Quantize, dtype: torch.dtype) -> None:
    quantize(model.to(dtype), subject)


def _prepare(subject: Subject, folder: Path, convert: Quantize) -> None:
    model = subject.build()
    convert(model, subject)
    nybble.save(model, folder)


def loaded(subject: Subject, folder: Path, dtype: torch.dtype = torch.float32, attention: str = "float") -> nn.Module:
    """The model of a folder, fused."""
    model = nybble.load(subject.build().to(dtype), folder)
    nybble.fuse(model, [subject.arguments(subject.example())], goal="always", attention=attention)
    return model


def _load(subject: Subject, folder: Path, dtype: torch.dtype, attention: str) -> Ready:
    model = loaded(subject, folder, dtype, attention)
    return partial(subject.ready if dtype == torch.float32 else partial(cast, subject), model)


def _start(subject: Subject, folder: Path, dtype: torch.dtype) -> Ready:
    """Not fused: finding and proving chains takes longer than many first calls."""
    model = nybble.load((subject.empty or subject.build)().to(dtype), folder)
    return partial(subject.ready if dtype == torch.float32 else partial(cast, subject), model)


def contestant(
    name: str,
    quantize: Quantize,
    dtype: torch.dtype = torch.float32,
    least_cosine: float = 0.9,
    attention: str = "float",
) -> Contestant:
    """nybble's contestant of this name. attention: see nybble.fuse."""
    convert = partial(_convert, quantize=quantize, dtype=dtype)
    return Contestant(
        f"nybble {name}",
        partial(_load, dtype=dtype, attention=attention),
        least_cosine,
        prepare=partial(_prepare, convert=convert),
        peer=False,
        needs=("safetensors",),
        install="'nybble[save]'",
        start=partial(_start, dtype=dtype) if attention == "float" else None,
        convert=convert,
    )
