"""Quantized modules, and the table of the dense layers that they replace."""

from .kinds import MatrixWeight, ModuleKind, module_kinds
from .linear import Linear
from .module import QuantizedModule
from .sparse import SparseLinear

__all__ = ["Linear", "MatrixWeight", "ModuleKind", "QuantizedModule", "SparseLinear", "module_kinds"]
