"""Which contestants run which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from . import lines, llama_cpp, onnx_models, openvino_models
from .contestant import Contestant
from .decoder import LLAMA, RANDOM_WEIGHTS
from .encoders import MINILM, VIT, WHISPER
from .nybble_models import by_plan, by_scheme, contestant
from .subject import Subject
from .torch_models import BFLOAT16, QUANTIZE_DYNAMIC, REFERENCE, SAVED_REFERENCE

_W8A8 = contestant("w8a8", by_scheme("w8a8"), least_cosine=0.98)
_INT8 = contestant("w8a8, int8 attention", by_scheme("w8a8"), least_cosine=0.98, attention="int8")
_SEVEN = contestant("w8a7, int8 attention", by_scheme("w8a7"), least_cosine=0.98, attention="int8")
_RUNTIMES = (*onnx_models.CONTESTANTS, *openvino_models.CONTESTANTS)
# The relative squared change of MiniLM's hidden states at which the cosine of its vectors stays above 0.992.
_HARM = 0.02


@dataclass(frozen=True)
class Model:
    """A model and those who run it: the reference, torch in fp32, first. more: what else is measured of it."""

    subject: Subject
    contestants: tuple[Contestant, ...]
    more: tuple[str, ...] = ()

    def by_name(self, name: str) -> Contestant:
        return next(one for one in self.contestants if one.name == name)


_ALL = (
    Model(
        MINILM,
        (
            SAVED_REFERENCE,
            QUANTIZE_DYNAMIC,
            _W8A8,
            _INT8,
            contestant("w8a7", by_scheme("w8a7"), least_cosine=0.98),
            contestant("w4a8g128 gptq", by_scheme("w4a8g128", method="gptq", calibrated=True)),
            contestant("planned", by_plan(("w8a8", "w8a7", "w4a8g32", "w4a8g128"), _HARM)),
            *_RUNTIMES,
        ),
        (lines.COSINE, lines.START, lines.KEPT),
    ),
    Model(VIT, (SAVED_REFERENCE, _W8A8, _INT8, _SEVEN, *_RUNTIMES), (lines.COSINE,)),
    Model(WHISPER, (SAVED_REFERENCE, _W8A8, _INT8, _SEVEN, *_RUNTIMES), (lines.COSINE,)),
    Model(
        LLAMA,
        (
            REFERENCE,
            BFLOAT16,
            replace(QUANTIZE_DYNAMIC, least_cosine=RANDOM_WEIGHTS),
            contestant("w4a8g128", by_scheme("w4a8g128", untie=True), torch.bfloat16, RANDOM_WEIGHTS),
            *llama_cpp.CONTESTANTS,
        ),
        (lines.COSINE, lines.RESIDENT),
    ),
)
MODELS: Mapping[str, Model] = {model.subject.name: model for model in _ALL}
