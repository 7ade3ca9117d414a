"""Change a copy of a model's structure, then make the model what the copy has become."""

from __future__ import annotations

import copy

from torch import nn

from ..model.walk import Edits


class Aside:
    """``model`` is a copy of another's modules on the same tensors; ``adopt`` brings what was changed in it back.

    Passes replace tensors and never write into them, so that until then nothing of the other model changes.

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
        """Put new modules, parameters and buffers into the other model; all, or after any exception none."""
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
        except BaseException:
            edits.undo()
            raise


def _adopt_tie(original: nn.Module, copied: nn.Module, edits: Edits) -> None:
    """What transformers' configuration says of the head and the embedding, which rotation parts."""
    mine, other = (vars(model).get("config") for model in (original, copied))
    key = "tie_word_embeddings"
    if mine is not None and hasattr(mine, "__dict__") and vars(mine).get(key) != vars(other).get(key):
        edits.put(vars(mine), key, vars(other)[key])
