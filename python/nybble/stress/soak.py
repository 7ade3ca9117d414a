"""What must not grow, and what must not differ: many calls, many cycles from a dense model to a loaded one, many threads."""

from __future__ import annotations

import copy
import gc
import os
import resource
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import load, save
from ..passes.quantize import quantize
from ..testing.models import Stack, token_batches
from .attempt import must, wrong_of
from .children import in_children
from .figure import Tally, Trial

_WARM = 0.1  # the share of a run after which memory is read for the first time
_MOST_GROWTH = 4 << 20  # bytes: what the allocator may keep or round, and no leak of a byte a call
_THREADS = 8


def resident() -> int:
    """Bytes of this process in memory, after garbage was collected."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _steady(step: Callable[[int], None], count: int, say: Callable[[Tally], None]) -> None:
    """Do ``step(i)`` ``count`` times; memory after the first tenth and at the end may not differ by much, nor files open."""
    found = Tally()

    def all_steps() -> None:
        warm = max(int(count * _WARM), 1)
        for i in range(warm):
            step(i)
        before, files = resident(), len(os.listdir("/proc/self/fd"))
        for i in range(warm, count):
            step(i)
        grown = resident() - before
        found.facts["most growth in KB"] = grown // 1024
        must(grown < _MOST_GROWTH, f"grown by {grown} bytes")
        must(len(os.listdir("/proc/self/fd")) == files, "more files are open")

    found.add(wrong_of(all_steps, f"{count} steps"), count)
    say(found)


def _calls(count: int, say: Callable[[Tally], None]) -> None:
    models = [Stack().eval() for _ in range(3)]
    for model, scheme in zip(models, ("w8a8", "w4a16g32", "w4a8g32"), strict=True):
        quantize(model, scheme, goal="memory")
    batches = token_batches()
    with torch.no_grad():
        right = [[model(ids) for ids in batches] for model in models]

        def step(i: int) -> None:
            model, batch = i % len(models), i // len(models) % len(batches)
            must(torch.equal(models[model](batches[batch]), right[model][batch]), f"call {i} gives another output")

        _steady(step, count, say)


def _cycles(count: int, say: Callable[[Tally], None]) -> None:
    batch = token_batches(1)[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def step(i: int) -> None:
            torch.manual_seed(i)
            model, scheme = Stack().eval(), ("w8a8", "w4a16g32", "w4a8g32")[i % 3]
            quantize(model, scheme, goal="memory")
            save(model, folder)
            loaded = load(Stack().eval(), folder)
            must(torch.equal(loaded(batch), model(batch)), f"cycle {i} loads another model")

        _steady(step, count, say)


def calls(trial: Trial) -> Tally:
    """``count`` calls of three models, in a process of their own."""
    return in_children(_calls, [(trial.count,)])


def cycles(trial: Trial) -> Tally:
    """``count`` times: quantize, save, load, compare. In a process of its own."""
    return in_children(_cycles, [(trial.count,)])


def threads(trial: Trial) -> Tally:
    """``count`` calls of one model by 8 Python threads, which are the first to call it: each output is the right one."""
    return in_children(_threads, [(trial.count,)])


def _shared(model: nn.Module, batches: list[Tensor], right: list[Tensor], count: int, found: Tally) -> None:
    wrong: list[str | None] = [None] * _THREADS
    begin = threading.Barrier(_THREADS)

    def calls(thread: int) -> None:
        begin.wait()
        with torch.no_grad():
            for i in range(thread, count, _THREADS):
                same = torch.equal(model(batches[i % len(batches)]), right[i % len(batches)])
                must(same, f"call {i} gives another output")

    def run(thread: int) -> None:
        wrong[thread] = wrong_of(lambda: calls(thread), f"thread {thread}")

    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(_THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found.add(next(filter(None, wrong), None), count)


def _threads(count: int, say: Callable[[Tally], None]) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    found, batches = Tally(), token_batches(_THREADS)
    rounds = max(min(count // 200, 50), 1)
    for turn in range(rounds):  # each begins with a model that no thread has called, so that all pack it
        torch.manual_seed(turn)
        models = [Stack().eval()] * 2
        models[1] = copy.deepcopy(models[0])
        for model in models:
            quantize(model, ("w8a8", "w4a16g32")[turn % 2], goal="memory")
        with torch.no_grad():
            right = [models[0](ids) for ids in batches]
        _shared(models[1], batches, right, count // rounds, found)
    found.facts["models"] = rounds
    say(found)
