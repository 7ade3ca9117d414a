"""Quantized modules, and the table of the dense layers that they replace."""

from .composite import CompositeKind, CompositeModule
from .conv import Conv1d, Conv2d, ConvTranspose1d
from .embedding import Embedding, EmbeddingBag
from .experts import Experts
from .kinds import MatrixWeight, ModuleKind, composite_kinds, module_kinds
from .linear import Linear
from .module import QuantizedModule
from .multihead import MultiheadAttention
from .recurrent import GRU, LSTM
from .sparse import SparseLinear

__all__ = [
    "GRU",
    "LSTM",
    "CompositeKind",
    "CompositeModule",
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "Embedding",
    "EmbeddingBag",
    "Experts",
    "Linear",
    "MatrixWeight",
    "ModuleKind",
    "MultiheadAttention",
    "QuantizedModule",
    "SparseLinear",
    "composite_kinds",
    "module_kinds",
]
