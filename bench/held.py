"""Runs that are held to AVX2 on a CPU that has more, so that it measures what a CPU without AVX-512 would.

Every library is held by an environment variable that it reads when it is loaded. A library without one is left out, unless
the user says by NYBBLE_BENCH_HELD that it is held in another way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import native
from .peers import Peer

# Read by nybble, by torch, by oneDNN, by FBGEMM (torch's engine "x86") and by MKL.
VARIABLES = {
    "NYBBLE_TARGET": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
# Libraries without a variable, by the module that a peer needs.
FREE = {
    "onnxruntime": "its kernels are chosen by CPUID alone",
    "openvino": "it asks CPUID itself, and most of its layers fail where its oneDNN is held",
    "llama_cpp": "its instruction set was chosen when it was compiled",
}
# Comma-separated modules of FREE that the user vouches for: held in another way.
VOUCHED = "NYBBLE_BENCH_HELD"
_MORE = ("avxvnni", "avx512f")


def needed() -> bool:
    """Whether this CPU has more than AVX2, so that a run must be held."""
    return any(feature in native.cpu()[1] for feature in _MORE)


def restart(argv: Sequence[str]) -> None:
    """Restarts this process with everything limited to AVX2; returns where that is so, or is not needed.

    Raises:
        ValueError: the CPU has no AVX2, or NYBBLE_BENCH_HELD names what is none of FREE.
    """
    unknown = [module for module in _vouched() if module not in FREE]
    if unknown:
        raise ValueError(f"{VOUCHED}={os.environ[VOUCHED]!r}: {', '.join(unknown)}: must be one of {', '.join(FREE)}")
    if "avx2" not in native.cpu()[1]:
        raise ValueError(f"--preset avx2-targets: this CPU ({native.cpu()[0]}) has no AVX2")
    if needed() and not _is_held():
        command = [sys.executable, "-m", "nybble.bench", *argv]
        os.execve(sys.executable, command, {**os.environ, **VARIABLES})  # noqa: S606 (this program itself)


def _is_held() -> bool:
    return all(os.environ.get(name) == value for name, value in VARIABLES.items())


def mark_if_held() -> dict[str, str]:
    """As mark, where the user has set the variables: any preset can be held so."""
    return mark() if _is_held() else {}


def mark() -> dict[str, str]:
    """What each line of a held run says: what holds it, and for which libraries that is the user's word."""
    if not needed():
        return {}
    return {
        "held": f"held to avx2 on {native.cpu()[0]}",
        **({"vouched": ", ".join(_vouched())} if _vouched() else {}),
    }


def told(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the lines of a run say about what held it, for a reader; "" where nothing did."""
    held = next((row for row in rows if "held" in row), {})
    vouched = f" ({held['vouched']} by other means, as {VOUCHED} says)" if "vouched" in held else ""
    return f"{held.get('held', '')}{vouched}"


def _vouched() -> list[str]:
    return [module for module in os.environ.get(VOUCHED, "").split(",") if module]


def admit(peers: Sequence[Peer]) -> tuple[Peer, ...]:
    """The peers, those that cannot be held with the reason."""
    return tuple(replace(peer, refused=_why_not(peer)) for peer in peers) if needed() else tuple(peers)


def _why_not(peer: Peer) -> str | None:
    module = next((module for module in peer.needs if module in FREE and module not in _vouched()), None)
    if module is None:
        return None
    return f"cannot be held to AVX2: {FREE[module]} ({VOUCHED}={module} says that it is held in another way)"
