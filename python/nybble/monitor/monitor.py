"""Watch the inputs of a model's layers in service, and say when they are no longer those of its calibration."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoint.files import CheckpointError
from ..model import options
from ..model.batches import call, check_batches
from ..model.eligible import dense_weight, is_linear_like
from ..model.stages import eval_mode
from ..model.walk import sites
from ..nn.module import QuantizedModule
from ..text import Part, Shown
from .statistics import Statistics
from .watch import LayerDrift, Watch, pick_rows

if TYPE_CHECKING:
    from typing_extensions import Self

_LOGGER = logging.getLogger("nybble")
_MOST_ROWS = 64  # of one call that are looked at


@dataclass(frozen=True)
class Drift(Shown):
    """What a monitor has seen so far. ``print(drift)`` shows the layers that are not as they were, and what to do."""

    layers: tuple[LayerDrift, ...]
    calls: int
    sampled_calls: int
    is_on: bool

    @property
    def drifting(self) -> tuple[LayerDrift, ...]:
        """The layers with an alarm, the worst by PSI first."""
        found = [layer for layer in self.layers if layer.alarms]
        return tuple(sorted(found, key=lambda layer: -layer.reading.psi if layer.reading else 0.0))

    @property
    def suggestion(self) -> str | None:
        """What to do, or None."""
        names = [layer.name for layer in self.drifting]
        if not names:
            return None
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"the inputs of {some} are no longer those of calibration: calibrate again on current data"

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        state = "on" if self.is_on else "off"
        lines = [f"monitor {state}: {self.calls} calls, {self.sampled_calls} sampled, {len(self.layers)} layers"]
        for layer in sorted(self.layers, key=lambda one: (not one.alarms, one.state != "warn")):
            if layer.alarms or layer.state == "warn" or layer.bad_calls:
                bad = [f"{layer.bad_calls} calls with NaN or Inf"] if layer.bad_calls else []
                lines.append(
                    f"{layer.state:5}  {layer.name}: {'; '.join([*layer.alarms.values(), *bad]) or 'one to watch'}"
                )
        return [*lines, *([self.suggestion] if self.suggestion else [])]

    def to_json(self) -> str:
        """All of it as strict JSON."""
        facts = {key: value for key, value in vars(self).items() if key != "layers"}
        layers = [layer.to_dict() for layer in self.layers]
        return json.dumps(
            {"schema": "nybble.drift/1", **facts, "suggestion": self.suggestion, "layers": layers}, indent=2
        )


class Monitor:
    """Compares, in one call of the model of many, what its layers multiply with what they multiplied in calibration.

        monitor = nybble.Monitor(model)
        monitor.calibrate(batches)
        with monitor:
            serve(model)
        print(monitor.report())

    Rows of a layer's inputs are counted in windows. Beyond a limit for three windows in a row, each of these is an
    alarm: more than 0.1 % of values above the calibrated range; a range that is more than 1.5 or less than 0.5 of
    the calibrated one; channels of more than 1.3 or less than 0.77 of their calibrated size, at the median; a
    population stability index above 0.2; a channel that is new near the largest and three times its calibrated size.
    The model's outputs never change, and no input is kept. Any threads may call the model.

    What calls a part of the model without the model itself is not seen.

    Args:
        model: any module; watched are its quantized layers, or its Linear layers where none is quantized.
        statistics: a file that ``save`` wrote, instead of ``calibrate``.
        include, exclude: glob patterns on full module names, as in ``quantize``.
        every: one call of the model in so many is looked at, at 64 rows of each layer's input.
        window: rows of a layer that are compared at a time.
        log: a file to which each window appends a line of JSON.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is nothing to watch.
        CheckpointError: (a ValueError) the statistics are damaged or not of this model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: str | os.PathLike[str] | None = None,
        include: options.Patterns = None,
        exclude: options.Patterns = None,
        every: int = 512,
        window: int = 512,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__}: wants a torch.nn.Module")
        for argument, value in (("every", every), ("window", window)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument}={value!r}: must be an int of at least 1")
        self._model, self.every = model, every
        self._log = None if log is None else Path(log)
        self._layers = _layers(model, include, exclude)
        self._watches = {
            name: Watch(name, dense_weight(layer).shape[1], window) for name, layer in self._layers.items()
        }
        self._lock = threading.Lock()
        self._hooks: list[RemovableHandle] = []
        self._layer_hooks: list[RemovableHandle] = []
        self._sampler: int | None = None
        self._mask: Tensor | None = None
        self._calls = self._sampled = 0
        if statistics is not None:
            self._load(Path(statistics))

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Run the model on batches, each a tensor, a tuple or a dict, and keep what its layers multiply as the norm.

        Warns where a layer sees fewer rows than a window has. Raises TypeError or ValueError for what are no batches,
        RuntimeError while the monitor is on.
        """
        found = check_batches(batches, self._model)
        if self._hooks:
            raise RuntimeError("calibrate: the monitor is on; stop it first")
        for watch in self._watches.values():
            watch.statistics = None
        every, self.every = self.every, 1
        try:
            self._install()
            with eval_mode(self._model), torch.no_grad():
                for batch in found or ():
                    call(self._model, batch)
        finally:
            self.stop()
            self.every = every
            for watch in self._watches.values():
                watch.calibrated()
            self._calls = self._sampled = 0
        few = [name for name, watch in self._watches.items() if not watch.is_well_known]
        if few:
            warnings.warn(
                f"calibration: {len(few)} layers saw less than a window of rows, {few[0]} for one", stacklevel=2
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics as safetensors. Raises ValueError where there are none, OSError, or ImportError."""
        from ..checkpoint.tensors import require_safetensors, write_tensors

        require_safetensors()
        if not self._is_calibrated:
            raise ValueError("save: there are no statistics; calibrate first")
        tensors = {
            f"{name}.{key}": torch.zeros(shape, dtype=dtype) if found is None else found.tensors()[key]
            for name, watch in self._watches.items()
            for found in [watch.statistics]
            for key, (shape, dtype) in Statistics.specs(watch.features).items()
        }
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write_tensors(tensors, aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def start(self) -> None:
        """Watch from now on. Without statistics the monitor stays off, and warns."""
        if not self._is_calibrated:
            warnings.warn("nybble.Monitor has no calibration statistics and stays off; calibrate it", stacklevel=2)
        elif not self._hooks:
            self._install()

    def stop(self) -> None:
        """Watch no more; what was found stays."""
        with self._lock:
            while self._hooks:
                self._hooks.pop().remove()
            self._end()

    @property
    def is_on(self) -> bool:
        """Whether it watches."""
        return bool(self._hooks)

    @property
    def _is_calibrated(self) -> bool:
        return any(watch.statistics is not None for watch in self._watches.values())

    def report(self) -> Drift:
        """What was found since ``calibrate``."""
        with self._lock:
            layers = tuple(watch.drift() for watch in self._watches.values())
            return Drift(layers, self._calls, self._sampled, self.is_on)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        # A copy of a watched model takes this along in its hooks; it watches the layers of the one it was made for.
        return self

    def _install(self) -> None:
        # Between samples the model carries these two alone: a hook on every layer would cost every call.
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        with self._lock:
            self._calls += 1
            if (self._calls - 1) % self.every or self._sampler not in (None, me):
                return
            self._end()  # of a call of this thread that was interrupted
            self._sampler, self._sampled = me, self._sampled + 1
            mask = kwargs.get("attention_mask")
            self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            for name, layer in self._layers.items():
                hook = layer.register_forward_pre_hook(_Look(self, self._watches[name]), with_kwargs=True)
                self._layer_hooks.append(hook)

    def _after(self, _: nn.Module, args: Any, output: Any) -> None:
        if self._sampler == threading.get_ident():
            with self._lock:
                self._end()

    def _end(self) -> None:
        while self._layer_hooks:
            self._layer_hooks.pop().remove()
        self._sampler = self._mask = None

    def look(self, watch: Watch, x: Any) -> None:
        """Count an input of a layer in the call that is looked at."""
        if self._sampler != threading.get_ident() or not isinstance(x, Tensor) or x.is_meta or x.dim() < 1:
            return
        # Tensors of inference mode could not be added to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if watch.add(pick_rows(x, self._mask, _MOST_ROWS, self._sampled)) and watch.statistics is not None:
                self._write(watch.drift())

    def _write(self, drift: LayerDrift) -> None:
        if self._log is None:
            return
        line = json.dumps({"time": round(time.time(), 3), **drift.to_dict()}, allow_nan=False)
        try:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            # Not a warning: one that is made an error would end the user's call.
            _LOGGER.warning("log=%r: %s; the monitor goes on without it", str(self._log), error.strerror)
            self._log = None

    def _load(self, path: Path) -> None:
        from ..checkpoint.tensors import open_tensors, require_safetensors

        require_safetensors()
        if not path.is_file():
            raise CheckpointError(f"statistics={str(path)!r}: no such file")
        specs = {
            f"{name}.{key}": spec
            for name, watch in self._watches.items()
            for key, spec in Statistics.specs(watch.features).items()
        }
        with open_tensors(path, specs) as read:
            for name, watch in self._watches.items():
                tensors = {key: read(f"{name}.{key}") for key in Statistics.specs(watch.features)}
                try:
                    watch.statistics = Statistics.from_tensors(**tensors) if tensors["scalars"].any() else None
                except ValueError as error:
                    raise CheckpointError(f"statistics={str(path)!r}: {name}.{error}") from error


class _Look:
    """The hook of one layer."""

    def __init__(self, monitor: Monitor, watch: Watch) -> None:
        self._monitor, self._watch = monitor, watch

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._monitor.look(self._watch, args[0] if args else next(iter(kwargs.values()), None))


def _layers(model: nn.Module, include: options.Patterns, exclude: options.Patterns) -> dict[str, nn.Module]:
    """The layers to watch, by name."""
    found = sites(model)
    asked = options.Options(
        scheme=None,
        include=None if include is None else options.check_patterns("include", include, found),
        exclude=options.check_patterns("exclude", exclude, found),
        method="",
        m=(),
        goal="",
    )
    linear = [site for site in found if is_linear_like(site.module) and asked.why_not_asked(site.names) is None]
    quantized = [site for site in linear if isinstance(site.module, QuantizedModule)]
    layers = {site.name: site.module for site in quantized or linear}
    if not layers:
        raise ValueError("model: has no Linear layer to watch")
    return layers
