"""Reorder what lies between two layers: the inputs of one, and the outputs of those before it that make them.

Exact wherever the layers before reach the one after through elementwise operations alone, as in an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model.eligible import dense_weight
from ...model.walk import Edits
from ...weights.sparsity import NofM
from ..layerwise.judge import moved, tensors_of
from ..plan import Layer, Plan
from .permute import kept_score, search

Names = tuple[str, ...]
_LEAST_GAIN = 1e-6
# How far the model's output may move by another order of summation; a wrong fold moves it much further.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# How MLPs name theirs: the layers that make the inputs, then the one that takes them.
_KNOWN: tuple[Names, ...] = (
    ("intermediate.dense", "output.dense"),
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)


def check_permute(permute: object) -> bool | tuple[Names, ...]:
    """The ``permute`` argument of ``sparsify``. Raises TypeError."""
    if isinstance(permute, bool):
        return permute
    rule = "wants True, False, or a sequence of tuples of two module names or more, the last taking what others make"
    if isinstance(permute, str) or not isinstance(permute, Sequence):
        raise TypeError(f"permute={permute!r}: {rule}")
    for chain in permute:
        if isinstance(chain, str) or not isinstance(chain, Sequence) or len(chain) < 2:
            raise TypeError(f"permute={permute!r}: {rule}, got {chain!r}")
        if not all(isinstance(name, str) for name in chain):
            raise TypeError(f"permute={permute!r}: {rule}, got {chain!r}")
    return tuple(tuple(chain) for chain in permute)


class Folder:
    """Permutes where it is legal, and says where it is not.

    Args:
        plan: its open layers may be permuted; those of an n:m pattern gain by it.
        edits: takes every change.
        run: gives the model's output on some data, to see that it stays; or None.
    """

    def __init__(self, plan: Plan, edits: Edits, run: Callable[[], Any] | None) -> None:
        self._plan, self._edits, self._run = plan, edits, run
        self._layers = {name: layer for layer in plan.layers for name in layer.site.names}
        self._wanted = None if run is None else tensors_of(run())

    def fold(self, permute: bool | tuple[Names, ...]) -> None:
        """Permute the named chains, or (True) all MLPs with known names; sets each layer's gain, or a note.

        Raises:
            ValueError: a name that is no Linear layer of the model.
        """
        chains = self._known() if permute is True else permute or ()
        for names in chains:
            for name in names:
                if name not in self._layers:
                    raise ValueError(f"permute: {name!r} is no Linear layer of the model")
            makers, taker = [self._layers[name] for name in names[:-1]], self._layers[names[-1]]
            why = self._why_not(makers, taker) or self._apply(makers, taker)
            if why is not None:
                taker.notes.append(f"inputs not permuted: {why}")

    def _known(self) -> Iterator[Names]:
        for name, layer in self._layers.items():
            for *before, last in _KNOWN:
                prefix = name.removesuffix(last)
                names = tuple(prefix + one for one in before)
                if prefix != name and layer.reason is None and all(one in self._layers for one in names):
                    yield (*names, name)

    def _why_not(self, makers: Iterable[Layer], taker: Layer) -> str | None:
        form = taker.pattern.sparsity if taker.pattern else None
        if not isinstance(form, NofM):
            return "not an n:m pattern"
        k = dense_weight(taker.site.module).shape[1]
        for layer in (*makers, taker):
            if layer.reason is not None:
                return f"{layer.site.name} is left alone"
            if layer.is_sparse:
                return f"{layer.site.name} is sparse already"
            if len(self._plan.owners[self._plan.group(layer.weight)]) > 1 or len(layer.site.places) > 1:
                return f"{layer.site.name} shares its weight"
            if layer is not taker and dense_weight(layer.site.module).shape[0] != k:
                return f"{layer.site.name} has {dense_weight(layer.site.module).shape[0]} outputs for {k} inputs"
        return f"{k} inputs are not a multiple of {form.m}" if k % form.m else None

    def _apply(self, makers: Sequence[Layer], taker: Layer) -> str | None:
        """Permute and note the gain; or say why the layers are as they were."""
        assert taker.pattern is not None, "checked above"  # noqa: S101
        form = taker.pattern.sparsity
        assert isinstance(form, NofM), "checked above"  # noqa: S101
        weight = dense_weight(taker.site.module)
        order = search(weight, form)
        gain = kept_score(weight[:, order], form) / max(kept_score(weight, form), torch.finfo(torch.float64).tiny) - 1
        if gain <= _LEAST_GAIN:
            return "no order keeps more"
        trial = Edits()
        try:
            for layer in makers:
                self._reorder(trial, layer, order, 0)
            self._reorder(trial, taker, order, 1)
            change = 0.0 if self._run is None else self._moved()
        except BaseException:
            trial.undo()
            raise
        if change > _TOLERANCE[taker.weight.dtype]:
            trial.undo()
            return f"the model's output moves by {change:.2g}, so that more than elementwise operations lie between"
        self._edits.take(trial)
        taker.permutation_gain = gain
        return None

    def _reorder(self, trial: Edits, layer: Layer, order: Tensor, side: int) -> None:
        """Outputs (side 0) or inputs (side 1) in another order."""
        module, weight = layer.site.module, layer.kind.weight
        reordered = weight.to_matrix(layer.weight.detach()).index_select(side, order)
        changes = {weight.key: weight.from_matrix(reordered, layer.weight.shape)}
        if side == 0 and weight.bias is not None and layer.bias is not None:
            changes[weight.bias] = layer.bias.detach()[order]
        for key, value in changes.items():
            old = module._parameters[key]
            assert old is not None, "read above"  # noqa: S101
            new = nn.Parameter(value, requires_grad=old.requires_grad)
            self._plan.renew(old, new)
            trial.put(module._parameters, key, new)

    def _moved(self) -> float:
        assert self._run is not None, "asked before"  # noqa: S101
        assert self._wanted is not None, "found with it"  # noqa: S101
        return moved(tensors_of(self._run()), self._wanted)
