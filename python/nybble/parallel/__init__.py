"""Quantized models on several processes, by torch's own engines: tensor parallel, FSDP, offloading; and their calibration."""

from __future__ import annotations

from .calibration import calibrate_alone, share_batches
from .portable import keep_portable

__all__ = ["calibrate_alone", "keep_portable", "share_batches"]
