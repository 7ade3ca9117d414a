"""torch's own ways: fp32, bf16, and quantize_dynamic."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.io import save
from ...demo.variants import DYNAMIC, FP32, VARIANTS
from .contestant import Contestant, Ready
from .subject import Call, Inputs, Subject


def _save(subject: Subject, folder: Path) -> None:
    save(subject.build(), folder)


def _fp32(subject: Subject, _: Path) -> Ready:
    return partial(subject.ready, subject.build())


def cast(subject: Subject, model: nn.Module, inputs: Inputs) -> Call:
    """The call of a model in bfloat16."""
    return subject.ready(model, {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()})


def _bf16(subject: Subject, _: Path) -> Ready:
    return partial(cast, subject, subject.build().to(torch.bfloat16))


def _dynamic(subject: Subject, _: Path) -> Ready:
    build = next(variant.build for variant in VARIANTS if variant.name == DYNAMIC)
    return partial(subject.ready, build(subject.build()).model)


REFERENCE = Contestant(FP32, _fp32, least_cosine=0.9999)
SAVED_REFERENCE = Contestant(FP32, _fp32, least_cosine=0.9999, prepare=_save)
BFLOAT16 = Contestant("torch bf16", _bf16, least_cosine=0.99)
QUANTIZE_DYNAMIC = Contestant(DYNAMIC, _dynamic, least_cosine=0.9)
