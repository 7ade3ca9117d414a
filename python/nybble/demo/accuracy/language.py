"""The small language model of the repository, tests/data/lm, with held-out, calibration and training tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch import targets
from ...passes.recover import recover
from ...passes.recovery.report import Recovered
from .. import DemoUnavailable
from ..model import no_loading_bar

FOLDER = Path("tests/data/lm")
BATCH, DISTILLED = 8, 4  # sequences per batch, for evaluation and for distillation


@dataclass(frozen=True)
class Language:
    """A trained model with its data.

    model: LlamaForCausalLM, float32, in eval mode. held_out, calibration, teaching: token ids, int64 (sequences, length);
    ``teaching`` is text that the model was trained on. facts: how it was trained (training.json).
    """

    model: nn.Module
    held_out: Tensor
    calibration: Tensor
    teaching: Tensor
    facts: dict[str, Any]

    def held_out_batches(self, sequences: int | None = None) -> list[Tensor]:
        """Held-out batches: ``sequences`` of them, evenly spaced; all if None."""
        count = len(self.held_out)
        wanted = count if sequences is None else sequences
        return list(self.held_out[torch.arange(wanted) * count // wanted].split(BATCH))

    def calibrating(self, sequences: int, seed: int) -> list[Tensor]:
        """Calibration batches, drawn at random with a seed."""
        return _drawn(self.calibration, sequences, seed, BATCH)

    def recover(self, model: nn.Module, sequences: int, seed: int) -> Recovered:
        """Recover a changed copy of the model on text drawn with a seed; in bfloat16 if this CPU has it."""
        batches = _drawn(self.teaching, sequences, seed, DISTILLED)
        with torch.autocast("cpu", torch.bfloat16, enabled="avx512bf16" in targets.detect().targets):
            return recover(model, self.model, batches, epochs=0, end_to_end_epochs=2)


def _drawn(rows: Tensor, count: int, seed: int, size: int) -> list[Tensor]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return list(rows[order[:count]].split(size))


def load(folder: Path = FOLDER) -> Language:
    """Load the model. Raises DemoUnavailable if its files, transformers or safetensors are missing."""
    missing = [name for name in ("transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise DemoUnavailable(f"the language model needs {' and '.join(missing)}: pip install 'nybble[demo]'")
    if not (folder / "model.safetensors").exists():
        raise DemoUnavailable(f"{folder}: has no language model; it is in nybble's repository, not in its wheel")
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    with no_loading_bar():
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = {name: ids.long() for name, ids in load_file(folder / "tokens.safetensors").items()}
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    done: nn.Module = model.eval()
    return Language(done, tokens["held_out"], tokens["calibration"], tokens["teaching"], facts)
