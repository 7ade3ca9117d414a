"""The directory that a command writes: nybble's checkpoint of a model, with what else a user of the model needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..checkpoint.files import written_at_once
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
    with written_at_once(out) as aside:
        save(model, aside)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        add_beside(aside, source, report)
        yield aside


def add_beside(out: Path, source: Path, report: Reported) -> None:
    """Write into a model's directory what it has besides the model: the report, and the tokenizer's files of ``source``."""
    (out / REPORT_JSON).write_text(report.to_json(), encoding="utf-8")
    (out / REPORT_TEXT).write_text(f"{report}\n", encoding="utf-8")
    for path in sorted((source if source.is_dir() else source.parent).iterdir()):
        if path.is_file() and path.name.startswith(_KEPT):
            shutil.copyfile(path, out / path.name)
