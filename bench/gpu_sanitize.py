"""Runs the launches recorded by gpu_sanitize_plan under compute-sanitizer, with the CUDA driver and nybble's extension only.

    compute-sanitizer python -m bench.gpu_sanitize FILE --site DIR [--dry-run]      (from the source tree)

DIR: where nybble is installed. Each argument has its own allocation, so that out-of-bounds accesses are detected. Outputs
are not checked; gpu_smoke does that.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .gpu_wheels_check import load


class Driver:
    """Allocates memory on GPU 0 through the CUDA driver, in the primary context, which the extension's runtime shares."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: error {code}")

    def copy(self, data: bytes) -> int:
        """Copies the data to new device memory; returns its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(len(data)))
        self._call("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        return address.value

    def free(self, address: int) -> None:
        """Frees memory."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def wait(self) -> None:
        """Waits for the GPU. Raises RuntimeError if a launch failed."""
        self._call("cuCtxSynchronize")


class NoDriver(Driver):
    """Replaces Driver in a dry run."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def copy(self, data: bytes) -> int:
        """Copies the data to host memory; returns its address."""
        held = ctypes.create_string_buffer(data, len(data))
        self._held[ctypes.addressof(held)] = held
        return ctypes.addressof(held)

    def free(self, address: int) -> None:
        """Frees memory."""
        del self._held[address]

    def wait(self) -> None:
        """Does nothing."""


class _NoPlan:
    """Replaces a class of the extension in a dry run."""

    def __init__(self, **made: Any) -> None:
        self._kernel = made["kernel"]

    def scratch(self, *arguments: Any) -> int:
        return 64

    def run(self, *arguments: Any) -> None:
        if not all(isinstance(argument, int) for argument in arguments):
            raise TypeError(f"{self._kernel}: arguments {arguments}: must be integers")


def launch(extension: Any, driver: Driver, row: dict[str, Any]) -> None:
    """Runs one launch and waits for it."""
    plan = getattr(extension, row["class"])(**{**row["made"], "device": 0})
    held, arguments = [], []
    for value in row["run"]:
        if not isinstance(value, dict):
            arguments.append(value)
            continue
        data = base64.b64decode(value["bytes"]) if value else bytes(plan.scratch(*row["scratch"]))
        address = driver.copy(data) if data else 0
        held += [address] if data else []
        arguments += [address, len(data)]
    try:
        plan.run(*arguments)
        driver.wait()
    finally:
        for address in held:
            driver.free(address)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--site", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dry-run", action="store_true", help="run without a driver and without the extension")
    options = parser.parse_args(argv)
    rows = json.loads(options.file.read_text(encoding="utf-8"))
    if options.dry_run:
        driver: Driver = NoDriver()
        extension: Any = SimpleNamespace(**{row["class"]: _NoPlan for row in rows})
    else:
        driver, extension = Driver(), load(next(options.site.glob("nybble/_cuda.*.so")))
    for row in rows:
        print(f"{row['kernel']} {row['case']}", flush=True)  # identifies the sanitizer's next message
        launch(extension, driver, row)
    print(f"sanitize: {len(rows)} launches, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
