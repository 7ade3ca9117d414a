"""`nybble.Monitor`: compares the inputs of a model's layers in production with those of its calibration."""

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

from ..checkpoint.files import CheckpointError, file_at_once
from ..model import options
from ..model.batches import call, check_batches
from ..model.eligible import dense_weight, is_linear_like
from ..model.rows import rows_of
from ..model.stages import eval_mode
from ..model.walk import sites
from ..nn.kinds import kind_of
from ..nn.module import QuantizedModule
from ..text import Part, Shown
from .statistics import Statistics
from .watch import LayerDrift, Watch, pick_rows

if TYPE_CHECKING:
    from typing_extensions import Self

_LOGGER = logging.getLogger("nybble")
_MOST_ROWS = 64  # rows of a layer's input that are sampled in one call


@dataclass(frozen=True)
class Drift(Shown):
    """The report of a monitor. ``print(drift)`` shows the layers whose inputs have changed, and what to do."""

    layers: tuple[LayerDrift, ...]
    calls: int
    sampled_calls: int
    is_on: bool

    @property
    def drifting(self) -> tuple[LayerDrift, ...]:
        """The layers with an alarm, the largest PSI first."""
        found = [layer for layer in self.layers if layer.alarms]
        return tuple(sorted(found, key=lambda layer: -layer.reading.psi if layer.reading else 0.0))

    @property
    def suggestion(self) -> str | None:
        """What to do, or None if no layer has an alarm."""
        names = [layer.name for layer in self.drifting]
        if not names:
            return None
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"the inputs of {some} have drifted from calibration: calibrate again on current data"

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        state = "on" if self.is_on else "off"
        lines = [f"monitor {state}: {self.calls} calls, {self.sampled_calls} sampled, {len(self.layers)} layers"]
        for layer in sorted(self.layers, key=lambda one: (not one.alarms, one.state != "warn")):
            if layer.alarms or layer.state == "warn" or layer.bad_calls:
                bad = [f"{layer.bad_calls} calls with NaN or Inf"] if layer.bad_calls else []
                lines.append(
                    f"{layer.state:5}  {layer.name}: {'; '.join([*layer.alarms.values(), *bad]) or 'no alarm yet'}"
                )
        return [*lines, *([self.suggestion] if self.suggestion else [])]

    def to_json(self) -> str:
        """All fields as strict JSON."""
        facts = {key: value for key, value in vars(self).items() if key != "layers"}
        layers = [layer.to_dict() for layer in self.layers]
        return json.dumps(
            {"schema": "nybble.drift/1", **facts, "suggestion": self.suggestion, "layers": layers}, indent=2
        )


class Monitor:
    """Samples the inputs of a model's layers and compares them with those of calibration.

        monitor = nybble.Monitor(model)
        monitor.calibrate(batches)
        with monitor:
            serve(model)
        print(monitor.report())

    The input rows of a layer are counted in windows. An alarm is raised when one of these holds for three windows in a
    row:

    * saturation: more than 0.1 % of the values are above the calibrated range;
    * range: the range is above 1.5 or below 0.5 times the calibrated one;
    * scale: the median channel is above 1.3 or below 0.77 times its calibrated size;
    * psi: the population stability index is above 0.2;
    * channels: a new outlier channel, near the largest ones and at least three times its calibrated size.

    The monitor never changes the model's outputs and keeps no inputs; but in a sampled call torch computes the gates of
    an LSTM or GRU, which rounds their last bits otherwise. The model may be called from several threads. The monitor
    samples only calls of the model itself, not direct calls of its submodules.

    Args:
        model: any module. Its quantized layers are watched, or its Linear layers if none is quantized.
        statistics: a file written by ``save``, in place of ``calibrate``.
        include, exclude: glob patterns on full module names, as in ``quantize``.
        every: one call of the model in ``every`` is sampled, with up to 64 rows of each layer's input.
        window: rows of a layer in one window.
        log: a file to which each window appends one line of JSON.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is no layer to watch.
        CheckpointError: (a ValueError) the statistics file is damaged or belongs to another model.
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
            raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
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
        """Run the model on calibration batches, each a tensor, a tuple or a dict, and record its layers' inputs.

        Warns if a layer sees fewer rows than one window. Raises TypeError or ValueError for wrong batches, and
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
                f"calibration: {len(few)} layers saw fewer rows than one window, among them {few[0]}", stacklevel=2
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics as safetensors. Raises ValueError if there are none, OSError, or ImportError."""
        from ..checkpoint.tensors import require_safetensors
        from ..checkpoint.writing import write_tensors

        require_safetensors()
        if not self._is_calibrated:
            raise ValueError("save: there are no statistics; call calibrate first")
        tensors = {
            f"{name}.{key}": torch.zeros(shape, dtype=dtype) if found is None else found.tensors()[key]
            for name, watch in self._watches.items()
            for found in [watch.statistics]
            for key, (shape, dtype) in Statistics.specs(watch.features).items()
        }
        with file_at_once(Path(path)) as aside:
            write_tensors(tensors, aside)

    def start(self) -> None:
        """Start sampling. Without statistics the monitor warns and stays off."""
        if not self._is_calibrated:
            warnings.warn("nybble.Monitor has no calibration statistics and stays off; call calibrate", stacklevel=2)
        elif not self._hooks:
            self._install()

    def stop(self) -> None:
        """Stop sampling; the counts are kept."""
        with self._lock:
            while self._hooks:
                self._hooks.pop().remove()
            self._end()

    @property
    def is_on(self) -> bool:
        """Whether the monitor is sampling."""
        return bool(self._hooks)

    @property
    def _is_calibrated(self) -> bool:
        return any(watch.statistics is not None for watch in self._watches.values())

    def report(self) -> Drift:
        """The state of all layers since ``calibrate``."""
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
        # Copying a watched model copies its hooks, and so the monitor; it must go on watching the original's layers.
        return self

    def _install(self) -> None:
        # Between samples only the model itself has hooks: hooks on every layer would slow down every call.
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
            self._end()  # removes the hooks of an earlier call of this thread that was interrupted
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

    def look(self, watch: Watch, layer: nn.Module, x: Any) -> None:
        """Count an input of a layer in the sampled call."""
        if self._sampler != threading.get_ident() or not isinstance(x, Tensor) or x.is_meta or x.dim() < 1:
            return
        # Outside inference mode: tensors made inside it cannot be changed in place later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            rows = pick_rows(rows_of(layer, x, self._mask), _MOST_ROWS, self._sampled)
            if watch.add(rows) and watch.statistics is not None:
                self._write(watch.drift())

    def _write(self, drift: LayerDrift) -> None:
        if self._log is None:
            return
        line = json.dumps({"time": round(time.time(), 3), **drift.to_dict()}, allow_nan=False)
        try:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            # Logged, not warned: with warnings as errors, a warning would end the user's call.
            _LOGGER.warning("log=%r: %s; the monitor continues without a log", str(self._log), error.strerror)
            self._log = None

    def _load(self, path: Path) -> None:
        from ..checkpoint.tensors import open_tensors, require_safetensors

        require_safetensors()
        if not path.is_file():
            raise CheckpointError(f"statistics={str(path)!r}: file not found")
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

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._monitor.look(self._watch, layer, args[0] if args else next(iter(kwargs.values()), None))


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
    linear = [
        site
        for site in found
        if is_linear_like(site.module)
        and kind_of(site.module).why_no_rows(site.module) is None
        and asked.why_not_asked(site.names) is None
    ]
    quantized = [site for site in linear if isinstance(site.module, QuantizedModule)]
    layers = {site.name: site.module for site in quantized or linear}
    if not layers:
        raise ValueError("model: no Linear layer to watch is left after include and exclude")
    return layers
