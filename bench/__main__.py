"""``python -m nybble.bench``: every kernel of the registry that runs here, checked, then timed against torch.

Weights are hot: one copy, in the caches where it fits. Ratios are of medians of one interleaved run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import torch

from .run import WrongKernelError, bench, usable_cases

_ROW = "{:24} {:>16} {:>6} {:>11} {:>10} {:>8} {:>8} {:>9} {:>9}"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shapes(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(n), int(k)) for n, k in pairs]


def main() -> int:
    """Runs the benchmark; returns the exit code: 0, 1 for a wrong kernel, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m nybble.bench", description="Check and time nybble's kernels.")
    parser.add_argument("--kernel", default="*", help="glob on <kernel>-<scheme>, such as 'w4a8_avx2-*g128'")
    parser.add_argument("--shapes", type=_shapes, default="384x384,1536x384,4096x4096", help="NxK, comma-separated")
    parser.add_argument("--m", type=_numbers, default="1,16,256", help="rows, comma-separated")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if not usable_cases(args.kernel):
        parser.error(f"--kernel {args.kernel!r}: no kernel that runs here matches")
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.json:
        print(_ROW.format("kernel", "scheme", "m", "n x k", "us", "gops", "pack ms", "vs fp32", "vs bf16"))
    try:
        for r in bench(args.kernel, args.shapes, args.m):
            if args.json:
                print(json.dumps(asdict(r)), flush=True)
                continue
            ratios = (f"{r.torch_fp32_us / r.us:.2f}x", f"{r.torch_bf16_us / r.us:.2f}x")
            shape = f"{r.n}x{r.k}"
            print(
                _ROW.format(
                    r.kernel, r.scheme, r.m, shape, f"{r.us:.1f}", f"{r.gops:.0f}", f"{r.pack_ms:.1f}", *ratios
                ),
                flush=True,
            )
    except WrongKernelError as error:
        print(f"nybble.bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
