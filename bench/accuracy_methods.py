"""Settings, methods and targets of ``--preset accuracy``, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..passes.choose import plan
from ..passes.optimize import optimize
from ..passes.quantize import quantize
from ..passes.sparsify import sparsify
from .accuracy_outliers import plant
from .accuracy_simulated import simulate

SEEDS = (0, 1, 2)  # seeds of the calibration data
Make = Callable[[nn.Module, Sequence[Tensor]], object]


@dataclass(frozen=True)
class Method:
    """A method applied in a setting. seeded: uses calibration data. recovered: also measured after distillation."""

    setting: str
    name: str
    make: Make
    seeded: bool = True
    recovered: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that give different results."""
        return SEEDS if self.seeded or self.recovered else SEEDS[:1]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its results: one model, or that and the recovered model."""
        return (self.name, f"{self.name} + recover") if self.recovered else (self.name,)


@dataclass(frozen=True)
class Target:
    """The largest acceptable loss of a method: ``bound`` times that of the ``over`` method, or in nats if it is None.

    name "best": the best method of the setting.
    """

    setting: str
    name: str
    over: str | None
    bound: float


W4, W4_CHANNEL, W3, W8A8 = "w4a16g128", "w4a16", "w3g128 (simulated)", "w8a8"
FREE, MORE, NM = "50%", "70%", "2:4"
OUTLIERS = (4, 16)  # channels of 384
CANDIDATES = ("w4a16", "w4a16g32", "w4a16g64", "w8a16", "sp50w4a16g128", "sp75w4a16g128")
PLANNED = 3  # calibration batches used to choose a plan
RECOVERED = (W4, "rtn"), (FREE, "sparsegpt"), (NM, "sparsegpt")


def _quantized(scheme: str, method: str, seeded: bool, **options: Any) -> Method:
    def make(model: nn.Module, calibration: Sequence[Tensor]) -> object:
        data = calibration if seeded else None
        return quantize(model, scheme, method=method, goal="memory", calibration=data, **options)

    name = f"{method} + smooth" if options else method
    return Method(scheme, name, make, seeded, (scheme, name) in RECOVERED)


def _pruned(pattern: str, method: str, outliers: int = 0) -> Method:
    seeded = method != "magnitude"

    def make(model: nn.Module, calibration: Sequence[Tensor]) -> object:
        plant(model, outliers)
        data = calibration if seeded else None
        return sparsify(model, pattern, method=method, calibration=data, scheme=None, goal="memory")

    setting = f"{pattern}, {outliers} outlier channels" if outliers else pattern
    return Method(setting, method, make, seeded, (setting, method) in RECOVERED)


def _planned(budget: str) -> Method:
    """A scheme per layer, chosen by its loss after GPTQ or SparseGPT, within the size of the uniform scheme ``budget``."""

    def make(model: nn.Module, calibration: Sequence[Tensor]) -> object:
        found = plan(
            model,
            CANDIDATES,
            calibration[:PLANNED],
            budget={"bytes": budget},
            quantize={"method": "gptq", "calibration": calibration},
            sparsify={"method": "sparsegpt", "calibration": calibration},
        )
        return optimize(model, found.recipe, calibration=calibration)

    return Method(budget, "plan", make)


METHODS = (
    *(_quantized(scheme, method, False) for scheme in (W4, W4_CHANNEL) for method in ("rtn", "mse")),
    *(_quantized(scheme, method, True) for scheme in (W4, W4_CHANNEL) for method in ("awq", "gptq")),
    _planned(W4),
    Method(W3, "rtn", lambda model, _: simulate(model, 3, None), False),
    Method(W3, "gptq", lambda model, calibration: simulate(model, 3, calibration)),
    _quantized(W8A8, "rtn", False),
    _quantized(W8A8, "rtn", True, smooth=True),
    *(_pruned(pattern, method) for pattern in (FREE, MORE, NM) for method in ("magnitude", "wanda", "sparsegpt")),
    # The model lacks outlier channels, for which Wanda was designed: add some without changing the model's function.
    *(_pruned(FREE, method, outliers) for outliers in OUTLIERS for method in ("magnitude", "wanda")),
)
TARGETS = (
    Target(W4, "gptq", "rtn", 0.85),
    Target(W4, "awq", "rtn", 0.9),
    Target(W4, "best", "rtn", 0.75),
    Target(W4, "plan", "rtn", 0.7),
    Target(W4, "plan", "gptq", 0.7),  # the gain of mixing schemes, with the same methods
    Target(W3, "gptq", "rtn", 0.6),
    Target(W8A8, "rtn + smooth", None, 0.02),
    Target(FREE, "sparsegpt", "magnitude", 0.35),
    Target(FREE, "wanda", "magnitude", 0.5),
    # At 50 % this model hardly depends on which weights are pruned; at 70 % magnitude pruning breaks it, as published.
    Target(MORE, "sparsegpt", "magnitude", 0.35),
    Target(MORE, "wanda", "magnitude", 0.5),
    Target(NM, "sparsegpt", "magnitude", 0.5),
    Target(W4, "rtn + recover", "rtn", 0.6),
    Target(FREE, "sparsegpt + recover", "sparsegpt", 0.6),
    Target(NM, "sparsegpt + recover", "sparsegpt", 0.75),
)
