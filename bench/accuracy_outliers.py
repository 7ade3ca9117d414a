"""Channels of large inputs, as large language models have a few, put into a small one without a change of its function.

What a norm gives of a channel is multiplied, and what its readers weigh it by is divided. Sun et al. 2023 ("A simple and
effective pruning approach for large language models") prune by weights times inputs for the sake of such channels.
"""

from __future__ import annotations

import torch
from torch import nn

from ..passes.rotate.llama import find

FACTOR = 32.0  # a power of two: no bit of an output changes


def plant(model: nn.Module, channels: int) -> None:
    """Make outliers of the channels that the norms of the blocks let through most, the same of all norms, as Dettmers et
    al. 2022 (LLM.int8()) found them. model: in Llama form."""
    reads = [read for read in find(model).readers if all(layer is not model.lm_head for layer in read.layers)]
    weights = [(read, read.norm.get_parameter("weight")) for read in reads]
    with torch.no_grad():
        largest = torch.stack([weight.abs() for _, weight in weights]).mean(0).topk(channels).indices
        for read, weight in weights:
            weight[largest] *= FACTOR
            for layer in read.layers:
                layer.weight[:, largest] /= FACTOR
