"""llama.cpp by the C interface that llama-cpp-python wraps."""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import gguf_files
from .contestant import Contestant, Ready
from .decoder import RANDOM_WEIGHTS
from .subject import Call, Inputs, Subject

_ROOM = 512  # tokens of each sequence's cache
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


@lru_cache
def _library() -> Any:
    """llama_cpp, which then writes nothing to stderr."""
    library: Any = import_module("llama_cpp")
    library.llama_log_set(_SILENT, ctypes.c_void_p())
    library.llama_backend_init()
    return library


class _Session:
    """Some sequences, each with a cache."""

    def __init__(self, model: Any, sequences: int) -> None:
        library = _library()
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = sequences * _ROOM, _ROOM, _ROOM
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = library.llama_init_from_model(model, options)
        if not self._context:
            raise RuntimeError("llama_init_from_model failed")
        self._batch = library.llama_batch_init(sequences * _ROOM, 0, 1)
        self._memory = library.llama_get_memory(self._context)
        self._words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        weakref.finalize(self, library.llama_free, self._context)
        weakref.finalize(self, library.llama_batch_free, self._batch)

    def forward(self, ids: Tensor, start: int) -> np.ndarray[Any, Any]:
        """Logits (sequences, vocabulary) of the last of the tokens (sequences, tokens) that begin at position `start`."""
        library, batch, (rows, tokens) = _library(), self._batch, ids.shape
        batch.n_tokens = rows * tokens
        for at, token in enumerate(ids.flatten().tolist()):
            row, column = divmod(at, tokens)
            batch.token[at], batch.pos[at] = token, start + column
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
            batch.logits[at] = column == tokens - 1
        if library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = [library.llama_get_logits_ith(self._context, (row + 1) * tokens - 1) for row in range(rows)]
        return np.stack([np.ctypeslib.as_array(one, (self._words,)) for one in found])

    def rewind(self, tokens: int) -> None:
        """Forgets all but the first tokens of each sequence."""
        _library().llama_memory_seq_rm(self._memory, -1, tokens, -1)


def _prepare(subject: Subject, folder: Path, kind: str) -> None:
    with TemporaryDirectory(dir=folder.parent) as room:
        source = Path(room, "source.gguf")
        gguf_files.write(subject.build(), source)
        gguf_files.quantize(source, folder / "model.gguf", kind)


def _load(subject: Subject, folder: Path) -> Ready:
    library = _library()
    model = library.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), library.llama_model_default_params()
    )
    if not model:
        raise RuntimeError("llama_model_load_from_file failed")
    return partial(_ready, model)


def _ready(model: Any, inputs: Inputs) -> Call:
    prompt, steps = inputs["prompt"], inputs["steps"]
    session = _Session(model, len(prompt))
    held = prompt.shape[1] if steps.shape[1] else 0
    if held:
        session.forward(prompt, 0)

    def call() -> object:
        session.rewind(held)
        if not held:
            return session.forward(prompt, 0)
        for at in range(steps.shape[1]):
            logits = session.forward(steps[:, at : at + 1], held + at)
        return logits

    return call


CONTESTANTS = tuple(
    Contestant(
        f"llama.cpp {kind}",
        _load,
        least_cosine=0.9 if kind == "Q8_0" else RANDOM_WEIGHTS,
        prepare=partial(_prepare, kind=kind),
        pool="llama.cpp",
        needs=("llama_cpp", "gguf"),
        install="'nybble[llama]'",
    )
    for kind in gguf_files.KINDS
)
