"""Quantized modules, and the table of the dense layers that they replace."""

from .composite import CompositeKind, CompositeModule
from .kinds import MatrixWeight, ModuleKind, composite_kinds, module_kinds
from .linear import Linear
from .module import QuantizedModule
from .sparse import SparseLinear

__all__ = [
    "CompositeKind",
    "CompositeModule",
    "Linear",
    "MatrixWeight",
    "ModuleKind",
    "QuantizedModule",
    "SparseLinear",
    "composite_kinds",
    "module_kinds",
]
