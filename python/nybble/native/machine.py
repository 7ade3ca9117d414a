"""The tables of kernels, and what the machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .. import _C
from ..weights.scheme import Scheme
from .weights import weight_shape


def extension() -> Path:
    """The file of the compiled extension."""
    return Path(_C.__file__)


def kernel_table() -> list[dict[str, Any]]:
    """The rows of csrc/kernels.def."""
    return _C.kernel_table()


def cuda_kernel_table() -> list[dict[str, Any]]:
    """The rows of csrc/cuda/kernels.def: name, scheme, target, layout, min_m, max_m (0: any), built."""
    return _C.cuda_kernel_table()


def cpu(tiles: bool = False) -> tuple[str, tuple[str, ...], dict[str, str]]:
    """The CPU's brand, the instruction sets that it and the operating system offer, and those that the latter refuses,
    each with the reason. tiles: whether to ask the system for the tile registers of AMX, which this process then holds;
    else the answer is taken to be yes."""
    brand, features, refused = _C.cpu(tiles)
    return brand, tuple(features), refused


class Caches(NamedTuple):
    """Bytes of the data caches that a core uses; the last may be shared with other cores."""

    l1: int
    l2: int
    l3: int


def caches() -> Caches:
    """The sizes that products are cut for: NYBBLE_CACHE, read once, or what CPU or operating system tell.

    Raises:
        ValueError: NYBBLE_CACHE is not three ascending sizes.
    """
    return Caches(*_C.caches())


def blocks(
    kernel: str,
    scheme: Scheme,
    size: tuple[int, int],
    *,
    layout: str = "",
    rows: int,
    threads: int,
    caches: str,
) -> dict[str, int]:
    """How a linear kernel cuts its product with a weight of size (N, K), see csrc/blocking.h. caches: as NYBBLE_CACHE."""
    return _C.blocks(
        kernel,
        weight_shape(scheme, *size, layout),
        rows=rows,
        threads=threads,
        caches=caches,
    )


def probes() -> list[tuple[str, str, str]]:
    """The rows of csrc/probes.def that were built, slower ones first: name, kind, and why it cannot run here or ""."""
    return _C.probes()


def probe(
    name: str,
    threads: int,
    amount: int,
    *,
    passes: int = 1,
    runs: int = 1,
    huge_pages: bool = False,
) -> tuple[float, int]:
    """Seconds of the fastest of `runs`, and the work of a run: bytes read or operations.

    A run is `passes` times `amount` by each thread: bytes, a multiple of 4096, for a probe that reads; rounds else.

    Raises:
        ValueError: an unknown name, one that cannot run here, or a number below its least value.
        MemoryError: the memory to read cannot be had.
    """
    return _C.probe(
        name,
        threads=threads,
        amount=amount,
        passes=passes,
        runs=runs,
        huge_pages=huge_pages,
    )
