"""GPU measurements: peak rates (ceilings), nybble's kernels and other libraries; outputs are checked before timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..dispatch.selection import layout_for, plan_for, select
from ..dispatch.spec import Problem
from ..weights.rounding import dequantize_weight
from . import gpu_first, gpu_operations, gpu_timing, gpu_weights
from .gpu_goals import FIRST, HOST, OF_COPY, PEERS_OF, Goal, Limit
from .gpu_peers import PEERS, GpuPeer
from .gpu_timing import Sample
from .weights import WeightKind

Row = dict[str, Any]
# Largest accepted relative Frobenius error against the same weights multiplied in float32. Rounding activations to 8 bits
# gives less.
SANE = 2e-2
# The same for a peer against the unquantized weights, by bits of the weight; 9 bits: 2:4 sparse bfloat16.
SANE_PEER = {16: 0.01, 9: 1.0, 8: 0.05, 4: 0.2}
DEVICE = "cuda"  # "cpu" in dry runs (gpu_dry)


def ceilings(size: int = 8192, nbytes: int = 1 << 30) -> Row:
    """Peak rates of this GPU: GB/s of a copy (read plus write) and of a read-only sum, TOP/s of dense products."""
    source = torch.randn(nbytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    c, d = (torch.randint(-127, 128, (size, size), device=DEVICE, dtype=torch.int8) for _ in range(2))
    products = 2 * size**3
    return {
        "copy_gbps": 2 * nbytes / _us(lambda: target.copy_(source)) / 1e3,
        "read_gbps": nbytes / _us(source.sum) / 1e3,
        "bf16_tops": products / _us(lambda: a @ b.t()) / 1e6,
        "int8_tops": products / _us(lambda: torch._int_mm(c, d.t())) / 1e6,
    }


def _us(call: Callable[[], object]) -> float:
    return gpu_timing.in_graph([call]).us


def product(kind: WeightKind, m: int, n: int, k: int) -> Row:
    """Times nybble's product of m rows in bfloat16: the kernel twice (A/A), host time per call, eager time per call,
    first call.

    Raises:
        RuntimeError: the output is wrong, or there is no kernel for it.
    """
    scheme, dtype = kind.scheme, torch.bfloat16
    layout = layout_for(scheme, n, k, DEVICE)
    chosen = select(Problem(scheme, m=m, n=n, k=k, dtype=dtype, device=DEVICE, layout=layout))
    if chosen.target == "torch":
        raise RuntimeError(f"no GPU kernel: dispatch selects {chosen.name} for {scheme} at m={m}")
    packed, quantized = gpu_weights.packed(kind, layout, n, k, DEVICE)
    x = torch.randn(m, k, device=DEVICE, dtype=dtype)
    out = torch.full((m, n), torch.nan, device=DEVICE, dtype=dtype)
    plan = plan_for(str(scheme), layout, n, k, dtype, DEVICE)
    once = gpu_timing.first(lambda: plan(x, packed, None, out))
    expected = x.float() @ dequantize_weight(quantized, scheme, k).t()
    _check(out, expected, SANE)
    # The timed calls may replay recorded launches with other addresses, so check a second call too.
    plan(x.clone(), packed.clone(), None, out.fill_(torch.nan))
    _check(out, expected, SANE)
    weights = [packed, *(packed.clone() for _ in range(gpu_timing.copies(packed.nbytes) - 1))]
    calls = [partial(plan, x, weight, None, out) for weight in weights]
    sample, again = gpu_timing.in_graph(calls), gpu_timing.in_graph(calls)
    call = partial(ops.linear, x, packed, None, str(scheme), layout, n, k)
    moved = packed.nbytes + x.nbytes + out.nbytes
    return {
        **asdict(sample),
        "again_us": again.us,
        "host_us": gpu_timing.host(call),
        "eager_us": gpu_timing.eager(call),
        "first_us": once,
        "gbps": moved / sample.us / 1e3,
        "tops": 2 * m * n * k / sample.us / 1e6,
        "runs": chosen.name,
    }


def peer(one: GpuPeer, m: int, n: int, k: int) -> Row:
    """Times a peer's product of m rows; {"reason"} if it fails."""
    reason = one.why_not()
    if reason is None:
        try:
            return {**asdict(_peer(one, m, n, k)), "peer": one.name}
        except Exception as error:  # noqa: BLE001 (libraries raise any exception; it is reported as the result)
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return {"peer": one.name, "reason": reason}


def _peer(one: GpuPeer, m: int, n: int, k: int) -> Sample:
    weight = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    count = gpu_timing.copies(n * k * one.weight_bits // 8)
    layers = [one.make(weight) for _ in range(count)]
    _check(layers[0](x), x.float() @ weight.float().t(), SANE_PEER[one.weight_bits])
    return gpu_timing.in_graph([partial(layer, x) for layer in layers])


def _check(got: Tensor, expected: Tensor, bound: float) -> None:
    error = float((got.float() - expected).norm() / expected.norm())
    if not error <= bound:  # NaN compares false
        raise RuntimeError(f"relative error {error:.3g} is above {bound}; not timed")


def goal(wanted: Goal, done: Iterable[Row]) -> Row:
    """Measures a goal; reuses times of the baseline at the same shape from `done`. {"reason"} if it failed; "ran" is False
    if it was not tried because an earlier result is missing."""
    kind = WeightKind.parse(wanted.scheme)
    shape = {"m": wanted.m, "n": wanted.n, "k": wanted.k}
    done = list(done)
    known = [row for row in done if row.get("over") == wanted.over and shape.items() <= row.items() and "us" in row]
    if wanted.over in PEERS_OF:
        against = fastest(wanted.over, shape, done)
    elif known:
        against = {"over_us": known[0]["over_us"]}
    else:
        timed = peer(next(one for one in PEERS if one.name == wanted.over), **shape)
        against = {"over_us": timed["us"]} if "us" in timed else timed
    row = {"step": "goals", "key": wanted.key, "over": wanted.over, **shape}
    if "reason" in against:
        return {**row, **against, "reason": f"{wanted.over}: {against['reason']}"}
    measured = _or_reason(lambda: {**product(kind, **shape), **against})
    return {**row, **measured, **roofline(kind, measured, done)}


def fastest(over: str, shape: Row, done: Iterable[Row]) -> Row:
    """Time and name of the fastest peer of a baseline of PEERS_OF in `done`, at a shape; {"reason"} if none ran."""
    rows = [row for row in done if row["step"] == "peers" and row["peer"] in PEERS_OF[over]]
    rows = [row for row in rows if shape.items() <= row.items()]
    timed = [row for row in rows if "us" in row]
    if not timed:
        reasons = dict.fromkeys(f"{row['peer']}: {row['reason']}" for row in rows)
        return {"reason": "; ".join(reasons)} if rows else {"reason": "none was timed", "ran": False}
    best = min(timed, key=lambda row: float(row["us"]))
    return {"over_us": best["us"], "fastest": best["peer"]}


def roofline(kind: WeightKind, measured: Row, done: Iterable[Row]) -> Row:
    """{"roofline": share of each ceiling of the run}; {} if the product or the ceilings were not measured."""
    ceilings = [row for row in done if row["step"] == "ceilings"]
    if "us" not in measured or not ceilings:
        return {}
    products = "int8" if kind.scheme.act_bits == 8 else "bf16"
    shares = {
        "read": measured["gbps"] / ceilings[-1]["read_gbps"],
        products: measured["tops"] / ceilings[-1][f"{products}_tops"],
    }
    return {"roofline": shares}


def limit(wanted: Limit, done: Iterable[Row]) -> Row:
    """Measures a limit; adds the copy rate of this run. {"reason"} and "ran" as in `goal`."""
    shape = {"m": wanted.m, "n": wanted.n, "k": wanted.k}
    row = {"step": "goals", "key": wanted.key, **shape}
    copies = [found["copy_gbps"] for found in done if found["step"] == "ceilings"]
    if wanted.figure == OF_COPY and not copies:
        return {**row, "reason": "no ceilings in this file", "ran": False}
    if wanted.figure == FIRST:
        return {**row, **_or_reason(lambda: {"first_s": gpu_first.measure(wanted.what, **shape)})}
    if wanted.figure == HOST:
        return {**row, **_or_reason(lambda: product(WeightKind.parse(wanted.what), **shape))}
    measured = _or_reason(lambda: gpu_operations.operation(wanted.what, **shape, device=DEVICE))
    return {**row, **measured, **({"copy_gbps": copies[-1]} if copies else {})}


def lasting_error() -> str | None:
    """A CUDA error that makes the GPU unusable for this process; None if there is none."""
    if DEVICE != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _or_reason(measure: Callable[[], Row]) -> Row:
    try:
        return measure()
    except (RuntimeError, ValueError) as error:
        return {"reason": (str(error) or type(error).__name__).splitlines()[0]}
