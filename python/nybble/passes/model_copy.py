"""A copy of a model's modules that shares its tensors, so that a pass can change the copy first and the model last."""

from __future__ import annotations

import copy

from torch import nn

from ..fusion.block import Fused, fused_at
from ..model.walk import Edits


class ModelCopy:
    """``model`` is a copy of the original's modules that shares its tensors; ``adopt`` applies its changes to the original.

    Passes replace tensors and never write into them, so the original does not change before ``adopt``.

    Raises:
        TypeError: the model holds something that cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        try:
            self.model = copy.deepcopy(model, shared)
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"model={type(model).__name__}: cannot be copied: {error}") from error
        self._pairs = list(zip(model.modules(), self.model.modules(), strict=True))

    def adopt(self) -> None:
        """Put the copy's new modules, parameters and buffers into the original; all of them, or none on an exception.

        What runs fused in the copy does so in the original, which learns its kinds of calls again.
        """
        originals: dict[int, object] = {id(copied): original for original, copied in self._pairs}
        edits = Edits()
        try:
            for original, copied in self._pairs:
                for table in ("_modules", "_parameters", "_buffers"):
                    mine = getattr(original, table)
                    for key, value in getattr(copied, table).items():
                        wanted = originals.get(id(value), value)
                        if mine[key] is not wanted:
                            edits.put(mine, key, wanted)
                _adopt_tie(original, copied, edits)
                if (fused := fused_at(copied)) is not None:
                    replacement = Fused(original, skips=fused.skips, int8=fused.int8).replacement()
                    edits.put(vars(original), "forward", replacement)
        except BaseException:
            edits.undo()
            raise


def _adopt_tie(original: nn.Module, copied: nn.Module, edits: Edits) -> None:
    """Copy ``config.tie_word_embeddings`` (transformers), which rotation sets to False when it unties the head."""
    mine, other = (vars(model).get("config") for model in (original, copied))
    key = "tie_word_embeddings"
    if mine is not None and hasattr(mine, "__dict__") and vars(mine).get(key) != vars(other).get(key):
        edits.put(vars(mine), key, vars(other)[key])
