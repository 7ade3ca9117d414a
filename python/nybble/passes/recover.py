"""`nybble.recover`: reduce the error of quantized and pruned layers by distillation from the original model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, _moved
from ..model import options
from ..model.bar import bar
from ..model.batches import check_batches
from ..model.digest import data_sha256
from ..model.opened import is_open, opened
from ..model.stages import eval_mode
from ..parallel.calibration import check_alone
from .build import check_model
from .recovery.losses import LOSSES
from .recovery.report import Recovered
from .recovery.store import Store
from .recovery.work import Settings, Work


@_moved.renamed_arguments
def recover(
    model: nn.Module,
    reference: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 2,
    end_to_end_epochs: int = 2,
    learning_rate: float | None = None,
    loss: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Recovered:
    """Train the quantized and pruned layers of ``model`` in place to reproduce ``reference`` (distillation).

    First block by block (the largest ``nn.ModuleList`` of both models), then end to end. Each block first gets the
    least-squares scale and bias per output channel. Then Adam trains integer weights, scales and biases with the
    straight-through estimator (Bengio et al., arXiv:1308.3432; block by block as in EfficientQAT, arXiv:2407.11062).
    Pruned weights stay zero. Schemes, shapes and all other parameters do not change.

    Every eighth batch is held out, at most 16 of them (of fewer than eight batches, the last). The result of a stage is
    kept only if its held-out loss, measured on the real kernels, is lower than before. The blocks' results are kept only
    if the held-out loss of the whole model is lower too. ``torch.autocast`` makes training faster. A few hundred steps
    on fresh data help most.

    Args:
        model: holds ``nybble.nn.Linear`` and ``SparseLinear`` layers, or pruned ``nn.Linear`` layers (at least 5 % of
            the weights are zero).
        reference: the original model: dense layers under the same names. It is not changed and must not share modules
            with ``model``.
        data: at least two batches to call both models with. Each is a tensor, a tuple (positional arguments) or a dict
            (keyword arguments). Tokens outside ``attention_mask`` are ignored.
        epochs: passes over the data for each block; 0 skips the blocks.
        end_to_end_epochs: passes over the data for the whole model; 0 skips it.
        learning_rate: relative to the size of what it changes. None tries three in short runs, on the first block
            and on the whole model, and takes the best; for 200 steps or more, the largest that makes progress.
        loss: of the end-to-end stage: "kl" (of the outputs as logits), "mse" (relative to the reference's output) or
            "auto" (KL if the output has ``logits``).
        seed: of the order of batches.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.
        resume: a directory for finished stages. An interrupted run that is started again with the same models, data and
            settings reads them from there and gives bitwise the same result.

    Returns:
        A ``Recovered``: the held-out losses of each stage and of the whole model.

    Raises:
        TypeError, ValueError: an argument is wrong, or the models do not match. After any exception,
            ``KeyboardInterrupt`` included, the model is unchanged.
    """
    check_model(model)
    if not isinstance(reference, nn.Module):
        raise TypeError(f"reference={type(reference).__name__}: must be a torch.nn.Module")
    if set(model.modules()) & set(reference.modules()):
        raise ValueError("reference: shares modules with model; pass a copy made before quantization")
    options.check_progress(progress)
    options.check_choice("loss", loss, LOSSES)
    for name, value in (("epochs", epochs), ("end_to_end_epochs", end_to_end_epochs), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r}: must be an int of at least 0")
    if learning_rate is not None and not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < 1):
        raise ValueError(f"learning_rate={learning_rate!r}: must be in (0, 1)")
    batches = check_batches(data, model)
    if batches is None or len(batches) < 2:
        raise ValueError(f"data has {len(batches or ())} batches: must be at least 2, since one is held out")
    check_alone("data")
    training = {name: module.training for name, module in model.named_modules()}
    asked = Settings(epochs, end_to_end_epochs, learning_rate, loss, seed)
    # Leave the caller's inference mode: tensors made inside it can never be used by autograd.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        opened(reference, only=lambda names: is_open(model, names)),
        eval_mode(model),
        eval_mode(reference),
    ):
        store = None
        if resume is not None:
            states = [*model.state_dict().values(), *reference.state_dict().values()]
            store = Store(Path(resume), data_sha256([str(asked), __version__, states, batches]))
        work = Work(model, reference, batches, asked, store)
        try:
            with bar(work.count, progress) as advance:
                done = work.run(advance)
        except BaseException:
            work.undo()
            raise
    for name, module in model.named_modules():
        module.training = training[name]
    return done
