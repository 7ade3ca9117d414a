"""Adds outlier channels, which large language models have, to a small model without changing its function.

A norm's weight for a channel is multiplied, and the weights of the following layers are divided by the same factor. Sun
et al. 2023 ("A simple and effective pruning approach for large language models", Wanda) multiply weights by input norms
because of such channels.
"""

from __future__ import annotations

import torch
from torch import nn

from ..passes.rotate.llama import find

FACTOR = 32.0  # a power of two, so that outputs are unchanged bit for bit


def plant(model: nn.Module, channels: int) -> None:
    """Turns the channels with the largest norm weights into outliers, the same channels in all blocks, as observed by
    Dettmers et al. 2022 (LLM.int8()). model: with the structure of Llama."""
    reads = [read for read in find(model).readers if all(layer is not model.lm_head for layer in read.layers)]
    weights = [(read, read.norm.get_parameter("weight")) for read in reads]
    with torch.no_grad():
        largest = torch.stack([weight.abs() for _, weight in weights]).mean(0).topk(channels).indices
        for read, weight in weights:
            weight[largest] *= FACTOR
            for layer in read.layers:
                layer.weight[:, largest] /= FACTOR
