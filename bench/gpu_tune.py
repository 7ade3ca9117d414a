"""Times all shipped Triton configurations on the shapes of known models, and writes the table that kernels.configs reads.

    python -m nybble.bench.gpu_tune [--shapes NAMES] [--minutes N] [--out FILE]

Prints the table without --out; the shipped tables are kernels/tuned/<target>.json. For shapes that do not fit into the
time, the configuration remains estimated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from .. import layouts
from ..kernels import a16_triton, w4a8_triton, w8a8_triton
from ..kernels.configs import SHIPPED, Config
from ..kernels.launch import machine
from ..kernels.quantize_triton import quantize
from ..weights.scheme import Scheme
from . import gpu_timing, gpu_weights
from .arguments import amount, argument
from .gpu_timing import Call
from .shapes import parse_shapes
from .weights import WeightKind

ROWS = (16, 32, 64, 128, 256, 1024, 4096)
# The scheme used to tune each kernel.
SCHEMES = {"w8a8_triton": "w8a8", "w8a16_triton": "w8a16", "w4a8_triton": "w4a8g128", "w4a16_triton": "w4a16g128"}
# A later configuration replaces an earlier one if its time is less than this share.
BETTER = 0.97
Row = dict[str, Any]


def best(timed: Sequence[tuple[Config, float]]) -> Config:
    """The fastest configuration; of those within 3 %, the first.

    Raises:
        ValueError: timed is empty.
    """
    if not timed:
        raise ValueError("timed: must not be empty")
    chosen, least = timed[0]
    for config, us in timed[1:]:
        if us < least * BETTER:
            chosen, least = config, us
    return chosen


def calls_of(kernel: str, m: int, n: int, k: int) -> Callable[[Config], list[Call]]:
    """A function from a configuration to calls of a kernel on copies of a weight."""
    scheme = Scheme.parse(SCHEMES[kernel])
    layout = "rows8" if scheme.weight_bits == 8 else "frag4"
    packed, _ = gpu_weights.packed(WeightKind(scheme), layout, n, k, "cuda")
    count = gpu_timing.copies(packed.nbytes)
    weights = [layouts.views(packed.clone(), layout, scheme, n, k) for _ in range(count)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    multiply = _multiply(kernel, x, out, scheme, layouts.padded_in_features(layout, scheme, k))
    return lambda config: [partial(multiply, weight, config) for weight in weights]


def _multiply(
    kernel: str, x: Tensor, out: Tensor, scheme: Scheme, k_padded: int
) -> Callable[[dict[str, Tensor], Config], None]:
    if scheme.act_bits == 16:
        return lambda weight, config: a16_triton.multiply(x, weight, None, out, scheme, config)
    codes = quantize(x, k_padded, scheme.group_size, sums=scheme.weight_bits == 4)
    if kernel == w8a8_triton.NAME:
        return lambda weight, config: w8a8_triton.multiply(codes, weight, None, out, config)
    return lambda weight, config: w4a8_triton.multiply(codes, weight, None, out, scheme, config)


def tune(shapes: Sequence[tuple[int, int]], until: float, clock: Callable[[], float] = monotonic) -> Iterator[Row]:
    """Yields rows of the table until the time is up."""
    gpu = machine(torch.device("cuda"))
    for kernel, shipped in SHIPPED.items():
        for n, k in shapes:
            for m in ROWS:
                if clock() >= until:
                    return
                make = calls_of(kernel, m, n, k)
                timed = [(config, gpu_timing.in_graph(make(config), 5).us) for config in shipped.fitting(gpu)]
                chosen = best(timed)
                yield {"kernel": kernel, "n": n, "k": k, "m": m, "config": asdict(chosen), "us": dict(timed)[chosen]}


def document(rows: Sequence[Row], gpu: str) -> str:
    """The table as JSON text."""
    date = datetime.now(timezone.utc).date().isoformat()
    return json.dumps({"gpu": gpu, "date": date, "rows": list(rows)}, indent=1) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes",
        type=argument(parse_shapes),
        default="llama-8b",
        metavar="NAMES",
        help="names of shape sets, or NxK",
    )
    parser.add_argument("--minutes", type=argument(amount), default=5)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_tune: no CUDA device that torch can use", file=sys.stderr)
        return 1
    rows = list(tune(options.shapes, monotonic() + 60 * options.minutes))
    text = document(rows, torch.cuda.get_device_name())
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
