"""Permute the hidden channels between layers: the outputs of the producers and the inputs of the consumer.

This leaves the model's output unchanged if only elementwise operations lie between, as in an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model.eligible import dense_weight
from ...model.walk import Edits
from ...weights.sparsity import NofM
from ..layerwise.errors import float_tensors, output_change
from ..plan import Layer, Plan
from .permute import kept_score, search

Names = tuple[str, ...]
_LEAST_GAIN = 1e-6
# The largest relative change of the model's output that another order of summation may cause. An illegal permutation
# changes it much more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Common names of MLP layers: the producers, then the consumer.
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
    rule = "must be True, False, or a sequence of tuples of at least two module names, the consumer last"
    if isinstance(permute, str) or not isinstance(permute, Sequence):
        raise TypeError(f"permute={permute!r}: {rule}")
    for chain in permute:
        if isinstance(chain, str) or not isinstance(chain, Sequence) or len(chain) < 2:
            raise TypeError(f"permute={permute!r}: {chain!r} is not such a tuple; {rule}")
        if not all(isinstance(name, str) for name in chain):
            raise TypeError(f"permute={permute!r}: {chain!r} is not such a tuple; {rule}")
    return tuple(tuple(chain) for chain in permute)


class Permuter:
    """Permutes the hidden channels of MLPs where that does not change the model's output.

    Args:
        plan: the layers; consumers with an n:m pattern are permuted.
        edits: records every change.
        run: gives the model's output on some data, to check that it does not change; or None.
    """

    def __init__(self, plan: Plan, edits: Edits, run: Callable[[], Any] | None) -> None:
        self._plan, self._edits, self._run = plan, edits, run
        self._layers = {name: layer for layer in plan.layers for name in layer.site.names}
        self._wanted = None if run is None else float_tensors(run())

    def permute(self, permute: bool | tuple[Names, ...]) -> None:
        """Permute the named chains of layers or, for True, all MLPs with known names. Sets the gain or a note of each.

        Raises:
            ValueError: a name is not that of a Linear layer.
        """
        chains = self._known() if permute is True else permute or ()
        for names in chains:
            for name in names:
                if name not in self._layers:
                    raise ValueError(f"permute: {name!r} is not a Linear layer of the model")
            producers, consumer = [self._layers[name] for name in names[:-1]], self._layers[names[-1]]
            why = self._why_not(producers, consumer) or self._apply(producers, consumer)
            if why is not None:
                consumer.notes.append(f"inputs not permuted: {why}")

    def _known(self) -> Iterator[Names]:
        for name, layer in self._layers.items():
            for *before, last in _KNOWN:
                prefix = name.removesuffix(last)
                names = tuple(prefix + one for one in before)
                if prefix != name and layer.reason is None and all(one in self._layers for one in names):
                    yield (*names, name)

    def _why_not(self, producers: Iterable[Layer], consumer: Layer) -> str | None:
        form = consumer.pattern.sparsity if consumer.pattern else None
        if not isinstance(form, NofM):
            return "not an n:m pattern"
        k = dense_weight(consumer.site.module).shape[1]
        for layer in (*producers, consumer):
            if layer.reason is not None:
                return f"{layer.site.name} is left alone"
            if layer.is_sparse:
                return f"{layer.site.name} is sparse already"
            if len(self._plan.owners[self._plan.group(layer.weight)]) > 1 or len(layer.site.places) > 1:
                return f"{layer.site.name} shares its weight"
            if layer is not consumer and dense_weight(layer.site.module).shape[0] != k:
                return f"{layer.site.name} has {dense_weight(layer.site.module).shape[0]} outputs for {k} inputs"
        return f"{k} inputs are not a multiple of {form.m}" if k % form.m else None

    def _apply(self, producers: Sequence[Layer], consumer: Layer) -> str | None:
        """Permute and record the gain; or return why the layers stay unchanged."""
        assert consumer.pattern is not None, "checked above"  # noqa: S101
        form = consumer.pattern.sparsity
        assert isinstance(form, NofM), "checked above"  # noqa: S101
        weight = dense_weight(consumer.site.module)
        order = search(weight, form)
        gain = kept_score(weight[:, order], form) / max(kept_score(weight, form), torch.finfo(torch.float64).tiny) - 1
        if gain <= _LEAST_GAIN:
            return "no order keeps more"
        trial = Edits()
        try:
            for layer in producers:
                self._reorder(trial, layer, order, 0)
            self._reorder(trial, consumer, order, 1)
            change = 0.0 if self._run is None else self._output_change()
        except BaseException:
            trial.undo()
            raise
        if change > _TOLERANCE[consumer.weight.dtype]:
            trial.undo()
            return f"the model's output changes by {change:.2g}: not only elementwise operations lie between the layers"
        self._edits.take(trial)
        consumer.permutation_gain = gain
        return None

    def _reorder(self, trial: Edits, layer: Layer, order: Tensor, side: int) -> None:
        """Permute the outputs (side 0) or inputs (side 1) of a layer."""
        module, weight = layer.site.module, layer.kind.weight
        reordered = weight.to_matrix(layer.weight.detach()).index_select(side, order)
        changes = {weight.key: weight.from_matrix(reordered, layer.weight.shape)}
        if side == 0 and weight.bias is not None and layer.bias is not None:
            changes[weight.bias] = layer.bias.detach()[order]
        for key, value in changes.items():
            old = module._parameters[key]
            assert old is not None, "read above"  # noqa: S101
            new = nn.Parameter(value, requires_grad=old.requires_grad)
            self._plan.replace_parameter(old, new)
            trial.put(module._parameters, key, new)

    def _output_change(self) -> float:
        assert self._run is not None, "checked by the caller"  # noqa: S101
        assert self._wanted is not None, "set with run"  # noqa: S101
        return output_change(float_tensors(self._run()), self._wanted)
