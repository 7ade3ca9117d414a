"""The models and goals of ``--preset modules``: a line for each file."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from ..whole.models import Model
from . import embeddings, experts, images, recurrent

_PARTS = (embeddings, experts, recurrent, images)

MODELS: Mapping[str, Model] = {model.subject.name: model for model in chain(*(part.MODELS for part in _PARTS))}
GOALS = tuple(chain(*(part.GOALS for part in _PARTS)))
