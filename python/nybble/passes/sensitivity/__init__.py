"""What each layer of a model suffers from each scheme, the others being as they were."""

from __future__ import annotations

from .find import sensitivity
from .result import Damage, LayerSensitivity, Sensitivity

__all__ = ["Damage", "LayerSensitivity", "Sensitivity", "sensitivity"]
