"""The launches for compute-sanitizer: every CUDA kernel, with the bytes that it reads, and run without torch."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble import layouts
from nybble.bench import gpu_sanitize, gpu_sanitize_plan
from nybble.bench.gpu_sanitize_plan import SCRATCH, WIDE_N, K, N, Recorder, cases, launches
from nybble.dispatch import native_cuda
from nybble.dispatch.registry import specs
from nybble.weights.scheme import Scheme

CUDA = [spec for spec in specs() if spec.target.startswith("sm")]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return launches(CUDA)


def test_every_kernel_is_launched_for_few_and_for_more_tokens(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == {spec.name for spec in CUDA}
    for spec in CUDA:
        cases = {row["case"] for row in rows if row["kernel"] == spec.name}
        assert len(cases) >= 2, spec.name
        assert spec.scheme not in ("w4a16", "w4a8") or any("asym" in case for case in cases)


@pytest.mark.parametrize("spec", [spec for spec in CUDA if spec.target == "sm90"], ids=lambda spec: spec.name)
def test_kernels_for_wgmma_take_wide_tiles_in_turn(spec) -> None:
    """By the rule of their launches, on 132 multiprocessors, for which tiles go in pairs."""
    at_once, tokens = 66, {"w8a8": 256, "w4a8": 128}[spec.scheme]
    (m, *_) = [case.m for case in cases(spec) if case.n == WIDE_N]
    wide, narrow = (-(-m // tokens) * -(-WIDE_N // outputs) for outputs in (256, 128))
    assert 4 * -(-wide // at_once) <= 3 * -(-narrow // at_once)
    assert wide > at_once
    assert torch.float32 in {case.dtype for case in cases(spec)}


def test_what_races_most_comes_first(rows: list[dict]) -> None:
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    for_wgmma = [spec.name for spec in CUDA if spec.target == "sm90"]
    assert set(kernels[: len(for_wgmma)]) == set(for_wgmma)


def test_what_is_noted_is_what_the_kernel_reads(rows: list[dict]) -> None:
    row = next(
        row for row in rows if row["kernel"] == "w4a16_sm80_gemv" and row["case"] == f"w4a16g128 bfloat16 1x{N}x{K}"
    )
    assert row["made"]["kernel"] == "w4a16_sm80_gemv"
    assert (row["made"]["n"], row["made"]["k"]) == (N, K)
    sizes = [len(base64.b64decode(value["bytes"])) for value in row["run"] if isinstance(value, dict) and value]
    assert layouts.packed_nbytes("frag4", Scheme.parse("w4a16g128"), N, K) in sizes
    assert 2 * K in sizes
    assert 2 * N in sizes, "the output, with its size"
    assert {} in row["run"], "the scratch"
    json.dumps(rows)


def test_nothing_is_left_changed() -> None:
    before = native_cuda._extension, native_cuda.stream_of
    with pytest.raises(KeyError), gpu_sanitize_plan.recording():
        raise KeyError
    assert (native_cuda._extension, native_cuda.stream_of) == before


def test_an_address_without_its_bytes_is_refused() -> None:
    address = torch.ones(4).data_ptr()
    for arguments in ((address,), (address, 0), (1, address, address)):
        with pytest.raises(ValueError, match="an address must be followed by its size in bytes"):
            Recorder([], "Plan").run(*arguments)


def test_a_launch_gives_each_argument_memory_of_its_own_and_frees_it() -> None:
    seen = []

    class Plan:
        def __init__(self, **made):
            seen.append(made)

        def scratch(self, m):
            return 3 * m

        def run(self, *arguments):
            seen.append(arguments)

    data = base64.b64encode(b"12345").decode()
    noted = {"class": "Plan", "made": {"kernel": "one", "device": 7}, "scratch": [5]}
    driver = gpu_sanitize.NoDriver()
    gpu_sanitize.launch(SimpleNamespace(Plan=Plan), driver, {**noted, "run": [{"bytes": data}, 9, {}]})
    made, (x, x_bytes, m, scratch, scratch_bytes) = seen
    assert made == {"kernel": "one", "device": 0}
    assert (x_bytes, m, scratch_bytes) == (5, 9, 15)
    assert len({x, scratch, 0}) == 3
    assert not driver._held, "all of it is given back"
    assert SCRATCH > 15


def test_an_error_of_the_driver_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(name):
        assert name == "libcuda.so.1"
        return SimpleNamespace(
            **dict.fromkeys(("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"), lambda *_: 0),
            cuMemAlloc_v2=lambda *_: 2,
            cuCtxSynchronize=lambda: 700,
        )

    monkeypatch.setattr(gpu_sanitize.ctypes, "CDLL", library)
    driver = gpu_sanitize.Driver()
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2: error 2"):
        driver.copy(b"1")
    with pytest.raises(RuntimeError, match="cuCtxSynchronize: error 700"):
        driver.wait()
