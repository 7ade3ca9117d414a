"""Tile configurations of the Triton kernels, as data, and how one is chosen.

A table measured on a GPU by `python -m nybble.bench.gpu_tune` takes precedence; what it lacks is estimated with a cost
model of a multiprocessor. Only the configurations in SHIPPED are ever compiled: the first call compiles one of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

TUNED_FOLDER = Path(__file__).parent / "tuned"

# Cost model of a multiprocessor: memory latency in clocks, bytes per clock from the L2 cache, clocks to start a program,
# clocks to launch a kernel. Round numbers between an A100's and an H200's.
_LATENCY, _BYTES_A_CLOCK, _START, _LAUNCH = 1000, 64, 1500, 3000
# Multiply-adds per clock on tensor cores by operand bits: (target, False) below 64 rows (mma), True from 64 on (wgmma).
_RATES = {("sm80", False): {8: 2048, 16: 1024}, ("sm80", True): {8: 2048, 16: 1024}}
_RATES |= {("sm90", False): {8: 2500, 16: 1250}, ("sm90", True): {8: 4096, 16: 2048}}


class Gpu(NamedTuple):
    """The properties of a GPU that decide the configuration.

    target: "sm90" for a GPU with wgmma, else "sm80".
    shared: maximum shared memory of a block, in bytes. It differs within a target: 99 KiB on GeForce 30 to 50, 163 KiB on
        an A100, 227 KiB on an H100.
    """

    target: str
    multiprocessors: int
    shared: int


@dataclass(frozen=True)
class Config:
    """bm x bn outputs per program, bk inputs per step, `stages` steps in flight, `split_k` programs along K."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split_k: int = 1

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk} stages={self.stages} warps={self.warps} split_k={self.split_k}"

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.bm) * -(-n // self.bn)

    def blocks(self) -> dict[str, int]:
        """The tile sizes as keyword arguments of a kernel."""
        return {"BM": self.bm, "BN": self.bn, "BK": self.bk}


@dataclass(frozen=True)
class Shipped:
    """A kernel's configurations and operand widths: activations and weights in memory, and both in the multiply.

    large: further configurations for sm90 only, whose wgmma needs no registers for a second copy of the accumulators.
    """

    act_bits: int
    weight_bits: int
    product_bits: int
    configs: tuple[Config, ...]
    large: tuple[Config, ...] = ()

    def on(self, target: str) -> tuple[Config, ...]:
        """The configurations for a target."""
        return (*self.configs, *self.large) if target == "sm90" else self.configs

    def fitting(self, gpu: Gpu) -> tuple[Config, ...]:
        """The target's configurations that fit into the GPU's shared memory."""
        return tuple(config for config in self.on(gpu.target) if self.shared_bytes(config) <= gpu.shared)

    def shared_bytes(self, config: Config) -> int:
        """Upper bound of a block's shared memory: the operands of all stages, plus one converted copy of the weights where
        the multiply takes another type."""
        operands = config.stages * config.bk * (config.bm * self.act_bits + config.bn * self.weight_bits)
        converted = config.bk * config.bn * self.product_bits if self.weight_bits != self.product_bits else 0
        return (operands + converted) // 8


_INT8 = (
    Config(16, 32, 256, 4, 4),
    Config(16, 64, 256, 4, 4),
    Config(16, 64, 128, 4, 4, split_k=4),
    Config(32, 64, 128, 4, 4),
    Config(64, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 4),
    Config(128, 128, 128, 3, 8),
)
# For kernels whose weights are the first operand of tl.dot: bn is a multiple of 64.
_WEIGHTS_FIRST = (
    Config(16, 64, 64, 4, 4),
    Config(16, 64, 64, 4, 4, split_k=4),
    Config(32, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(64, 128, 64, 3, 8),
)
_NO_SPLIT = tuple(config for config in _WEIGHTS_FIRST if config.split_k == 1)
SHIPPED: dict[str, Shipped] = {
    "w8a8_triton": Shipped(8, 8, 8, _INT8, large=(Config(128, 256, 128, 3, 8),)),
    "w8a16_triton": Shipped(16, 8, 16, _WEIGHTS_FIRST),
    "w4a8_triton": Shipped(8, 4, 8, _NO_SPLIT),
    "w4a16_triton": Shipped(16, 4, 16, _WEIGHTS_FIRST),
}


def choose(kernel: str, m: int, n: int, k: int, gpu: Gpu) -> Config:
    """The configuration for y (m, n) with k inputs: from the target's measured table, else estimated."""
    fitting = SHIPPED[kernel].fitting(gpu)
    found = tuned(gpu.target).get((kernel, n, k), {})
    limits = [limit for limit, config in found.items() if m <= limit and config in fitting]
    return found[min(limits)] if limits else estimate(kernel, bucket(m), n, k, gpu)


def bucket(m: int) -> int:
    """m rounded up to a power of two, at least 16, so that nearby numbers of rows share a configuration and its bits."""
    return max(16, 1 << (m - 1).bit_length())


@lru_cache(maxsize=4096)
def estimate(kernel: str, m: int, n: int, k: int, gpu: Gpu) -> Config:
    """The configuration with the lowest modelled time; the first one on a tie."""
    shipped = SHIPPED[kernel]
    return min(shipped.fitting(gpu), key=lambda config: clocks(shipped, config, m, n, k, gpu))


def clocks(shipped: Shipped, config: Config, m: int, n: int, k: int, gpu: Gpu) -> float:
    """Modelled time in clocks: programs run one after another on a multiprocessor; a step takes the longer of its loads
    and its multiplies. Loads are limited by L2 bandwidth, or by the bytes in flight over the latency.
    """
    programs = config.tiles(m, n) * config.split_k
    steps = -(-k // (config.bk * config.split_k))
    loaded = config.bk * (config.bm * shipped.act_bits + config.bn * shipped.weight_bits) / 8
    rate = min(_BYTES_A_CLOCK, config.stages * loaded / _LATENCY)
    multiplies = config.bm * config.bn * config.bk / _RATES[gpu.target, config.bm >= 64][shipped.product_bits]
    total = -(-programs // gpu.multiprocessors) * (_START + steps * max(loaded / rate, multiplies))
    if config.split_k > 1:
        total += _LAUNCH + 8 * config.split_k * m * n / (gpu.multiprocessors * _BYTES_A_CLOCK)
    return total


@lru_cache
def tuned(target: str) -> dict[tuple[str, int, int], dict[int, Config]]:
    """The measured table of a target: (kernel, n, k) -> largest m -> configuration. Empty if there is none.

    Raises:
        ValueError: the table names a configuration that is not in SHIPPED.
    """
    path = TUNED_FOLDER / f"{target}.json"
    return read_tuned(path.read_text(encoding="utf-8"), target, str(path)) if path.is_file() else {}


def read_tuned(text: str, target: str, source: str) -> dict[tuple[str, int, int], dict[int, Config]]:
    """Parses a table written by gpu_tune, {"rows": [{"kernel", "n", "k", "m", "config": {...}}]}; see `tuned`."""
    found: dict[tuple[str, int, int], dict[int, Config]] = {}
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    for row in rows:
        config = Config(**row["config"])
        if row["kernel"] not in SHIPPED or config not in SHIPPED[row["kernel"]].on(target):
            raise ValueError(f"{source}: {row['kernel']} ships no configuration {config} for {target}")
        found.setdefault((row["kernel"], row["n"], row["k"]), {})[row["m"]] = config
    return found
