"""`nybble demo --accuracy`: the loss of a small language model by quantization and pruning, and how methods reduce it."""

from __future__ import annotations
