"""One process of gpu_smoke: checks one kernel against float64, or reports the occupancy of the CUDA kernels, or runs a few
timings. Prints JSON lines; each case is printed before it runs, so that a crash can be attributed.

    python -m nybble.bench.gpu_smoke_check KERNEL|instances|times [--small] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import native_cuda
from ..dispatch.registry import all_specs
from ..dispatch.spec import KernelSpec
from ..testing.oracle import expected_output, served_by
from ..weights.scheme import Scheme
from . import gpu_dry, gpu_measure, gpu_operations, gpu_weights
from .gpu_goals import BF16
from .gpu_peers import PEERS, GpuPeer
from .weights import WeightKind

Row = dict[str, Any]
INSTANCES, TIMES = "instances", "times"
# Outputs and inputs; the last are from a model. MANY: rows for kernels without an upper limit.
SHAPES = ((72, 1096), (257, 2100), (8192, 8192))
MANY, MORE = 300, 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL_SHAPES, SMALL_MANY = ((40, 136), (65, 264), (128, 256)), 20
# Guard elements before and after an output, which no kernel may write.
_GUARD = 64
# Scheme, and numbers of rows, outputs and inputs.
TIMED = (
    ("w4a16g128", (1, 4096, 4096)),
    ("w4a16g128", (1, 8192, 8192)),
    ("w4a16g128", (16, 8192, 8192)),
    ("w4a8g128", (16, 8192, 8192)),
    ("w8a8", (1, 8192, 8192)),
    ("w8a8", (4096, 8192, 8192)),
)
# Operations to check for the kernels of other ops than linear.
OPERATIONS = {
    "quantize": ("quantize", "rms_norm_quantize", "silu_mul_quantize"),
    "dequantize": ("dequantize w8a16", "dequantize w4a16g128", "dequantize w4a16g32asym", "dequantize sp24w4a16g128"),
}


@dataclass(frozen=True)
class Case:
    """One product."""

    scheme: Scheme
    dtype: torch.dtype
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.scheme} {str(self.dtype).removeprefix('torch.')} {self.m}x{self.n}x{self.k}"


def schemes(spec: KernelSpec) -> list[Scheme]:
    """Schemes to check a kernel with: the symmetric one with the largest groups, the asymmetric one with the smallest; for
    kernels other than Triton's, also all others."""
    served = sorted(served_by(spec), key=lambda scheme: scheme.group_size or 0)
    chosen = [[scheme for scheme in served if scheme.symmetric][-1:], [s for s in served if not s.symmetric][:1]]
    if spec.target != "triton":  # no compilation, so all others are cheap
        chosen.append(served)
    return list(dict.fromkeys(scheme for some in chosen for scheme in some))


def cases(spec: KernelSpec, small: bool, dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Three shapes that the kernel supports, in each dtype; the large one only with two schemes."""
    shapes, many = (SMALL_SHAPES, SMALL_MANY) if small else (SHAPES, MANY)
    least, most = spec.m_range
    rows = (least, min(least + MORE, most or least + MORE), most or max(many, least))
    found = []
    for (n, k), m in zip(shapes, rows, strict=True):
        some = schemes(spec)[:2] if (n, k) == shapes[-1] else schemes(spec)
        found += [Case(scheme, dtype, m, n, k) for scheme in some for dtype in dtypes if dtype in spec.act_dtypes]
    return found


def check(spec: KernelSpec, case: Case, device: str) -> Row:
    """{"ok": largest error as a share of its bound}, or what is wrong with the outputs, see `compare`."""
    kind = WeightKind(case.scheme)
    packed, quantized = gpu_weights.packed(kind, spec.layout, case.n, case.k, device)
    generator = torch.Generator(device).manual_seed(case.m)
    x = torch.randn(case.m, case.k, generator=generator, device=device).to(case.dtype)
    bias = torch.randn(case.n, generator=generator, device=device).to(case.dtype)
    held = torch.full((case.m * case.n + 2 * _GUARD,), torch.nan, dtype=case.dtype, device=device)
    got = held[_GUARD:-_GUARD].view(case.m, case.n)
    make = spec.make
    assert make is not None, "linear kernels have it"  # noqa: S101
    if device == "cpu" and spec.target != "triton":
        make = partial(gpu_dry.FromReference, spec.layout, rounds=spec.rounds)
    plan = make(case.scheme, case.n, case.k)
    right, bound = expected_output(spec, case.scheme, x, quantized, bias)
    plan(x, packed, bias, got)
    first = _written(held, got, right, bound)
    if "wrong" in first:
        return first
    # A later call may replay the launches recorded by the first, with other addresses.
    held.fill_(torch.nan)
    plan(x.clone(), packed.clone(), bias.clone(), got)
    again = _written(held, got, right, bound)
    return {**again, "call": "the second"} if "wrong" in again else {"ok": max(first["ok"], again["ok"])}


def _written(held: Tensor, got: Tensor, right: Tensor, bound: Tensor) -> Row:
    """The result of `compare`, or an error if memory before or after the output was written."""
    if not torch.cat((held[:_GUARD], held[-_GUARD:])).isnan().all():
        return {"wrong": "writes outside its output"}
    return compare(got, right, bound)


def compare(got: Tensor, right: Tensor, bound: Tensor) -> Row:
    """{"ok": largest error as a share of its bound}, or details of the outputs outside their bound: how many, the first
    one, and the distribution of their rows and outputs."""
    error = (got.double() - right).abs()
    bad = ~(error <= bound)  # NaN compares false
    if not bool(bad.any()):
        return {"ok": round(float((error / bound).max()), 3)}
    at = bad.nonzero()
    m, n = at[0].tolist()
    return {
        "wrong": f"{len(at)} of {bad.numel()} outputs, {int(got.isnan().sum())} of them NaN",
        "first": f"y[{m}, {n}] = {float(got[m, n]):g}, not {float(right[m, n]):g} +- {float(bound[m, n]):.2g}",
        **{f"{name} mod {size}": _counts(at[:, axis] % size) for name, axis, size in _MODULI},
    }


_MODULI = (("m", 0, 8), ("n", 1, 64), ("n", 1, 256))


def _counts(values: Tensor, most: int = 8) -> str:
    """The most frequent values with their counts, and the number of other values."""
    distinct, counts = values.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    shown = ", ".join(f"{int(distinct[i])}: {int(counts[i])}" for i in order[:most])
    return shown + (f" and {len(order) - most} more" if len(order) > most else "")


def kernel_rows(spec: KernelSpec, small: bool, device: str) -> Iterator[Row]:
    """For each case, a line before it runs, and one with its result."""
    if spec.op in OPERATIONS:
        m, n, k = (4, 128, 256) if small else (300, 4096, 4096)
        for what in OPERATIONS[spec.op]:
            yield {"case": f"{what} {m}x{n}x{k}"}
            yield _guarded(partial(_operation, what, m, n, k, device))
        return
    interpreted = device == "cpu" and spec.target == "triton"
    for case in cases(spec, small, gpu_dry.INTERPRETED if interpreted else DTYPES):
        yield {"case": str(case)}
        yield _guarded(partial(check, spec, case, device))


def _operation(what: str, m: int, n: int, k: int, device: str) -> Row:
    gpu_operations.calls(what, m, n, k, device)[0][-1]()
    return {"ok": 0.0}


def _guarded(run: Callable[[], Row]) -> Row:
    """Turns errors into results. After a CUDA error, all further cases fail as well."""
    try:
        return run()
    except (RuntimeError, ValueError, AssertionError) as error:
        return {"wrong": f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"}


def instance_rows(device: str) -> Iterator[Row]:
    """Resources and occupancy of each instance of the CUDA kernels, from the driver."""
    yield {"case": INSTANCES}
    yield from gpu_dry.INSTANCES if device == "cpu" else native_cuda.instances(torch.cuda.current_device())


def time_rows(device: str) -> Iterator[Row]:
    """Microseconds of some products, in a CUDA graph with cold weights, and of torch's bfloat16 product."""
    dense = next(one for one in PEERS if one.name == BF16)
    for scheme, (m, n, k) in TIMED:
        yield {"case": f"{scheme} {m}x{n}x{k}"}
        shape = gpu_dry.smaller(m, n, k) if device == "cpu" else (m, n, k)
        yield _guarded(partial(_times, WeightKind.parse(scheme), shape, dense))


def _times(kind: WeightKind, shape: tuple[int, int, int], dense: GpuPeer) -> Row:
    row = gpu_measure.product(kind, *shape)
    times = {name: row[name] for name in ("us", "gbps", "tops", "runs")}
    return {**times, "dense_us": gpu_measure.peer(dense, *shape).get("us")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_smoke_check")
    parser.add_argument("what", help=f"name of a kernel, {INSTANCES} or {TIMES}")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU")
    options = parser.parse_args(argv)
    device = "cpu" if options.dry_run else "cuda"
    with gpu_dry.stand_in() if options.dry_run else nullcontext():
        if options.what == INSTANCES:
            rows = instance_rows(device)
        elif options.what == TIMES:
            rows = time_rows(device)
        else:
            spec = next(spec for spec in all_specs() if spec.name == options.what)
            rows = kernel_rows(spec, options.small, device)
        for row in rows:
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
