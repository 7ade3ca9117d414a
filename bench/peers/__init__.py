"""Peers: linear layers of other libraries to compare with, one file per library."""

from __future__ import annotations

from fnmatch import fnmatchcase

from . import bitsandbytes, ggml, onnxruntime, openvino, scipy, torch_ao, torch_dense, torch_int, torch_sparse
from .peer import Peer

__all__ = ["PEERS", "Peer", "matching"]

PEERS: tuple[Peer, ...] = (
    *torch_dense.PEERS,
    *torch_int.PEERS,
    *torch_ao.PEERS,
    *onnxruntime.PEERS,
    *openvino.PEERS,
    *bitsandbytes.PEERS,
    *ggml.PEERS,
    *torch_sparse.PEERS,
    *scipy.PEERS,
)


def matching(pattern: str) -> tuple[Peer, ...]:
    """The peers whose name matches a glob; "none" matches nothing.

    Raises:
        ValueError: no peer matches.
    """
    found = tuple(peer for peer in PEERS if fnmatchcase(peer.name, pattern))
    if not found and pattern != "none":
        raise ValueError(f"--peers {pattern!r}: matches none of {', '.join(peer.name for peer in PEERS)}")
    return found
