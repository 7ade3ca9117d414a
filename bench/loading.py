"""How long libraries take to load a quantized checkpoint, and what memory they need: each time in a process of its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..demo.table import text_table
from ..evaluate.memory import peak_mb, resident_mb
from .apart import apart
from .loading_files import MAKERS, Size
from .whole.files import FILES

_TOKENS = 8  # of the first forward
_FAILURES = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NameError, OSError, ChildProcessError)

Forward = Callable[[], Any]


@dataclass(frozen=True)
class Reader:
    """A library that loads checkpoints.

    modules: that are imported before the clock starts. load: a path -> a forward of 8 tokens. files, directories: which it loads.
    environment: variables that it needs, where they are not set. also: modules that are imported before too, if they are there.
    """

    modules: tuple[str, ...]
    load: Callable[[Path], Forward]
    files: bool = True
    directories: bool = True
    environment: tuple[tuple[str, str], ...] = ()
    also: tuple[str, ...] = ()


def _forward(model: Any) -> Forward:
    ids = torch.arange(1, _TOKENS + 1)[None]

    def run() -> Any:
        with torch.inference_mode():
            return model(ids).logits

    return run


def _nybble(path: Path) -> Forward:
    return _forward(import_module("nybble").load_pretrained(path, progress=False).model)


def _transformers(path: Path) -> Forward:
    kind: Any = import_module("transformers").AutoModelForCausalLM
    if path.is_dir():
        return _forward(kind.from_pretrained(path, local_files_only=True).eval())
    found = kind.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, dtype=torch.bfloat16)
    return _forward(found.eval())


def _gptqmodel(path: Path) -> Forward:
    return _forward(import_module("gptqmodel").GPTQModel.load(str(path), device="cpu"))


def _llama_cpp(path: Path) -> Forward:
    library: Any = import_module("llama_cpp")
    model = library.Llama(str(path), n_ctx=64, n_threads=torch.get_num_threads(), verbose=False)
    return lambda: model.eval(list(range(1, _TOKENS + 1)))


# gptqmodel 7.7, by which transformers loads GPTQ, asks for two of the one worker that it has on two cores.
_WORKERS = (("GPTQMODEL_CPU_WORKERS", "2"),)

READERS = {
    "nybble": Reader(("nybble", "nybble.foreign", "transformers.models.llama.modeling_llama"), _nybble),
    "transformers": Reader(
        ("transformers.models.llama.modeling_llama", "transformers.modeling_utils"),
        _transformers,
        environment=_WORKERS,
        also=("optimum", "gptqmodel", "gguf", "compressed_tensors", "bitsandbytes", "torchao"),
    ),
    "gptqmodel": Reader(("gptqmodel",), _gptqmodel, files=False, environment=_WORKERS),
    "llama.cpp": Reader(("llama_cpp",), _llama_cpp, directories=False),
}


@dataclass(frozen=True)
class Loaded:
    """Medians of the rounds; or why a reader has none.

    seconds: until the model is there. forward_s: until it also has done a first forward of 8 tokens. peak_mb: the most that the
    process grew until then, in 10^6 bytes, mapped files included.
    """

    reader: str
    seconds: float | None = None
    forward_s: float | None = None
    peak_mb: float | None = None
    why: str | None = None
    kind: str = "loading"


def _once(path: str, name: str, threads: int) -> tuple[float, float, float]:
    """Seconds, seconds with the forward, MB: in a new process."""
    reader = READERS[name]
    for variable, value in reader.environment:
        os.environ.setdefault(variable, value)
    torch.set_num_threads(threads)
    for module in (*reader.modules, *(one for one in reader.also if find_spec(one))):
        import_module(module)
    before = resident_mb()
    peak_mb(reset=True)
    start = time.perf_counter()
    forward = reader.load(Path(path))
    loaded = time.perf_counter() - start
    forward()
    # Linux counts the two by pages that it sums up now and then, so the peak can be some pages below.
    return loaded, time.perf_counter() - start, max(0.0, peak_mb() - before)


def _in_child(path: str, name: str, threads: int) -> tuple[float, float, float]:
    """As _once; what libraries print goes to stderr, since results are on stdout."""
    os.dup2(2, 1)
    return _once(path, name, threads)


def measure(path: Path, names: Sequence[str], rounds: int, threads: int) -> Iterator[Loaded]:
    """What each reader takes; they take turns, and all find the files in the system's cache."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    whys = {name: why for name in names if (why := _why_not(name, path))}
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.read_bytes()
    for name in list(names) * rounds:
        if name in whys:
            continue
        try:
            found[name].append(apart(partial(_in_child, str(path)), name, threads))
        except _FAILURES as error:
            whys[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    for name, times in found.items():
        if name in whys:
            yield Loaded(name, why=whys[name])
        else:
            seconds, forward_s, peak = (median(column) for column in zip(*times, strict=True))
            yield Loaded(name, seconds, forward_s, peak)


def _why_not(name: str, path: Path) -> str | None:
    """Why a library cannot load a checkpoint here, or None."""
    reader = READERS[name]
    if not (reader.files if path.is_file() else reader.directories):
        return f"loads no {'files' if path.is_file() else 'directories'}"
    missing = [one for one in {module.partition(".")[0] for module in reader.modules} if find_spec(one) is None]
    return f"{missing[0]} is not installed" if missing else None


@contextmanager
def checkpoint(name: str) -> Iterator[Path]:
    """A checkpoint: a path, or one of MAKERS, which is written, into the folder NYBBLE_BENCH_FILES if that is set.

    Raises ValueError for what is neither.
    """
    if name not in MAKERS:
        if not Path(name).exists():
            raise ValueError(f"{name}: must be a directory, a file, or one of {', '.join(MAKERS)}")
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(os.environ.get(FILES) or aside, f"loading-{name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = [folder / "model.gguf", folder] if folder.is_dir() else []
        yield next((path for path in made if path.exists()), None) or MAKERS[name](folder, Size())


def table(rows: Sequence[Loaded]) -> str:
    """The results as text."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    lines = [
        (row.reader, cell(row.seconds, ".2f"), cell(row.forward_s, ".2f"), cell(row.peak_mb, ".0f"), row.why or "")
        for row in rows
    ]
    return text_table(("loaded by", "seconds", "with a forward", "peak, MB", ""), lines, right=(1, 2, 3))


def rows_of(results: Sequence[Loaded], path: str, threads: int) -> list[dict[str, Any]]:
    """The results as lines of a result file."""
    return [asdict(row) | {"checkpoint": path, "threads": threads} for row in results]
