"""What a small language model loses to quantization and pruning, and what methods win back."""

from __future__ import annotations
