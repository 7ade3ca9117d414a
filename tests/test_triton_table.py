"""The table of Triton kernels, and how a configuration is chosen: data and pure functions, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import nybble
from nybble.dispatch import targets
from nybble.dispatch.selection import explain, layout_for, select
from nybble.dispatch.spec import Problem
from nybble.kernels import configs
from nybble.kernels.configs import SHIPPED, Config, Gpu, bucket, choose, clocks, estimate, read_tuned
from nybble.kernels.table import KERNELS
from nybble.weights.scheme import Scheme

A100, H100, RTX = Gpu("sm80", 108, 163 << 10), Gpu("sm90", 132, 227 << 10), Gpu("sm80", 170, 99 << 10)
GPUS = {"a100": A100, "h100": H100, "rtx-5090": RTX}
SHAPES = [(n, k) for n in (1, 70, 1024, 4096, 14336) for k in (1, 4096, 14336)]
ROWS = (1, 2, 16, 17, 64, 100, 256, 1024, 4096)


def linear(name: str) -> bool:
    return next(kernel for kernel in KERNELS if kernel.name == name).op == "linear"


def test_names_are_unique_and_say_what_they_compute() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for kernel in KERNELS:
        assert kernel.name.endswith(("_triton", "_triton_matmul"))
        assert (kernel.op == "linear") == bool(kernel.scheme)
        family = kernel.scheme if kernel.sparsity is None else f"{kernel.sparsity}{kernel.scheme.removeprefix('sp')}"
        assert kernel.name.startswith(family or kernel.op)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.op == "linear"], ids=lambda kernel: kernel.name)
def test_every_entry_is_there(kernel) -> None:
    pytest.importorskip("triton")
    module, _, name = kernel.make.where.partition(":")
    __import__(f"nybble.kernels.{module}")
    assert callable(getattr(sys.modules[f"nybble.kernels.{module}"], name))


def test_the_table_imports_no_triton() -> None:
    code = "import sys, nybble; nybble.kernels(); import nybble.kernels.table; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_registry_lists_each_with_its_reason() -> None:
    rows = {row["name"]: row for row in nybble.kernels()}
    for kernel in KERNELS:
        assert rows[kernel.name]["target"] == "triton"
        if not torch.cuda.is_available():
            assert not rows[kernel.name]["usable"]
            assert "no CUDA device" in rows[kernel.name]["why_not"]


def target_of(name: str) -> targets.Target:
    return next(target for target in targets.table() if target.name == name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine one with GPUs of the compute capabilities."""

    def become(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        monkeypatch.setattr(torch.version, "hip", None)

    return become


def test_why_no_gpu_names_what_is_absent(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    triton, sm80 = target_of("triton"), target_of("sm80")
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    gpus()
    assert triton.missing(()) == "no CUDA device that torch can use; triton is not installed"
    assert sm80.missing(()) == "no CUDA device that torch can use"
    gpus((8, 6))
    assert triton.missing(()) == "triton is not installed"
    monkeypatch.setattr(targets, "find_spec", lambda name: object())
    assert triton.missing(()) is None


AT_LEAST = "needs compute capability 8.0 or higher, this GPU has 7.5"
EXACTLY = "needs compute capability 9.0, this GPU has {}"


@pytest.mark.parametrize(
    ("devices", "sm80", "sm90"),
    [
        ([(9, 0)], None, None),
        ([(8, 0)], None, EXACTLY.format("8.0")),
        ([(12, 0)], None, EXACTLY.format("12.0")),
        ([(9, 0), (7, 5)], AT_LEAST, EXACTLY.format("7.5")),
        ([(9, 0), (9, 0)], None, None),
        ([(9, 0), (10, 0)], None, EXACTLY.format("10.0")),
    ],
)
def test_every_gpu_must_have_what_a_target_needs(devices, sm80, sm90, gpus) -> None:
    gpus(*devices)
    assert target_of("sm80").missing(()) == sm80
    assert target_of("triton").missing(()) == sm80
    assert target_of("sm90").missing(()) == sm90


def test_no_kernel_is_for_amd_gpus(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for target in targets.table():
        if target.gpu:
            assert "never run on an AMD" in (target.missing(()) or "")


def test_the_reasons_show_in_the_table_and_in_what_was_detected(gpus) -> None:
    gpus((7, 5))
    targets.detect.cache_clear()
    try:
        assert targets.detect().missing["triton"] == AT_LEAST
        reasons = {row["name"]: row["why_not"] for row in nybble.kernels()}
        assert reasons["w8a8_triton"] == AT_LEAST
    finally:
        targets.detect.cache_clear()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8g32", "w4a16g128asym", "bs32x32w8a8"])
def test_on_a_gpu_each_family_is_packed_for_its_kernel(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = targets.detect()
    usable = (
        "torch",
        "triton",
        *(target.name for target in targets.table() if target.name in here.targets and not target.gpu),
    )
    monkeypatch.setattr(targets, "detect", lambda: dataclasses.replace(here, targets=usable))
    parsed = Scheme.parse(scheme)
    chosen = select(Problem(parsed, m=1, n=64, k=64, device="cuda"))
    assert chosen.name == f"{parsed.family}_triton"
    assert layout_for(parsed, 64, 64, "cuda") == chosen.layout
    assert "runs on cuda, not on cpu" in str(explain(Problem(parsed, m=1, n=64, k=64)))


# --- configurations


@pytest.mark.parametrize("kernel", SHIPPED)
def test_blocks_are_what_the_kernels_take(kernel: str) -> None:
    assert linear(kernel)
    for config in SHIPPED[kernel].on("sm90"):
        for size in config.blocks().values():
            assert size & (size - 1) == 0
        assert config.bm >= 16
        assert config.bk >= 32
        assert config.warps in (4, 8)
        if not kernel.startswith("w8a8"):
            assert config.bn % 64 == 0, "weights come in tiles of 64"
        if "w4" in kernel:
            assert config.bk == 64
    assert len(set(SHIPPED[kernel].on("sm90"))) == len(SHIPPED[kernel].on("sm90"))


def test_w4a8_is_not_split_so_that_its_bits_are_the_cpus() -> None:
    assert all(config.split_k == 1 for config in SHIPPED["w4a8_triton"].on("sm90"))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kernel", SHIPPED)
def test_every_problem_gets_a_configuration_that_ships_and_fits(kernel: str, gpu: Gpu) -> None:
    chosen = {choose(kernel, m, n, k, gpu) for m in ROWS for n, k in SHAPES}
    assert chosen <= set(SHIPPED[kernel].on(gpu.target))
    assert max(SHIPPED[kernel].shared_bytes(config) for config in chosen) <= gpu.shared
    assert len(chosen) > 2, "the model prefers the same whatever the shape"


@pytest.mark.parametrize("kernel", SHIPPED)
def test_a_few_rows_get_the_same_whatever_their_number(kernel: str) -> None:
    for n, k in SHAPES:
        assert len({choose(kernel, m, n, k, H100) for m in range(1, 17)}) == 1


def test_a_gpu_of_hopper_with_less_shared_memory_takes_smaller_blocks() -> None:
    (large,) = SHIPPED["w8a8_triton"].large
    assert SHIPPED["w8a8_triton"].shared_bytes(large) == 147_456
    assert choose("w8a8_triton", 4096, 8192, 8192, H100) == large
    assert choose("w8a8_triton", 4096, 8192, 8192, H100._replace(shared=99 << 10)) != large


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm80"), ((12, 0), "sm80")],
)
def test_only_compute_capability_9_0_takes_the_configurations_of_wgmma(capability, target, monkeypatch) -> None:
    pytest.importorskip("triton")
    from nybble.kernels import launch

    major, minor = capability
    found = SimpleNamespace(major=major, minor=minor, multi_processor_count=7, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    launch.machine.cache_clear()
    try:
        assert launch.machine(torch.device("cuda", 5)) == Gpu(target, 7, 101376)
    finally:
        launch.machine.cache_clear()


def test_buckets_are_powers_of_two_from_16_on() -> None:
    assert [bucket(m) for m in (1, 16, 17, 32, 33, 1000, 1024)] == [16, 16, 32, 32, 64, 1024, 1024]


def test_the_model_splits_k_only_where_tiles_are_few() -> None:
    assert estimate("w8a8_triton", 16, 1024, 14336, H100).split_k > 1
    assert estimate("w8a8_triton", 16, 28672, 8192, H100).split_k == 1
    assert estimate("w8a8_triton", 4096, 4096, 4096, H100).bm >= 128


def test_the_model_grows_with_the_work() -> None:
    shipped = SHIPPED["w8a8_triton"]
    for config in shipped.configs:
        small, large = (clocks(shipped, config, m, 4096, 4096, H100) for m in (16, 4096))
        assert 0 < small < large


# --- the table of what was measured


def written(**changed: object) -> str:
    config = {"bm": 16, "bn": 32, "bk": 256, "stages": 4, "warps": 4, "split_k": 1}
    row = {"kernel": "w8a8_triton", "n": 4096, "k": 4096, "m": 16, "config": config}
    return json.dumps({"rows": [row, {**row, "m": 64, **changed}]})


def test_what_was_measured_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"bm": 32, "bn": 64, "bk": 128, "stages": 4, "warps": 4}
    table = read_tuned(written(config=other), "sm90", "a test")
    monkeypatch.setattr(configs, "tuned", lambda target: table)
    assert choose("w8a8_triton", 3, 4096, 4096, H100) == Config(16, 32, 256, 4, 4)
    assert choose("w8a8_triton", 17, 4096, 4096, H100) == Config(32, 64, 128, 4, 4)
    small = H100._replace(shared=40 << 10)  # where the second does not fit
    assert SHIPPED["w8a8_triton"].shared_bytes(Config(16, 32, 256, 4, 4)) == 49_152
    assert choose("w8a8_triton", 3, 4096, 4096, small) == estimate("w8a8_triton", 16, 4096, 4096, small)
    for m, n in ((65, 4096), (3, 4000)):
        assert choose("w8a8_triton", m, n, 4096, H100) == estimate("w8a8_triton", bucket(m), n, 4096, H100)


@pytest.mark.parametrize(
    "changed",
    [{"config": {"bm": 16, "bn": 16, "bk": 16, "stages": 1, "warps": 1}}, {"kernel": "w8a8_other"}],
    ids=["config", "kernel"],
)
def test_a_table_of_what_does_not_ship_is_refused(changed: dict) -> None:
    with pytest.raises(ValueError, match=r"here\.json.*ships no configuration"):
        read_tuned(written(**changed), "sm90", "here.json")


def test_a_configuration_of_hopper_alone_is_refused_for_others() -> None:
    large = SHIPPED["w8a8_triton"].large[0]
    text = written(
        config={"bm": large.bm, "bn": large.bn, "bk": large.bk, "stages": large.stages, "warps": large.warps}
    )
    assert read_tuned(text, "sm90", "a test")
    with pytest.raises(ValueError, match="sm80"):
        read_tuned(text, "sm80", "a test")


def test_shipped_tables_can_be_read() -> None:
    for path in sorted(configs.TUNED_FOLDER.glob("*.json")):
        assert read_tuned(path.read_text(encoding="utf-8"), path.stem, str(path))


def test_no_table_is_no_error() -> None:
    assert configs.tuned("sm70") == {}
    assert torch.int32 in next(kernel for kernel in KERNELS if kernel.name == "w8a8_triton").out_dtypes
