"""nybble's own checkpoint format: one safetensors file, and a JSON index that describes it."""

from __future__ import annotations

import contextlib
import os.path
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

# The other modules of this package are imported where they are used, to keep `import nybble` fast.
from .abandoned import held
from .files import INDEX, CheckpointError, Digest, digest, read_index, replace_checkpoint

if TYPE_CHECKING:
    from .index import Index
    from .restore import Restore

# Bytes of a model from which huge pages are worth the time that the system takes for them: less lies in caches.
_LEAST_SETTLED = 32 << 20
_ATTEMPTS = 16  # to read a checkpoint that others replace meanwhile, where there are no locks

T = TypeVar("T")
_Identity = tuple[int, ...]


def detect(directory: Path) -> bool:
    """Whether the index is there, in whatever state."""
    return os.path.lexists(directory / INDEX)


def save(model: nn.Module, directory: Path) -> None:
    """Write a model. See ``nybble.save``.

    The former checkpoint in the directory is replaced in a single step: after an exception, a full disk or a kill, the
    old or the new one is complete. A save waits for another one into the same directory, and for a load that one disturbed.

    Raises:
        ValueError: the model holds something that safetensors cannot store, or that ``load`` would refuse. Nothing is written.
        RuntimeError: this thread is saving into the directory already.
        OSError: the files could not be written.
        ImportError: safetensors is not installed.
    """
    from .. import __version__
    from ..fusion.block import fused_modules
    from .index import Index, TensorEntry, parse_index
    from .model import aliases_of, check_values, index_limit, layer_entries, pieces_of, state_of
    from .tensors import require_safetensors
    from .writing import write_pieces

    require_safetensors()
    layers = layer_entries(model)
    fused = {name: fused.int8 for name, fused in fused_modules(model).items() if fused.first is not None}
    in_int8 = tuple(name for name, int8 in fused.items() if int8)
    state = state_of(model, layers)
    check_values(layers, state)
    aliases = aliases_of(state, layers)
    pieces = pieces_of(model, layers, {name: tensor for name, tensor in state.items() if name not in aliases})
    spans: dict[str, tuple[int, int]] = {}

    def write_weights(path: Path) -> Digest:
        spans.update(write_pieces(pieces, path))
        return digest(path, spans)

    def make_index(content: Digest) -> bytes:
        tensors = {name: TensorEntry(*span, content.crc32[name]) for name, span in spans.items()}
        file = (content.file_name, content.nbytes, content.sha256)
        text = Index(__version__, *file, layers, tensors, aliases, tuple(fused), in_int8).to_json()
        if len(text) > index_limit(model):
            raise ValueError(f"{INDEX}: would have {len(text)} bytes, at most {index_limit(model)} are read again")
        parse_index(text)  # raises for what ``load`` would refuse, such as very long names
        return text

    replace_checkpoint(directory, write_weights, make_index)


def load(model: nn.Module, directory: Path) -> None:
    """Fill a model from what ``save`` wrote. See ``nybble.load``. If another process saves meanwhile, it is what that one wrote.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit the model.
        ImportError: safetensors is not installed.
    """
    from ..fusion.block import fuse_again
    from .tensors import require_safetensors

    require_safetensors()
    index = while_replaced(directory, lambda: _load(model, directory))
    fuse_again(model, index.fused, index.fused_int8)


def _load(model: nn.Module, directory: Path) -> Index:
    from ..nn.packing import settle_all
    from .tensors import open_tensors, while_checking

    # Tensors made in the caller's inference mode could never be used by autograd.
    with torch.inference_mode(False), restoring(model, directory) as (restore, path):
        index = restore.index
        with while_checking(path, index), open_tensors(path, restore.stored_specs()) as read:
            restore.read_values(read)
            restore.fill(read)
        if sum(layer.nbytes for layer in restore.new.values()) >= _LEAST_SETTLED:
            settle_all(restore.new.values())  # when the hash no longer needs a core
        restore.apply()
    return index


def while_replaced(directory: Path, read: Callable[[], T]) -> T:
    """What ``read`` makes of the checkpoint in a directory; called again where it was refused and the index is another one by then.

    A save removes the old weights once the new index is there, so what reads the old index may not find them any more.
    From the second call on saves wait, or one after the other could come between the index and its weights.

    Raises:
        CheckpointError: as ``read``, of a checkpoint that stays, or, where the file system has no locks, of one that was
            replaced each of 16 times.
    """
    with contextlib.ExitStack() as lock:
        for attempt in range(_ATTEMPTS - 1):
            with _identified(directory) as before:
                try:
                    return read()
                except (
                    CheckpointError,
                    RuntimeError,
                ):  # the latter: torch found no file where there may be one again by now
                    if _identity(directory / INDEX) == before:
                        raise
            if attempt == 0:
                with contextlib.suppress(OSError):  # it cannot be listed, or is gone: as without locks
                    lock.enter_context(held(directory, shared=True))
        return read()


@contextlib.contextmanager
def _identified(directory: Path) -> Iterator[_Identity | None]:
    """Yield what tells the index from all that replace it in the context: it stays open, so none of them gets its inode."""
    try:
        descriptor = os.open(directory / INDEX, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield _identity(directory / INDEX)
        return
    try:
        yield _identity(descriptor)
    finally:
        os.close(descriptor)


def _identity(file: Path | int) -> _Identity | None:
    """Of a path, or of an open file; None: there is none."""
    try:
        status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def restoring(model: nn.Module, directory: Path) -> Iterator[tuple[Restore, Path]]:
    """Yield a checkpoint on its way into a model, and the path of its weights, after checking that the index fits the model.

    In the context, the modules with several weights are open of which the checkpoint has quantized members.

    Raises:
        CheckpointError: the index is missing or damaged, or does not fit the model.
    """
    from ..model.opened import opened
    from .index import parse_index
    from .model import index_limit
    from .restore import Restore

    index = parse_index(read_index(directory, index_limit(model)))

    def has_layers(names: tuple[str, ...]) -> bool:
        return any(entry.name.startswith(f"{name}.") for entry in index.layers for name in names)

    with opened(model, only=has_layers), torch.no_grad():
        yield Restore(model, index), directory / index.file
