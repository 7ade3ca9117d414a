"""Messages between the ranks of torch.distributed: plain data and tensors, sent as bytes and never pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Message(NamedTuple):
    """``facts``: what JSON can hold. ``tensors``: on the CPU, of any dtype."""

    facts: Any = None
    tensors: Mapping[str, Tensor] = {}


class Ranks:
    """The ranks of a process group, which all make the same calls in the same order.

    Args:
        group: torch's process group; None: the default one.

    Raises:
        ValueError: torch.distributed is not initialized, this process is not in the group, or it sends no CPU tensors.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "share_batches: torch.distributed is not initialized; call torch.distributed.init_process_group('gloo') "
                "under torchrun first"
            )
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"group={group!r}: this process is not one of its ranks")
        backends = dist.get_backend_config(group)
        if "cpu:" not in backends:
            raise ValueError(f"group={group!r}: has the backends {backends}; must have one for the CPU, such as gloo")

    def send(self, source: int, message: Message | None) -> Message:
        """On every rank the message of rank ``source``, which alone need give one."""
        header = b""
        if message is not None and self.rank == source:
            specs = [[name, _name(one.dtype), list(one.shape)] for name, one in message.tensors.items()]
            header = json.dumps([message.facts, specs]).encode()
        size = self._broadcast(source, torch.tensor([len(header)]))
        text = torch.frombuffer(bytearray(header or int(size)), dtype=torch.uint8)
        facts, specs = json.loads(self._broadcast(source, text).numpy().tobytes())
        tensors = {}
        for name, dtype, shape in specs:
            if message is not None and self.rank == source:
                tensors[name] = message.tensors[name].detach().cpu().contiguous()
            else:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self._broadcast(source, tensors[name].reshape(-1).view(torch.uint8))
        return Message(facts, tensors)

    def gather(self, message: Message) -> list[Message]:
        """The messages of all ranks, in their order, on every rank."""
        return [self.send(source, message if source == self.rank else None) for source in range(self.count)]

    def agree(self, what: str, facts: str) -> None:
        """Raise ValueError on all ranks unless all have the same ``facts``; ``what`` says of what."""
        found = [message.facts for message in self.gather(Message(facts))]
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise ValueError(
                f"share_batches: all ranks must have the same {what}; rank 0 has {found[0]}, rank {other} has {found[other]}"
            )

    def _broadcast(self, source: int, tensor: Tensor) -> Tensor:
        """Fill a contiguous tensor with that of ``source``."""
        if tensor.numel():
            dist.broadcast(tensor, group=self._group, group_src=source)
        return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
