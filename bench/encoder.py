"""The sentence encoder MiniLM in presets: how close its vectors stay to those of torch fp32, and its speed over torch bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..demo import DemoUnavailable
from ..demo.data import all_sentences
from ..demo.measure import Plan, make_rounds, measure, speedup
from ..demo.model import Batch, Encoder, embed, load
from ..demo.variants import BF16, BF16_W8A8, VARIANTS, W8A8
from ..passes.quantize import quantize
from .figures import Figure

SENTENCES, ROWS = 256, 32
LEAST_OVER_BF16 = 1.2
_PLAN = Plan(sentences=512, batches_per_round=1, singles_per_round=1, batch_budget_s=8, single_budget_s=1)


def cosines(schemes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line of kind "cosine" for each scheme: the mean over sentences, or why it was not measured."""
    encoder, reason = _encoder()
    if encoder is None:
        yield from ({"kind": "cosine", "scheme": scheme, "cosine": None, "reason": reason} for scheme in schemes)
        return
    batches = encoder.tokenize(all_sentences()[:SENTENCES], ROWS)
    exact = _vectors(encoder.model, batches)
    for scheme in schemes:
        model = deepcopy(encoder.model)
        quantize(model, scheme, goal="memory")
        mean = float((_vectors(model, batches) * exact).sum(dim=1).mean())
        yield {"kind": "cosine", "scheme": scheme, "cosine": round(mean, 5), "reason": None}


def over_bf16() -> Iterator[Figure]:
    """The speed of the encoder with w8a8 over torch bf16, in batches of 32, for either dtype of the activations.

    Raises:
        DemoUnavailable: the encoder is not installed.
    """
    encoder = load()
    built = {one.name: one.build for one in VARIANTS if one.name in (BF16, W8A8, BF16_W8A8)}
    models = {name: build(deepcopy(encoder.model)).model for name, build in built.items()}
    rounds = make_rounds(encoder, all_sentences()[: _PLAN.sentences], _PLAN)
    tracks = measure(models, rounds, _PLAN, lambda _: None)
    for name in (W8A8, BF16_W8A8):
        yield Figure(
            f"MiniLM, {name} over {BF16}", speedup(tracks[name], tracks[BF16]), "x", LEAST_OVER_BF16, at_most=False
        )


def _encoder() -> tuple[Encoder | None, str]:
    """The encoder, or why it is not here."""
    try:
        return load(), ""
    except DemoUnavailable as error:
        return None, str(error)


def _vectors(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([embed(model, batch) for batch in batches])
