"""Passes that change a model: quantize, sparsify, rotate, recover, optimize, and the analysis behind `plan`.

Inside:

* `quantize`, `sparsify`, `recover`, `optimize`: the public functions, their arguments checked here.
* `round/`, `prune/`, `recovery/`, `rotate/`: the methods of each pass.
* `layerwise/`: what methods that go through a model block by block on calibration data share.
* `sensitivity/`, `choose/`: how much each scheme hurts in each layer, and which scheme to take under a budget.
* `plan`, `build`, `measure`, `rows`: which layers are swapped, the new layers, their speed, and the report.

Passes replace modules. They never call kernels.
"""

from __future__ import annotations

from .quantize import quantize
from .rotate import rotate
from .sparsify import sparsify

__all__ = ["quantize", "rotate", "sparsify"]
