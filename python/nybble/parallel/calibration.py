"""Whether the ranks of torch.distributed calibrate together or each for itself: the caller says which, and it is never guessed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch.distributed as dist

_alone: ContextVar[bool] = ContextVar("nybble calibrates alone", default=False)


@contextlib.contextmanager
def calibrate_alone() -> Iterator[None]:
    """Within the context, this process calibrates on its own batches, as if it were the only one.

    For ranks that all have the same batches, and then get the same model; or for one that calibrates for the others.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def check_alone(argument: str) -> None:
    """Raise ValueError if there are other ranks and nothing says what they do, since each might have other data.

    argument: the name of the argument that has this rank's data.
    """
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count > 1 and not _alone.get():
        raise ValueError(
            f"{argument}: torch.distributed has {count} ranks, and each would get another model from its own batches; "
            "if all have the same batches, or only one calibrates, call within `with nybble.parallel.calibrate_alone():`"
        )
