"""The text as tokens: a BPE tokenizer of the training part, and all three parts in its tokens.

Kept beside this file, since another machine's packages say something else: the tokenizer, and sequences to judge the
model by, to calibrate it with, and of its training text to distil it with. All that it trains on is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import Corpus, Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY, END = 2048, "<|end|>"  # END stands between documents and is token 0
LENGTH = 256
KEPT = {"held_out": 256, "calibration": 256, "teaching": 2048}  # sequences


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text(document) for document in documents), trainer)
    return tokenizer


def text(document: Document) -> str:
    """The paragraphs with an empty line between them."""
    return "\n\n".join(document.paragraphs)


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tensor:
    """All documents in one row, int16 (T,), END after each."""
    encoded = tokenizer.encode_batch([text(document) + END for document in documents])
    return torch.tensor([token for found in encoded for token in found.ids], dtype=torch.int16)


def sequences(tokens: Tensor, count: int, seed: int) -> Tensor:
    """So many windows of LENGTH tokens that do not overlap, int16, drawn from all there are."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(rows) < count:
        raise ValueError(f"tokens: {len(tokens)} make {len(rows)} sequences, wants {count}")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].sort().values]


def make(corpus: Corpus, seed: int, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Write tokenizer.json; the tokens to train on (T,), and the sequences that are kept."""
    tokenizer = train_tokenizer(corpus.train)
    tokenizer.save(str(folder / "tokenizer.json"))
    train = encode(tokenizer, corpus.train)
    source = {
        "held_out": encode(tokenizer, corpus.held_out),
        "calibration": encode(tokenizer, corpus.calibration),
        "teaching": train,
    }
    return train, {name: sequences(source[name], count, seed) for name, count in KEPT.items()}
