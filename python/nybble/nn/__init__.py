"""Drop-in modules."""

from .linear import Linear
from .sparse import SparseLinear

__all__ = ["Linear", "SparseLinear"]
