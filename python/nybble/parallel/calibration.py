"""Whether the ranks of torch.distributed calibrate together or each for itself: the caller says which, and it is never guessed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch.distributed as dist

from .ranks import Ranks

_ALONE = "alone"
_said: ContextVar[Ranks | str | None] = ContextVar("how nybble's ranks calibrate", default=None)


@contextlib.contextmanager
def calibrate_alone() -> Iterator[None]:
    """Within the context, this process calibrates on its own batches, as if it were the only one.

    For ranks that all have the same batches, and then get the same model; or for one that calibrates for the others.
    """
    token = _said.set(_ALONE)
    try:
        yield
    finally:
        _said.reset(token)


@contextlib.contextmanager
def share_batches(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within the context, ranks calibrate one model together: each gives its own batches, and all get the same layers.

    ``quantize``, ``sparsify`` and ``sensitivity`` then act as if one process had the batches of all ranks, those of rank 0
    first. All ranks must call them, with equal models and arguments but for the data. Each rank runs the model on its
    own batches, and finds the new weights of its share of the layers. With data, ``goal`` must be ``"memory"``.

    Args:
        group: the ranks, with a backend for CPU tensors such as gloo; None: all of torch.distributed.

    Raises:
        ValueError: torch.distributed is not initialized, or the group does not fit.
    """
    token = _said.set(Ranks(group))
    try:
        yield
    finally:
        _said.reset(token)


def sharing(argument: str) -> Ranks | None:
    """The ranks that calibrate together, or None if this process calibrates by itself.

    argument: the name of the argument that has this rank's data. Raises ValueError if there are other ranks and nothing
    says what they do, since each might have other data.
    """
    said = _said.get()
    if isinstance(said, Ranks):
        return said
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count > 1 and said != _ALONE:
        raise ValueError(
            f"{argument}: torch.distributed has {count} ranks, and each would get another model from its own batches; call "
            "within `with nybble.parallel.share_batches():` to calibrate on those of all ranks or, if all have the same "
            "batches or only one calibrates, `with nybble.parallel.calibrate_alone():`"
        )
    return None


def check_alone(argument: str) -> None:
    """Raise ValueError unless this process calibrates by itself, for what ranks cannot do together; see ``sharing``."""
    if sharing(argument) is not None:
        raise ValueError(
            f"{argument}: within share_batches only quantize, sparsify and sensitivity take data; call the others within "
            "calibrate_alone, with the same data on all ranks"
        )
