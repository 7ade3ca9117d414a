"""What a Triton plan launches again, with kernels that are compiled to what takes notes. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble import layouts
from nybble.dispatch import native_cuda
from nybble.dispatch.spec import KernelSpec
from nybble.kernels import a16_triton, blocks_triton, quantize_triton, replay, w4a8_triton, w8a8_triton
from nybble.kernels.configs import SHIPPED, Config
from nybble.kernels.table import KERNELS
from nybble.testing.oracle import random_weight, served_by
from nybble.weights.scheme import Scheme

REPLAYED = [
    kernel for kernel in KERNELS if kernel.op == "linear" and not kernel.make.where.startswith("matmul_triton:")
]
N, K = 70, 200


class Compiled:
    """Stands for Triton's CompiledKernel."""

    def __init__(self, name: str, notes: list) -> None:
        self.name, self.notes = name, notes

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.notes.append((self.name, grid, arguments, stream))


class Kernel:
    """Stands for a JIT function: a launch gives what it was compiled to."""

    def __init__(self, kernel, notes: list) -> None:
        self.fn, self.notes, self.launched = kernel.fn, notes, []

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.launched.append((grid, arguments, named))
            return Compiled(self.fn.__name__, self.notes)

        return launch


@pytest.fixture
def notes(monkeypatch) -> list:
    """What replays launch: (kernel, grid, arguments, stream)."""
    found: list = []
    for module in (a16_triton, blocks_triton, quantize_triton, w4a8_triton, w8a8_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(getattr(module, name), found))
    monkeypatch.setattr(replay, "device_of", lambda: -1)
    monkeypatch.setattr(native_cuda, "stream_of", lambda device: 77)
    return found


def packed_of(kernel: KernelSpec, scheme: Scheme) -> Tensor:
    quantized = random_weight(scheme, N, K)
    return layouts.pack(quantized, kernel.layout, scheme, K)


def made(kernel: KernelSpec):
    scheme = served_by(kernel)[-1]
    return kernel.make(scheme, N, K), packed_of(kernel, scheme), scheme


def flat(value: object) -> object:
    return value.data_ptr() if isinstance(value, Tensor) else value


SPLIT = {name: next((one for one in shipped.configs if one.split_k > 1), None) for name, shipped in SHIPPED.items()}


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize(
    ("kernel", "split"),
    [(kernel, split) for kernel in REPLAYED for split in dict.fromkeys((None, SPLIT.get(kernel.name)))],
    ids=lambda value: getattr(value, "name", "split" if value else "whole"),
)
def test_the_second_call_launches_the_same_at_its_own_addresses(
    kernel: KernelSpec, split: Config | None, with_bias: bool, notes: list, monkeypatch
) -> None:
    if split is not None:
        for module in (a16_triton, w8a8_triton):
            monkeypatch.setattr(module, "choose", lambda *problem: split)
    plan, packed, _ = made(kernel)
    bias = torch.randn(N) if with_bias else None
    x, out = torch.randn(3, K).half(), torch.empty(3, N).half()
    with replay.recording() as usual:  # as the first call makes them, with tensors
        plan.launch(x, packed, bias, out)
    plan(x, packed, bias, out)
    assert notes == []
    assert len(usual) == 1 + (split is not None) + kernel.scheme.endswith("a8")

    again = (torch.randn(3, K).half(), packed.clone(), None if bias is None else bias.clone(), torch.empty_like(out))
    with Allocations() as allocated:
        plan(*again)
    (block,) = allocated.notes or [torch.empty(0)]
    assert [name for name, *_ in notes] == [launch.compiled.name for launch in usual]
    spans = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in (*again, block) if one is not None]
    inside = {one.data_ptr(): two for one, two in zip((x, packed, bias, out), again, strict=True) if one is not None}
    scratch: dict[int, int] = {}
    for (_, grid, arguments, stream), launch in zip(notes, usual, strict=True):
        assert (grid, stream, len(arguments)) == (launch.grid, 77, len(launch.arguments))
        for got, expected in zip(arguments, launch.arguments, strict=True):
            if not isinstance(expected, Tensor):
                assert got is expected or got == (expected or 0)
                continue
            assert got % 16 == 0
            assert sum(begin <= got < end for begin, end in spans) == 1
            base = max((at for at in inside if at <= expected.data_ptr()), default=None)
            if base is not None and expected.data_ptr() < base + inside[base].nbytes:
                assert got - inside[base].data_ptr() == expected.data_ptr() - base
            else:  # what one launch writes another reads
                assert scratch.setdefault(expected.data_ptr(), got) == got
                assert got + expected.nbytes <= block.data_ptr() + block.nbytes
    ends = sorted((got, got + size_of(usual, at)) for at, got in scratch.items())
    assert all(before[1] <= after[0] for before, after in pairwise(ends))


def size_of(launches: list[replay.Launch], address: int) -> int:
    return next(
        value.nbytes
        for launch in launches
        for value in launch.arguments
        if isinstance(value, Tensor) and value.data_ptr() == address
    )


class Allocations(TorchDispatchMode):
    """Notes what torch allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.notes.append(out)
        return out


def test_a_launch_is_what_triton_makes_of_compiled_and_grid() -> None:
    ran = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments, stream: ran.append((grid, stream, arguments))

    x, y = torch.empty(4), torch.empty(4)
    launches = [replay.Launch(Compiled(), (2, 3, 1), (x, None, y, 5, True))]
    found = replay.Replay.of(launches, (x, None, None, y))
    assert found is not None
    found.run((160, 0, 0, 320, 0, 0), 7)
    assert ran == [((2, 3, 1), 7, (160, 0, 320, 5, True))]


def w8a8():
    kernel = next(kernel for kernel in REPLAYED if kernel.name == "w8a8_triton")
    plan, packed, _ = made(kernel)
    return plan, packed, torch.randn(4, K, dtype=torch.bfloat16), torch.empty(4, N, dtype=torch.bfloat16)


def test_a_call_is_one_allocation_and_waits_for_nothing(notes: list, monkeypatch) -> None:
    """So that a CUDA graph can capture it; the stream is the current one, the capture's."""
    plan, packed, x, out = w8a8()
    plan(x, packed, None, out)
    monkeypatch.setattr(native_cuda, "stream_of", lambda device: 99)
    with Allocations() as allocated:
        plan(x, packed, None, out)
    assert [one.dtype for one in allocated.notes] == [torch.uint8]
    assert {stream for *_, stream in notes} == {99}


@pytest.mark.parametrize("change", ["rows", "x dtype", "out dtype", "bias", "bias dtype"])
def test_what_another_code_may_serve_is_recorded_anew(change: str, notes: list) -> None:
    plan, packed, x, out = w8a8()
    bias = torch.randn(N)
    plan(x, packed, bias, out)
    if change == "rows":
        x, out = x[:2], out[:2]
    elif change == "x dtype":
        x = x.half()
    elif change == "out dtype":
        out = out.float()
    else:
        bias = None if change == "bias" else bias.half()
    plan(x, packed, bias, out)
    assert notes == []
    plan(x, packed, bias, out)
    assert len(notes) >= 2


@pytest.mark.parametrize("which", ["stride", "x", "out", "bias", "device"])
def test_what_the_code_was_not_compiled_for_takes_the_usual_way(which: str, notes: list, monkeypatch) -> None:
    plan, packed, x, out = w8a8()
    bias = torch.randn(N)
    plan(x, packed, bias, out)
    if which == "stride":
        x = torch.randn(4, K + 8, dtype=x.dtype)[:, :K]
    elif which == "x":
        x = torch.randn(4 * K + 1, dtype=x.dtype)[1:].view(4, K)
    elif which == "out":
        out = torch.empty(4 * N + 1, dtype=x.dtype)[1:].view(4, N)
    elif which == "bias":
        bias = torch.randn(N + 1)[1:]
    else:
        monkeypatch.setattr(replay, "device_of", lambda: 3)
    launched = len(w8a8_triton.w8a8_kernel.launched)
    for _ in range(2):
        plan(x, packed, bias, out)
    assert notes == []
    assert len(w8a8_triton.w8a8_kernel.launched) == launched + 2


def test_tensors_that_share_memory_are_not_recorded(notes: list) -> None:
    """A bias that is a row of x now need not be one at the next call."""
    plan, packed, x, out = w8a8()
    for _ in range(3):
        plan(x, packed, x[0, :N], out)
    assert notes == []


def test_no_rows_launch_nothing(notes: list) -> None:
    plan, packed, x, out = w8a8()
    for _ in range(3):
        plan(x[:0], packed, None, out[:0])
    assert notes == []
    assert w8a8_triton.w8a8_kernel.launched == []


def test_a_packed_weight_amid_a_buffer_is_copied(notes: list) -> None:
    plan, packed, x, out = w8a8()
    plan(x, packed, None, out)
    amid = torch.cat([torch.zeros(8, dtype=torch.uint8), packed])[8:]
    with pytest.warns(RuntimeWarning, match="packed: its address .* so every call copies it"):
        plan(x, amid, None, out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(x, packed, None, out)
    codes = {arguments[1] for name, _, arguments, _ in notes if name == "w8a8_kernel"}
    assert len(codes) == 2
    assert all(at % 16 == 0 and not amid.data_ptr() <= at < amid.data_ptr() + amid.nbytes for at in codes)


def test_the_recorded_calls_are_bounded(notes: list, monkeypatch) -> None:
    monkeypatch.setattr(replay, "_MOST", 3)
    plan, packed, *_ = w8a8()
    for m in range(1, 9):
        plan(torch.randn(m, K), packed, None, torch.empty(m, N))
        assert len(plan._replays) <= 3


def test_a_weight_on_another_device_is_refused() -> None:
    plan, _, x, out = w8a8()

    class Elsewhere:
        device = torch.device("cuda:1")

        def get_device(self) -> int:
            return 1

    with pytest.raises(ValueError, match="packed: on cuda:1, x is on cpu"):
        plan(x, Elsewhere(), None, out)


def test_the_host_bench_prints_every_row(tmp_path) -> None:
    """In a process of its own, as here Triton may be its interpreter; what is compiled there is the real code."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "nybble.bench.gpu_host", "--calls", "1", "--repeats", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from nybble.bench.gpu_host import WANTED, kernel_of

    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [line[:2] for line in lines] == [[wanted.scheme, kernel_of(wanted).name] for wanted in WANTED]
    for line, wanted in zip(lines, WANTED, strict=True):
        launches, allocations = map(int, line[2:4])
        assert launches == (2 if wanted.target == "triton" else 1)
        assert allocations == (2 if wanted.scheme.startswith(("w8a8", "w4a8")) else 1)
        assert line[8] in ("met", "MISSED")
        assert (line[8] == "met") == (float(line[6]) <= float(line[7]))
