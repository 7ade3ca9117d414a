"""`nybble.sensitivity`: how much each scheme changes the model's output if only one layer is changed.

Inside: `find` (the public function), `variants` (the layers under each scheme), `harm` (the change of the output),
`outliers` (input channels), `result` and `plot`.
"""

from __future__ import annotations

from ... import _moved
from .find import sensitivity
from .result import Effect, LayerSensitivity, Sensitivity

__all__ = ["Effect", "LayerSensitivity", "Sensitivity", "sensitivity"]

__getattr__ = _moved.old_names(__name__)
