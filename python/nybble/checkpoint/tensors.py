"""Read tensors from a safetensors file, while its content is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import CheckpointError, digest, open_file
from .index import Index

# The dtypes that a checkpoint may hold, by the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Spec = tuple[tuple[int, ...], torch.dtype]


def require_safetensors() -> None:
    """Raise ImportError with the command that installs safetensors, if it is missing."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError("nybble.save and nybble.load need safetensors: pip install 'nybble[save]'") from error


@contextlib.contextmanager
def while_checking(path: Path, index: Index) -> Iterator[None]:
    """Check that a file has the content that was saved: its kind and size first, then, while the body of the context
    reads it, in another thread, its hash.

    Raises CheckpointError with the names of the damaged tensors, also in place of an exception of the body.
    """
    _check_size(path, index)
    with ThreadPoolExecutor(1) as pool:
        checked: Future[None]
        try:
            checked = pool.submit(_check_hash, path, index)
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            checked = Future()
            _check_hash(path, index)
            checked.set_result(None)
        try:
            yield
        finally:
            checked.result()


def _check_size(path: Path, index: Index) -> None:
    with open_file(path) as (_, size):
        if size != index.nbytes:
            cut = [name for name, entry in index.tensors.items() if entry.end > size]
            raise CheckpointError(f"{path}: {size} bytes instead of {index.nbytes}: truncated tensors: {listed(cut)}")


def _check_hash(path: Path, index: Index) -> None:
    if digest(path, {}).sha256 != index.sha256:
        found = digest(path, {name: (entry.begin, entry.end) for name, entry in index.tensors.items()})
        wrong = [name for name, entry in index.tensors.items() if found.crc32[name] != entry.crc32]
        raise CheckpointError(f"{path}: its sha256 is not the one in the index: damaged tensors: {listed(wrong)}")


@contextlib.contextmanager
def open_tensors(path: Path, specs: Mapping[str, Spec]) -> Iterator[Callable[[str], Tensor]]:
    """Yield a reader of tensors by name, after checking that the file holds exactly ``specs``.

    Raises CheckpointError with the name of the tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    except (OSError, RuntimeError) as error:  # the latter is torch's, which maps the file
        if path.exists():
            raise
        raise CheckpointError(f"{path}: is gone since it was checked") from error
    with opened as file:
        names = set(file.keys())
        if names != specs.keys():
            missing, extra = sorted(specs.keys() - names), sorted(names - specs.keys())
            raise CheckpointError(f"{path}: missing tensors: {listed(missing)}; unknown tensors: {listed(extra)}")
        for name, (shape, dtype) in specs.items():
            part = file.get_slice(name)
            held = tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype())
            if held != (shape, dtype):
                raise CheckpointError(f"{name}: the checkpoint has {held[0]} {held[1]}, the model {shape} {dtype}")
        yield lambda name: _copy(file.get_tensor(name))


def _copy(mapped: Tensor) -> Tensor:
    """A copy of a tensor in the mapped file, which may change or shrink later.

    Made by this thread alone: torch's others would take the core that computes the hash.
    """
    new = torch.empty_like(mapped)
    to, source = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (new, mapped))
    np.copyto(to, source)
    return new


def listed(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
