"""Least-squares scale and bias of each output channel, in closed form, against the outputs of the dense layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .shadow import Shadow

Run = Callable[[], Any]


class Sums:
    """Sums over a layer's outputs z and the dense layer's outputs y, for a linear regression per channel."""

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.z, self.y, self.zz, self.zy = (torch.zeros(features, dtype=torch.float64) for _ in range(4))

    def add(self, z: Tensor, y: Tensor) -> None:
        """Add rows (T, N)."""
        z, y = z.double(), y.double()
        self.rows += len(z)
        for total, value in ((self.z, z), (self.y, y), (self.zz, z * z), (self.zy, z * y)):
            total += value.sum(0)

    def line(self, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Slope and offset (N,) of the least-squares fit y = slope * z + offset; without a bias the offset is 0."""
        n = max(self.rows, 1)
        mean_z, mean_y = (self.z / n, self.y / n) if has_bias else (torch.zeros_like(self.z),) * 2
        spread, common = self.zz / n - mean_z.square(), self.zy / n - mean_z * mean_y
        slope = torch.where(spread > 1e-12 * self.zz / n, common / spread, 1.0)
        # A slope far from 1 means that the channel is damaged: leave it to training.
        slope = torch.where(torch.isfinite(slope) & (slope > 0.5) & (slope < 2), slope, 1.0)
        return slope, mean_y - slope * mean_z


def correct(
    shadows: Sequence[Shadow], dense: Sequence[nn.Module], runs: Sequence[Run], dense_runs: Sequence[Run]
) -> None:
    """Set gain and bias of the stand-ins to fit the dense layers, on runs of the blocks that hold them."""
    sums = [Sums(len(shadow.gain)) for shadow in shadows]
    for run, dense_run in zip(runs, dense_runs, strict=True):
        ours, theirs = _outputs(shadows, run), _outputs(dense, dense_run)
        for i, (z, y) in enumerate(zip(ours, theirs, strict=True)):
            if z is not None and y is not None and z.shape == y.shape and bool(torch.isfinite(z).all()):
                sums[i].add(z, y)
    for shadow, found in zip(shadows, sums, strict=True):
        if not found.rows:
            continue
        slope, offset = found.line(shadow.bias is not None)
        with torch.no_grad():
            shadow.gain.copy_((1 + shadow.gain) * slope[:, None].float() - 1)
            if shadow.bias is not None:
                shadow.bias.copy_(shadow.bias * slope.float() + offset.float())


def _outputs(layers: Sequence[nn.Module], run: Run) -> list[Tensor | None]:
    """The output rows (T, N) of each layer in a run, or None for a layer that is not called exactly once."""
    seen: dict[int, list[Tensor]] = {}

    def see(layer: nn.Module, _: Any, output: Tensor) -> None:
        seen.setdefault(id(layer), []).append(output.detach().reshape(-1, output.shape[-1]))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.callback(layer.register_forward_hook(see).remove)
        run()
    return [calls[0] if len(calls := seen.get(id(layer), [])) == 1 else None for layer in layers]
