"""Python without its global lock: nybble's extensions leave it off, and calls from threads give what one thread gives."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import nn

import nybble
from nybble.dispatch.selection import compiled_plan, plan_for

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
THREADS = 8


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded Python")
@pytest.mark.parametrize("module", ["nybble", "nybble._C"])
def test_importing_leaves_the_lock_off(module: str) -> None:
    code = f"import sys, torch; before = sys._is_gil_enabled(); import {module}; print(before, sys._is_gil_enabled())"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the C++ sources")
def test_every_extension_says_that_it_needs_no_lock() -> None:
    modules = [
        line
        for path in SOURCES.rglob("*.cpp")
        for line in re.findall(r"^PYBIND11_MODULE\(.*", path.read_text(), re.MULTILINE)
    ]
    assert len(modules) == 2
    assert all("py::mod_gil_not_used()" in line for line in modules), modules


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16g32", "sp50w8a8"])
def test_threads_that_pack_one_layer_at_once_give_its_bits(scheme: str) -> None:
    sparse = scheme.startswith("sp")
    layer = (nybble.nn.SparseLinear if sparse else nybble.nn.Linear).from_dense(nn.Linear(96, 80), scheme)
    inputs = [torch.randn(rows, 96) for rows in range(1, THREADS + 1)]
    with torch.no_grad():
        right = [layer(x) for x in inputs]
    layer.unpack()
    for _ in range(10):
        shared, begin = copy.deepcopy(layer), Barrier(THREADS)

        def run(i: int, shared: nn.Module = shared, begin: Barrier = begin) -> bool:
            begin.wait()
            with torch.no_grad():
                return all(torch.equal(shared(inputs[i]), right[i]) for _ in range(5))

        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(run, range(THREADS)))


def test_threads_that_choose_kernels_at_once_choose_the_same() -> None:
    layer = nybble.nn.Linear.from_dense(nn.Linear(64, 48), "w4a8g32")
    begin = Barrier(THREADS)
    plan_for.cache_clear()
    compiled_plan.cache_clear()

    def run(i: int) -> torch.Tensor:
        begin.wait()
        with torch.no_grad():
            return layer(torch.ones(1 + i % 2, 64))[0]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, range(THREADS)))
    assert all(torch.equal(one, found[0]) for one in found)
