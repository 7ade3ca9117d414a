"""Host overhead of one GPU layer call, measured without a GPU: launches are stubs that return immediately.

    python -m nybble.bench.gpu_host [--calls N] [--repeats N] [--json]

Uses CPU tensors, which take the same code path. The CUDA extension is replaced by a stub; Triton compiles for an H100
(once, then from its cache) but neither loads nor launches. A GPU adds the driver's launch time and the difference between
torch's allocators. Columns: op, nybble.ops.linear; new, torch's time to allocate outputs and scratch; Python, op minus
new, which has the bound; forward, nybble.nn.Linear.forward; call, calling the module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import median
from time import thread_time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import layouts, nn, ops
from ..demo.table import text_table
from ..dispatch import native_cuda, selection
from ..dispatch.registry import specs
from ..dispatch.spec import KernelSpec, Plan, Problem
from ..kernels import replay
from ..weights.scheme import Scheme
from .arguments import argument, count

# A layer of a language model during decoding: one token.
M, N, K = 1, 4096, 4096
_SHARED = 227 << 10
_HEADERS = (
    "scheme", "kernel", "launches", "torch ops", "op us", "new us", "Python us", "bound us", "", "forward us", "call us"
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A scheme, the target whose kernel is used, and the upper bound of Python's time in microseconds."""

    scheme: str
    target: str
    bound: float


WANTED = (
    Wanted("w4a16g128", "sm80", 4),
    Wanted("w8a16", "sm80", 4),
    Wanted("w4a8g128", "sm80", 8),
    Wanted("w8a8", "sm80", 8),
    Wanted("w8a8", "triton", 8),
    Wanted("w4a8g128", "triton", 8),
)


class _Counts:
    """Counts the launches."""

    launches = 0


class _Extension:
    """A stub of _cuda.Plan for a GPU with clusters, where only 8-bit activations need scratch memory."""

    def __init__(self, *, k_padded: int, kernel: str, **shape: Any) -> None:
        codes = kernel.partition("_")[0].endswith("a8")
        self._row = k_padded + 8 if codes else 0

    def scratch(self, m: int) -> int:
        return m * self._row

    def run(self, *arguments: int) -> None:
        _Counts.launches += 1


class _Utilities:
    """Driver utilities that load no binaries."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class _Driver:
    """A fake Triton driver."""

    utils = _Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        _Counts.launches += 1


@contextmanager
def stubbed() -> Iterator[None]:
    """While active, GPU plans accept CPU tensors, and launches are only counted."""
    stubs = (
        patch.object(driver, "_active", _Driver()),
        patch.object(native_cuda, "_extension", lambda: SimpleNamespace(Plan=_Extension)),
        patch.object(native_cuda, "stream_of", lambda device: 7),
        patch.object(replay, "device_of", lambda: -1),
    )
    with ExitStack() as stack:
        for stub in stubs:
            stack.enter_context(stub)
        yield


def plan_for_of(spec: KernelSpec) -> Callable[..., Plan]:
    """A replacement of selection.plan_for: uses `spec` for M rows, as on a GPU where another kernel serves many rows."""

    @lru_cache(maxsize=4096)
    def plan_for(scheme: str, layout: str, n: int, k: int, dtype: torch.dtype, device: str) -> Plan:
        problem = Problem(Scheme.parse(scheme), m=1, n=n, k=k, dtype=dtype, device="cuda", layout=layout)
        by_rows = selection.ByRows(problem, [0, 65])
        assert spec.make is not None, "linear kernels can run"  # noqa: S101
        by_rows._plans[M * K] = spec.make(problem.scheme, n, k)
        return by_rows

    return plan_for


def kernel_of(wanted: Wanted) -> KernelSpec:
    """The preferred kernel of a target for one row.

    Raises:
        ValueError: there is no such kernel.
    """
    scheme = Scheme.parse(wanted.scheme)
    for spec in reversed(specs()):
        if (spec.scheme, spec.target) == (scheme.family, wanted.target) and spec.takes(M):
            return spec
    raise ValueError(f"scheme={wanted.scheme}, target={wanted.target}: no kernel")


def measure(wanted: Wanted, calls: int, repeats: int) -> dict[str, Any]:
    """Microseconds of ops.linear, of a module's forward and of its call; launches and torch ops per call."""
    spec, scheme = kernel_of(wanted), Scheme.parse(wanted.scheme)
    x, bias = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.bfloat16)
    packed = torch.zeros(layouts.packed_nbytes(spec.layout, scheme, N, K), dtype=torch.uint8)
    layer = nn.Linear(K, N, bias=False, scheme=scheme, device="meta", dtype=torch.bfloat16)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer._hold_packed(packed, spec.layout)
    op = partial(ops.linear, x, packed, layer.bias, wanted.scheme, spec.layout, N, K)
    with stubbed(), patch.object(ops, "plan_for", plan_for_of(spec)), torch.no_grad():
        op()  # binds, and compiles
        before = _Counts.launches
        with _Ops() as made:
            ops._linear(x, packed, layer.bias, wanted.scheme, spec.layout, N, K)
        launches = _Counts.launches - before
        op_us = timed(op, calls, repeats)
        new_us = sum(timed(call, calls, repeats) for call in made.again(x))
        return {
            "scheme": wanted.scheme,
            "kernel": spec.name,
            "launches": launches,
            "torch_ops": made.names,
            "op_us": op_us,
            "new_us": new_us,
            "python_us": op_us - new_us,
            "forward_us": timed(partial(layer.forward, x), calls, repeats),
            "call_us": timed(partial(layer, x), calls, repeats),
            "bound_us": wanted.bound,
        }


class _Ops(TorchDispatchMode):
    """Records the torch ops of a call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.sizes: list[tuple[tuple[int, ...], torch.dtype]] = []  # shape and dtype of each result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.sizes.append((tuple(made.shape), made.dtype))
        return made

    def again(self, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """Functions that allocate each recorded tensor, as the call does."""
        return [
            partial(x.new_empty, *size) if dtype is x.dtype else partial(x.new_empty, size[0], dtype=dtype)
            for size, dtype in self.sizes
        ]


def timed(call: Callable[[], object], calls: int, repeats: int) -> float:
    """Microseconds of this thread's CPU time per call, which is independent of machine load; median over repeats."""
    found = []
    for _ in range(repeats):
        begin = thread_time()
        for _ in range(calls):
            call()
        found.append((thread_time() - begin) / calls * 1e6)
    return median(found)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        (
            row["scheme"],
            row["kernel"],
            str(row["launches"]),
            str(len(row["torch_ops"])),
            f"{row['op_us']:.2f}",
            f"{row['new_us']:.2f}",
            f"{row['python_us']:.2f}",
            f"{row['bound_us']:.0f}",
            "met" if row["python_us"] <= row["bound_us"] else "MISSED",
            f"{row['forward_us']:.2f}",
            f"{row['call_us']:.2f}",
        )
        for row in rows
    ]
    return text_table(_HEADERS, lines, right=(2, 3, 4, 5, 6, 7, 9, 10))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=argument(count), default=2000, help="calls per repeat")
    parser.add_argument("--repeats", type=argument(count), default=9, help="repeats; the median is reported")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, or kernels are interpreted")
    rows = [measure(wanted, options.calls, options.repeats) for wanted in WANTED]
    print("\n".join(map(json.dumps, rows)) if options.json else text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
