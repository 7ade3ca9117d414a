"""The text as tokens: a BPE tokenizer of the training part, and all three parts in its tokens.

Kept beside this file, since another machine's packages say something else: the tokenizer, and the tokens that the model
is judged by and calibrated with. The tokens that it trains on are made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import Corpus, Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY, END = 2048, "<|end|>"  # END stands between documents and is token 0
LENGTH, SEQUENCES = 256, 256  # of the kept parts


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


def sequences(tokens: Tensor, seed: int) -> Tensor:
    """SEQUENCES windows of LENGTH tokens that do not overlap, int16, drawn from all there are."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(rows) < SEQUENCES:
        raise ValueError(f"tokens: {len(tokens)} make {len(rows)} sequences, wants {SEQUENCES}")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:SEQUENCES].sort().values]


def make(corpus: Corpus, seed: int, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Write tokenizer.json; the tokens to train on (T,), the held-out and the calibration sequences."""
    tokenizer = train_tokenizer(corpus.train)
    tokenizer.save(str(folder / "tokenizer.json"))
    held_out, calibration = (sequences(encode(tokenizer, part), seed) for part in (corpus.held_out, corpus.calibration))
    return encode(tokenizer, corpus.train), held_out, calibration
