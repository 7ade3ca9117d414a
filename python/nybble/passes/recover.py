"""Win back what quantization and pruning lost, from the model as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..model import options
from ..model.bar import bar
from ..model.batches import check_batches
from ..model.digest import data_sha256
from ..model.stages import calm
from .build import check_model
from .recovery.losses import LOSSES
from .recovery.report import Recovered
from .recovery.store import Store
from .recovery.work import Settings, Work


def recover(
    model: nn.Module,
    reference: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 2,
    end_to_end: int = 2,
    rate: float | None = None,
    loss: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Recovered:
    """Bring the quantized and pruned layers of ``model`` nearer to ``reference``, in place, by distillation.

    Block by block (the largest ``nn.ModuleList`` of both), then end to end: scale and bias of every output channel in
    closed form; then codes, scales and biases by Adam, with gradients straight through the rounding (Bengio et al.,
    arXiv:1308.3432; by blocks as in EfficientQAT, arXiv:2407.11062). A weight that is zero and not stored stays so.
    Schemes, shapes and all other parameters stay as they are.

    Every eighth batch is held out, sixteen at most (of fewer than eight, the last). What a stage has learned is kept
    only where the held-out loss of the layers as they run is lower than before, and that of all blocks only where the
    model's is. Under ``torch.autocast`` products are in its dtype, which makes it faster: a few hundred steps, each on
    other data, win back the most.

    Args:
        model: holds ``nybble.nn.Linear`` and ``SparseLinear`` layers, or ``nn.Linear`` layers of whose weights at least
            5 % are zero.
        reference: the model as it was: dense layers under the same names. It does not change, nor may it share modules
            with the model.
        data: at least two batches to call both with, each a tensor, a tuple (positional) or a dict (keywords). Tokens
            that ``attention_mask`` leaves out do not count.
        epochs: over the data, for each block; 0: no blocks.
        end_to_end: epochs of the whole model; 0: none.
        rate: relative size of a step; None: of three tried in short runs, of the first block and of the whole model, the
            best or, for 200 steps and more, the largest that gets somewhere.
        loss: end to end; "kl" of the outputs as logits, "mse" relative to the reference's, "auto": KL where the output
            names its logits.
        seed: of the order of batches.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.
        resume: a directory for the stages that are done. A run that was cut off, started again with the same models,
            data and settings, takes them from there and ends with the same bits.

    Returns:
        A ``Recovered``: the held-out losses of each stage and of the whole model.

    Raises:
        TypeError, ValueError: an argument is wrong, or the models do not fit each other. After any exception,
            ``KeyboardInterrupt`` included, the model is as it was.
    """
    check_model(model)
    if not isinstance(reference, nn.Module):
        raise TypeError(f"reference={type(reference).__name__}: wants a torch.nn.Module")
    if set(model.modules()) & set(reference.modules()):
        raise ValueError("reference: shares modules with the model; give a copy from before it was quantized")
    options.check_progress(progress)
    options.check_choice("loss", loss, LOSSES)
    for name, value in (("epochs", epochs), ("end_to_end", end_to_end), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r}: must be an int of at least 0")
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < 1):
        raise ValueError(f"rate={rate!r}: must be in (0, 1)")
    batches = check_batches(data, model)
    if batches is None or len(batches) < 2:
        raise ValueError("data: wants at least two batches, one being held out")
    training = {name: module.training for name, module in model.named_modules()}
    asked = Settings(epochs, end_to_end, rate, loss, seed)
    # a caller in inference mode must not get tensors that autograd can never use
    with torch.inference_mode(False), torch.no_grad(), calm(model), calm(reference):
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
