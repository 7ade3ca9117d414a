"""Which tiles a product is cut into: the configurations that ship, as data, and how one of them is chosen.

A table that `python -m nybble.bench.gpu_tune` wrote on a GPU comes first; what it lacks is estimated by a model of a
multiprocessor. Only what SHIPPED lists is ever compiled: a first call compiles one kernel, and the tests all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

TUNED_FOLDER = Path(__file__).parent / "tuned"

# The model's multiprocessor: clocks from asking for data to having it, bytes a clock that it takes from the second-level
# cache at most, clocks to start a program and to launch a kernel. Round numbers between an A100's and an H200's.
_LATENCY, _BYTES_A_CLOCK, _START, _LAUNCH = 1000, 64, 1500, 3000
# Multiply-adds a clock of operands of 8 and 16 bits, on tensor cores, with few rows (mma) and with 64 or more (wgmma).
_RATES = {("sm80", False): {8: 2048, 16: 1024}, ("sm80", True): {8: 2048, 16: 1024}}
_RATES |= {("sm90", False): {8: 2500, 16: 1250}, ("sm90", True): {8: 4096, 16: 2048}}


class Gpu(NamedTuple):
    """What a configuration is chosen for.

    target: "sm90" where there is wgmma, else "sm80"; shared: bytes of shared memory that a block may have at most, which
    differ among GPUs of a target: 99 KiB on GeForce 30 to 50, 163 on an A100, 227 on an H100.
    """

    target: str
    multiprocessors: int
    shared: int


@dataclass(frozen=True)
class Config:
    """bm x bn outputs a program, bk inputs a step, `stages` steps in flight, `split_k` programs along K."""

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
        """As a kernel takes them."""
        return {"BM": self.bm, "BN": self.bn, "BK": self.bk}


@dataclass(frozen=True)
class Shipped:
    """A kernel's configurations, and the bits of its operands: activations, weights in memory, and in the multiply.

    large: more configurations for sm90 alone, whose wgmma needs no registers for a second copy of the accumulators.
    """

    act_bits: int
    weight_bits: int
    product_bits: int
    configs: tuple[Config, ...]
    large: tuple[Config, ...] = ()

    def on(self, target: str) -> tuple[Config, ...]:
        """What there is for a target."""
        return (*self.configs, *self.large) if target == "sm90" else self.configs

    def fitting(self, gpu: Gpu) -> tuple[Config, ...]:
        """What there is for a GPU: of its target's, those whose blocks have enough shared memory."""
        return tuple(config for config in self.on(gpu.target) if self.shared_bytes(config) <= gpu.shared)

    def shared_bytes(self, config: Config) -> int:
        """Shared memory that a block takes at most: the operands of all stages as they lie in memory, and once more the
        weights where the multiply takes them in another type."""
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
# Of the kernels whose weights are the first operand, with their rows (bn) of 64s.
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
    """The configuration of a kernel for y (m, n) with k inputs: measured if the target's table has it, else estimated."""
    fitting = SHIPPED[kernel].fitting(gpu)
    found = tuned(gpu.target).get((kernel, n, k), {})
    limits = [limit for limit, config in found.items() if m <= limit and config in fitting]
    return found[min(limits)] if limits else estimate(kernel, bucket(m), n, k, gpu)


def bucket(m: int) -> int:
    """The power of two from 16 on that m counts as, so that a few rows give the same bits whatever their number."""
    return max(16, 1 << (m - 1).bit_length())


@lru_cache(maxsize=4096)
def estimate(kernel: str, m: int, n: int, k: int, gpu: Gpu) -> Config:
    """The configuration that the model finds fastest; of equals, the first."""
    shipped = SHIPPED[kernel]
    return min(shipped.fitting(gpu), key=lambda config: clocks(shipped, config, m, n, k, gpu))


def clocks(shipped: Shipped, config: Config, m: int, n: int, k: int, gpu: Gpu) -> float:
    """The model's clocks: programs follow each other on a multiprocessor; a step takes the longer of loads and multiplies.

    Loads come as fast as the cache gives them, or as what is in flight lets them.
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
    """(kernel, n, k) -> largest m -> configuration, as measured for a target; empty where nobody has.

    Raises:
        ValueError: the table names a configuration that does not ship.
    """
    path = TUNED_FOLDER / f"{target}.json"
    return read_tuned(path.read_text(encoding="utf-8"), target, str(path)) if path.is_file() else {}


def read_tuned(text: str, target: str, source: str) -> dict[tuple[str, int, int], dict[int, Config]]:
    """What gpu_tune wrote: {"rows": [{"kernel", "n", "k", "m", "config": {...}}]}, as tuned gives it."""
    found: dict[tuple[str, int, int], dict[int, Config]] = {}
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    for row in rows:
        config = Config(**row["config"])
        if row["kernel"] not in SHIPPED or config not in SHIPPED[row["kernel"]].on(target):
            raise ValueError(f"{source}: {row['kernel']} ships no configuration {config} for {target}")
        found.setdefault((row["kernel"], row["n"], row["k"]), {})[row["m"]] = config
    return found
