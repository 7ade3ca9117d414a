"""One watched layer: its windows, its readings, and the limits beyond which they become alarms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .statistics import Reading, Statistics, Tally, anchor_of, compare

PATIENCE = 3  # windows in a row that make an alarm
WARN_PSI = 0.1
_MOVING = 0.5  # weight of the latest window in the moving average of the largest magnitudes
# Measure -> whether a reading is beyond its limit, and its text in the report.
LIMITS: dict[str, tuple[Callable[[Reading], bool], Callable[[Reading], str]]] = {
    "saturation": (
        lambda r: r.saturation > 0.001,
        lambda r: f"{r.saturation:.2%} of values beyond the calibrated range",
    ),
    "range": (lambda r: not 0.5 <= r.amax_ratio <= 1.5, lambda r: f"range {r.amax_ratio:.2f}x the calibrated one"),
    "scale": (lambda r: not 0.77 <= r.scale <= 1.3, lambda r: f"channels {r.scale:.2f}x their calibrated size"),
    "psi": (lambda r: r.psi > 0.2, lambda r: f"PSI {r.psi:.2f}"),
    "channels": (lambda r: bool(r.new_channels), lambda r: f"new outlier channels {_some(r.new_channels)}"),
}


@dataclass(frozen=True)
class LayerDrift:
    """The state of a layer after its last window.

    ``reading``: the last window, or None before the first. ``alarms``: measure -> text, for measures beyond their limit
    for three windows or more. ``bad_calls``: calls with NaN or Inf.
    """

    name: str
    windows: int
    alarmed_windows: int
    bad_calls: int
    reading: Reading | None
    alarms: dict[str, str]

    @property
    def state(self) -> str:
        """One of "waiting" (for the first window), "ok", "warn" (beyond a limit, or PSI above 0.1) and "alarm"."""
        if self.reading is None:
            return "waiting"
        beyond = any(is_beyond(self.reading) for is_beyond, _ in LIMITS.values())
        return "alarm" if self.alarms else "warn" if beyond or self.reading.psi > WARN_PSI else "ok"

    def to_dict(self) -> dict[str, Any]:
        """All fields for JSON; an infinite ratio becomes the string "inf"."""
        reading = {} if self.reading is None else self.reading._asdict()
        ratio = reading.get("amax_ratio")
        if ratio is not None and math.isinf(ratio):
            reading["amax_ratio"] = "inf"
        counts = {key: value for key, value in vars(self).items() if key not in ("reading", "alarms")}
        return {**counts, "state": self.state, **reading, "alarms": self.alarms}


class Watch:
    """Counts the inputs (T, K) of one layer in windows of rows, and compares them with its calibration, if there is one.

    Not thread-safe. ``is_well_known``: whether calibration filled at least one window.
    """

    def __init__(self, name: str, features: int, window: int) -> None:
        self.name, self.features, self._window = name, features, window
        self.is_well_known = False
        self._calibrated: Statistics | None = None
        self._closed: list[Tally] = []
        self.restart()

    def restart(self) -> None:
        """Reset all counts; the calibration is kept."""
        self._tally: Tally | None = None
        self._windows = self._alarmed = self._bad = 0
        self._amax: float | None = None
        self._reading: Reading | None = None
        self._streaks = dict.fromkeys(LIMITS, 0)

    @property
    def statistics(self) -> Statistics | None:
        """The statistics of calibration, or None."""
        return self._calibrated

    @statistics.setter
    def statistics(self, found: Statistics | None) -> None:
        self._calibrated = found
        self.restart()

    def add(self, x: Tensor) -> bool:
        """Count rows; returns whether they completed a window. Rows with NaN or Inf count as one bad call and are dropped."""
        x = x.detach().float()
        amax = float(x.abs().amax()) if x.numel() else 0.0
        if not math.isfinite(amax):
            self._bad += 1
            return False
        if self._tally is None:
            self._tally = self._open(amax)
        self._tally.add(x, amax)
        if self._tally.rows < self._window:
            return False
        self._close()
        return True

    def calibrated(self) -> None:
        """Set the statistics from the windows so far; an unfinished window counts only if it is the only one."""
        self.is_well_known = bool(self._closed)
        if self._tally is not None and self._tally.rows and not self._closed:
            self._closed.append(self._tally)
        found = Statistics.of(self._closed) if self._closed else None
        self._closed = []
        self.statistics = found

    def drift(self) -> LayerDrift:
        """The current state of the layer."""
        alarms = {
            name: f"{LIMITS[name][1](self._reading)} for {streak} windows"
            for name, streak in self._streaks.items()
            if streak >= PATIENCE and self._reading is not None
        }
        return LayerDrift(self.name, self._windows, self._alarmed, self._bad, self._reading, alarms)

    def _open(self, amax: float) -> Tally:
        if self._calibrated is not None:
            return Tally(self.features, self._calibrated.anchor, self._calibrated.amax)
        return Tally(self.features, self._closed[0].anchor if self._closed else anchor_of(amax))

    def _close(self) -> None:
        assert self._tally is not None, "a window is open"  # noqa: S101
        window, self._tally = self._tally, None
        self._windows += 1
        if self._calibrated is None:
            self._closed.append(window)
            return
        before = window.amax if self._amax is None else self._amax
        self._amax = before + _MOVING * (window.amax - before)
        self._reading = compare(window, self._calibrated, self._amax)
        for name, (is_beyond, _) in LIMITS.items():
            self._streaks[name] = self._streaks[name] + 1 if is_beyond(self._reading) else 0
        self._alarmed += max(self._streaks.values()) >= PATIENCE


def _some(channels: tuple[int, ...]) -> str:
    return ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")


def pick_rows(rows: Tensor, most: int, turn: int) -> Tensor:
    """At most ``most`` evenly spaced ones of some rows (T, K), others each turn."""
    step = -(-len(rows) // most)
    return rows[turn % step :: step] if step > 1 else rows
