"""The interface of a contestant: a way to run a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from ..peers.peer import OPENMP
from .subject import Call, Inputs, Subject

# The inputs of a case -> its call. What is not to be timed is done before.
Ready = Callable[[Inputs], Call]


@dataclass(frozen=True)
class Contestant:
    """A way to run a model.

    prepare: writes what `load` needs into an empty folder, in a process of its own; the size of the folder is that of the
        model on disk. None: there is nothing to write.
    load: from that folder. It uses torch.get_num_threads() threads. Raises RuntimeError or ValueError for what the
        library does not support.
    start: like load, but the quickest way to a first output; None: that is load.
    least_cosine: with an output whose mean cosine to torch fp32 is below, it is taken as wrong, and not timed.
    pool: the thread pool that it uses; see timing.Runner.
    convert: makes it of the model in torch, in place, and its memory is then measured; None: it is not.
    needs: modules that must be installed, by pip install and `install`.
    """

    name: str
    load: Callable[[Subject, Path], Ready]
    least_cosine: float
    prepare: Callable[[Subject, Path], None] | None = None
    peer: bool = True
    pool: str = OPENMP
    needs: tuple[str, ...] = ()
    install: str = "'nybble[peers]'"
    start: Callable[[Subject, Path], Ready] | None = None
    convert: Callable[[nn.Module, Subject], object] | None = None

    def why_not(self) -> str | None:
        """Why it cannot run here; None if it can."""
        absent = [name for name in self.needs if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed (pip install {self.install})" if absent else None
