"""What quantize keeps in memory after it returns."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import nybble


@pytest.mark.parametrize("goal", ["memory", "speed"])
def test_dense_layers_are_freed_without_a_collection(goal: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    nybble.quantize(nn.Sequential(nn.Linear(64, 64)), "w8a8", goal=goal, timing_s=0.1, progress=False)
    dense = [weakref.ref(layer) for layer in model if isinstance(layer, nn.Linear)]
    gc.collect()
    gc.disable()
    try:
        report = nybble.quantize(model, "w8a8", goal=goal, timing_s=0.1, progress=False)
        swapped = [isinstance(layer, nybble.nn.Linear) for layer in (model[0], model[2])]
        assert [one() is None for one in dense] == swapped
    finally:
        gc.enable()
    assert len(report.layers) == 2
    assert torch.isfinite(model(torch.randn(3, 64))).all()
