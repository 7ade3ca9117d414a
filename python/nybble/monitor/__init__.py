"""`nybble.Monitor`: detects when the inputs of a model's layers in production drift from those of calibration.

Inside: `monitor` (the public class and its report), `watch` (one layer: windows and alarms), `statistics` (what is
counted and compared).
"""

from __future__ import annotations

from .. import _moved
from .monitor import Monitor

__all__ = ["Monitor"]

__getattr__ = _moved.old_names(__name__)
