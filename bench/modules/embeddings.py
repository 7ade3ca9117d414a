"""MiniLM with its tables of embeddings in 8 bits, against the same with tables in float32, and ONNX Runtime in int8."""

from __future__ import annotations

from dataclasses import replace

from ..whole import lines, onnx_models
from ..whole.encoders import MINILM
from ..whole.goals import Goal, everywhere
from ..whole.models import Model
from ..whole.nybble_models import by_scheme, contestant
from ..whole.torch_models import REFERENCE

TABLES = replace(MINILM, name="MiniLM with tables in 8 bits")
_OURS = contestant("w8a8", by_scheme("w8a8"), least_cosine=0.98)
_FLOAT = contestant("w8a8, tables in float32", by_scheme("w8a8", exclude="embeddings.*"), least_cosine=0.98)
MODELS = (Model(TABLES, (REFERENCE, _OURS, _FLOAT, *onnx_models.CONTESTANTS), (lines.COSINE,)),)
GOALS = (
    Goal(TABLES.name, lines.DISK, everywhere(23.5), ours=(_OURS.name,), at_most=True),
    Goal(TABLES.name, lines.COSINE, everywhere(0.998), ours=(_OURS.name,)),
    Goal(TABLES.name, "batch 1", everywhere(1), (_FLOAT.name,), (_OURS.name,)),
)
