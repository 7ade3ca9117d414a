"""Quantized models on several processes, by torch's own engines: tensor parallel, FSDP, and calibration over ranks."""

from __future__ import annotations
