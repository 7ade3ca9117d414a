"""Quantized models on several processes, by torch's own engines: tensor parallel, FSDP, offloading."""

from __future__ import annotations

from .portable import keep_portable

__all__ = ["keep_portable"]
