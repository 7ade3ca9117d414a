"""Makes the language model of this folder: a small Llama, trained on the English that Python's packages say of themselves.

    python tests/data/lm/train.py --work DIR        # goes on where it was cut off; writes into this folder at the end

Environment: pip install -c constraints.txt '.[dev]'. Text, order and start are fixed by SEED and the installed files,
whose hash is in training.json; the last bits of a float sum are the processor's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import corpus
import parts
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SEED, THREADS = 0, 2
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": parts.VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BATCH, RATE, WARMUP, DECAY = 8, 1.2e-3, 100, 0.25  # DECAY: the last share of the steps, in which the rate falls to 0
SAVE_EVERY, LOOK_EVERY, LOOK_AT = 50, 200, 32


def rate(step: int, steps: int) -> float:
    """Constant but for its ends, so that a run may be made shorter until the fall begins."""
    fall = (steps - step) / (DECAY * steps)
    return RATE * min(1.0, (step + 1) / WARMUP, fall)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token, in bfloat16 products; ids int64 (B, T)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean loss over sequences (S, LENGTH)."""
    return sum(float(loss_of(model, batch.long())) * len(batch) for batch in rows.split(16)) / len(rows)


def batch_of(tokens: Tensor, step: int) -> Tensor:
    """BATCH windows, int64 (BATCH, LENGTH + 1); the same for a step in every run."""
    draw = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    starts = torch.randint(len(tokens) - parts.LENGTH, (BATCH,), generator=draw)
    return torch.stack([tokens[start : start + parts.LENGTH + 1] for start in starts]).long()


class Run:
    """A training run that can stop after any step and go on from its last checkpoint."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(SEED)
        self._path = path
        self.model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
        self._parameters = dict(self.model.named_parameters())
        matrices = [p for p in self._parameters.values() if p.dim() > 1]
        vectors = [p for p in self._parameters.values() if p.dim() == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        for p in self._parameters.values():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self._optimizer.state[p] = {"step": torch.zeros(()), **moments}
        self.state: dict[str, Any] = {"step": 0, "cpu_seconds": 0.0, "curve": []}
        if path.exists():
            self._load()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"p.{name}": p.data for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            tensors |= {f"{kind}.{name}": value for kind, value in self._optimizer.state[p].items()}
        return tensors

    def _load(self) -> None:
        with safe_open(self._path, "pt") as kept:
            self.state = json.loads(kept.metadata()["state"])
            for name, tensor in self._tensors().items():
                tensor.copy_(kept.get_tensor(name))

    def save(self) -> None:
        """Replace the checkpoint in one go."""
        fresh = self._path.with_suffix(".new")
        save_file(self._tensors(), fresh, {"state": json.dumps(self.state)})
        os.replace(fresh, self._path)

    def step(self, ids: Tensor, rate: float) -> float:
        """One step of AdamW, gradients clipped to norm 1; the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = loss_of(self.model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self.state["step"] += 1
        return loss.item()


def train(run: Run, tokens: Tensor, held_out: Tensor, steps: int) -> None:
    """Take what steps are left, and note losses and the processor's seconds on the way."""
    state, losses, clock = run.state, [], time.process_time()
    while state["step"] < steps:
        losses.append(run.step(batch_of(tokens, state["step"]), rate(state["step"], steps)))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {state['step']}: the loss is {losses[-1]}")
        now = time.process_time()
        state["cpu_seconds"] += now - clock
        clock = now
        if state["step"] % LOOK_EVERY == 0 or state["step"] == steps:
            look = held_out_loss(run.model, held_out[:: max(1, len(held_out) // LOOK_AT)])
            line = {"step": state["step"], "loss": sum(losses) / len(losses), "held_out": look}
            state["curve"].append({key: round(value, 4) for key, value in line.items()})
            print(json.dumps({**state["curve"][-1], "cpu_seconds": round(state["cpu_seconds"])}), flush=True)
            losses, clock = [], time.process_time()
        if state["step"] % SAVE_EVERY == 0 or state["step"] == steps:
            run.save()


def write(run: Run, held_out: Tensor, facts: dict[str, Any]) -> None:
    """The model in bfloat16, its configuration, and what made it, into this folder."""
    model = run.model.to(torch.bfloat16)
    save_file({name: p.data for name, p in model.named_parameters()}, HERE / "model.safetensors", {"format": "pt"})
    (HERE / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}, indent=2) + "\n")
    facts = {**facts, **run.state, "held_out_loss": round(held_out_loss(model.float(), held_out), 4)}
    facts["seconds_on_2_cores"] = round(facts.pop("cpu_seconds") / THREADS)
    (HERE / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def prepared(work: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parts as tokens and the facts of the text, made once."""
    path = work / "tokens.safetensors"
    if not path.exists():
        text = corpus.read()
        train, kept_parts = parts.make(text, SEED, HERE)
        save_file(kept_parts, HERE / "tokens.safetensors")
        facts = {"corpus_sha256": text.sha256, "documents": {name: len(part) for name, part in text._asdict().items()}}
        facts["train_tokens"] = len(train)
        save_file({"train": train, "held_out": kept_parts["held_out"]}, path, {"facts": json.dumps(facts)})
    with safe_open(path, "pt") as kept:
        return {name: kept.get_tensor(name) for name in kept.keys()}, json.loads(kept.metadata()["facts"])  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the training tokens")
    parser.add_argument("--steps", type=int, default=4800, help="of 2048 tokens (default 4800)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    args.work.mkdir(parents=True, exist_ok=True)
    tokens, facts = prepared(args.work)
    run = Run(args.work / "checkpoint.safetensors")
    train(run, tokens["train"], tokens["held_out"], args.steps)
    write(run, tokens["held_out"], {"seed": SEED, "tokens": args.steps * BATCH * parts.LENGTH, **facts})


if __name__ == "__main__":
    main()
