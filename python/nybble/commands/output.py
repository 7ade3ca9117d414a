"""The directory that a command writes: nybble's checkpoint of a model, with what else a user of the model needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..checkpoint.io import save
from . import CommandFailed
from .model_dir import CONFIG

REPORT_JSON, REPORT_TEXT = "report.json", "report.txt"
# Files beside the weights that a user of the model needs.
_KEPT = ("tokenizer", "special_tokens_map", "generation_config", "vocab", "merges", "chat_template")


class Reported(Protocol):
    """What a command has to say of the model; ``str`` of it is for people."""

    def to_json(self) -> str: ...


def check_out(out: Path) -> None:
    """Raises CommandFailed unless the directory is new or empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CommandFailed(f"--out {out}: exists and is not an empty directory")


@contextmanager
def written_model(
    out: Path, model: nn.Module, config: Mapping[str, Any], source: Path, report: Reported
) -> Iterator[Path]:
    """A model's directory while it is written, for more files; it becomes ``out`` in one step after the block.

    ``source``: the directory that the tokenizer's files are taken from; of a file, the one that it is in.
    """
    with _written_at_once(out) as aside:
        save(model, aside)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / REPORT_JSON).write_text(report.to_json(), encoding="utf-8")
        (aside / REPORT_TEXT).write_text(f"{report}\n", encoding="utf-8")
        for path in sorted((source if source.is_dir() else source.parent).iterdir()):
            if path.is_file() and path.name.startswith(_KEPT):
                shutil.copyfile(path, aside / path.name)
        yield aside


@contextmanager
def _written_at_once(out: Path) -> Iterator[Path]:
    """A temporary directory to write to; it becomes ``out`` in one step, or is removed after an exception."""
    aside = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
