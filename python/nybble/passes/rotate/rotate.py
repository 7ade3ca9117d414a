"""Rotate the residual stream of a transformer (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406).

With Q = H diag(+-1) / sqrt(n), the hidden states x become x Q. Layers that write them are multiplied by Q, layers that
read them by Q'. RMSNorm commutes with Q once its weight (or 1 + its weight) is fused into the layers that read it. The
values of each attention head are rotated too, by a Hadamard matrix of the head's size. Outlier channels are spread over
all channels, and the model does no extra work. The inputs of the MLP's last layer are not rotated: that would need a
transform at run time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model.batches import check_batches, model_calls
from ...model.stages import eval_mode
from ...model.walk import Edits
from ...nn import Linear
from ...parallel.calibration import check_alone
from ...text import Part, Shown
from ...weights.scheme import Scheme
from ..build import check_model
from ..layerwise.errors import float_tensors, output_change, relative_error
from ..model_copy import ModelCopy
from .hadamard import base_of, transform
from .llama import Llama, find

_ROWS = 256  # of each layer's input, for measuring errors
# The largest relative change of the model's output that is accepted, by the dtype of its weights.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Rotation(Shown):
    """The result of ``rotate``. ``seed``: of the random signs; None if the model was not rotated, for a ``reason``.

    ``moved``: the relative change of the model's output. ``error_before``, ``error``: the mean relative output error of
    its layers, rounded to nearest, without and with the rotation.
    """

    seed: int | None
    reason: str | None = None
    moved: float | None = None
    error_before: float | None = None
    error: float | None = None

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""
        if self.seed is None:
            return [f"not rotated: {self.reason}"]
        before, after = (100 * (error or 0.0) for error in (self.error_before, self.error))
        errors = f"mean output error of the layers {before:.2f} % -> {after:.2f} %"
        return [f"rotated with seed {self.seed}: {errors}, the model's output changed by {self.moved:.2g}"]

    def to_json(self) -> str:
        """Every field as strict JSON."""
        return json.dumps({"schema": "nybble.rotation/1", **asdict(self)}, indent=2, allow_nan=False)


def rotate(
    model: nn.Module, scheme: str | Scheme = "w4a8g128", *, calibration: Iterable[Any], seeds: int = 8
) -> Rotation:
    """Rotate a Llama-like model in place so that quantization costs less accuracy. Its output does not change.

    Tries several random sign vectors and takes the one with the smallest rounding error. A head that shares its weight
    with the embedding is untied. If the output changes or no rotation helps, the model is left unchanged.

    Args:
        model: with the module names of transformers' Llama, dense weights and RMSNorms, which may multiply by
            1 + weight as Gemma's do. Blocks with norms of their layers' outputs (Gemma 2 and 3) are refused.
        scheme: the scheme that the layers will be quantized to.
        calibration: calibration batches as in ``quantize``; only the first is used.
        seeds: how many sign vectors to try.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model is not in Llama form.
    """
    check_model(model)
    numbers = Scheme.parse(scheme)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise ValueError(f"seeds={seeds!r}: must be an int of at least 1")
    batches = check_batches(calibration, model)
    if batches is None:
        raise ValueError("calibration=None: needs at least one batch")
    check_alone("calibration")
    parts = find(model)
    width = parts.embedding.embedding_dim
    if base_of(width) is None:
        return Rotation(None, f"no Hadamard matrix of order {width} is implemented")
    edits = Edits()
    try:
        with torch.inference_mode(False), torch.no_grad(), eval_mode(model):
            found = _best(model, parts, numbers, batches, seeds, edits)
    except BaseException:
        edits.undo()
        raise
    if found.seed is None:
        edits.undo()
    return found


def rotated(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model, rotated with a seed; it shares the tensors that do not change. Raises ValueError."""
    copied = ModelCopy(model).model
    with torch.no_grad():
        turn(copied, find(copied), seed, Edits())
    return copied


def _best(model: nn.Module, parts: Llama, scheme: Scheme, batches: Sequence[Any], seeds: int, edits: Edits) -> Rotation:
    run = model_calls(model, batches[:1])[0][0]
    wanted = float_tensors(run())
    before = _error(parts, run, scheme)
    errors = []
    for seed in range(seeds):
        trial = Edits()
        try:
            turn(model, parts, seed, trial)
            errors.append(_error(parts, run, scheme))
        finally:
            trial.undo()
    seed = min(range(seeds), key=errors.__getitem__)
    if not errors[seed] < before:
        return Rotation(None, "no rotation lowers the rounding error of the layers", None, before, errors[seed])
    turn(model, parts, seed, edits)
    change = output_change(float_tensors(run()), wanted)
    if not change <= _TOLERANCE[parts.embedding.weight.dtype]:
        return Rotation(None, f"the model's output changes by {change:.2g}", change, before, errors[seed])
    return Rotation(seed, None, change, before, errors[seed])


def turn(model: nn.Module, parts: Llama, seed: int, edits: Edits) -> None:
    """Fuse the norms and rotate with a seed; ``edits`` records each change. Products are computed in float64."""
    width = parts.embedding.embedding_dim
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    new: dict[tuple[nn.Module, str], Tensor] = {}

    def read(module: nn.Module, key: str = "weight") -> Tensor:
        held = module._parameters[key]
        assert held is not None, "checked by the caller"  # noqa: S101
        return new.get((module, key), held.detach().double())

    for norm, layers, one_plus in parts.readers:
        gain = read(norm) + float(one_plus)
        for layer in layers:
            new[layer, "weight"] = transform(read(layer) * gain) * signs
        new[norm, "weight"] = torch.full_like(gain, 1 - float(one_plus))
    new[parts.embedding, "weight"] = transform(read(parts.embedding)) * signs
    for layer in parts.writers:
        new[layer, "weight"] = (transform(read(layer).T) * signs).T
        if layer.bias is not None:
            new[layer, "bias"] = transform(read(layer, "bias")) * signs
    if parts.head_size is not None and base_of(parts.head_size) is not None:
        for values, output in parts.values:
            new[values, "weight"] = _by_head(read(values).T, parts.head_size).T
            if values.bias is not None:
                new[values, "bias"] = _by_head(read(values, "bias"), parts.head_size)
            new[output, "weight"] = _by_head(read(output), parts.head_size)
    for (module, key), value in new.items():
        old = module._parameters[key]
        assert old is not None, "read above"  # noqa: S101
        held = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        edits.put(module._parameters, key, held)
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        edits.put(vars(config), "tie_word_embeddings", False)


def _by_head(x: Tensor, size: int) -> Tensor:
    return transform(x.unflatten(-1, (-1, size))).flatten(-2)


def _error(parts: Llama, run: Any, scheme: Scheme) -> float:
    """The mean relative output error of the layers, rounded to nearest, on some rows of their inputs."""
    rows: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows[layer] = args[0].reshape(-1, args[0].shape[-1])[:_ROWS].float()

    with contextlib.ExitStack() as hooks:
        for layer in parts.layers():
            hooks.callback(layer.register_forward_pre_hook(see).remove)
        run()
    errors = [
        relative_error(Linear.from_weight(layer.weight.float(), None, scheme.dynamic)(x), x @ layer.weight.float().T)
        for layer, x in rows.items()
        if isinstance(layer, nn.Linear)
    ]
    return sum(errors) / len(errors)
