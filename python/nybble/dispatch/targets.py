"""What this machine is: which instruction sets and which GPU a kernel may use here, and why the others are missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from types import MappingProxyType

import torch

from .. import native, plugins

CAP_VARIABLE = "NYBBLE_TARGET"
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Target:
    """Hardware that kernels are written for: a row of the table.

    Args:
        name: unique in the table.
        needs: CPU features.
        gpu: whether it is a GPU's.
        capability: the least compute capability of the GPU.
        exact: no other compute capability will do, since machine code for it (sm_90a) runs nowhere else.
        module: a Python module that must be installed.
        compiles_on_first_call: whether its kernels are compiled when they are first called, for each dtype and scheme.
        wide_tiles: whether its kernels choose wider tiles for weights of many outputs.
        above: of a plug-in: the target of nybble that is just slower; "": the fastest of all.
        why_not: of a plug-in: the reason that it cannot be used here; None: it can.
    """

    name: str
    needs: tuple[str, ...] = ()
    gpu: bool = False
    capability: tuple[int, int] = (0, 0)
    exact: bool = False
    module: str = ""
    compiles_on_first_call: bool = False
    wide_tiles: bool = False
    above: str = ""
    why_not: Callable[[], str | None] | None = None

    def missing(self, features: tuple[str, ...], refused: Mapping[str, str] = _NOTHING) -> str | None:
        """Why it cannot be used on a machine whose CPU has these features; None if it can. refused: features that the
        operating system refuses, each with the reason."""
        lacks = [feature for feature in self.needs if feature not in features]
        reasons = [
            _why_no_gpu(self) if self.gpu else None,
            f"this CPU or operating system lacks {', '.join(lacks)}" if lacks else None,
            *(refused[feature] for feature in lacks if feature in refused),
            f"{self.module} is not installed" if self.module and find_spec(self.module) is None else None,
            self.why_not() if self.why_not is not None else None,
        ]
        return "; ".join(reason for reason in reasons if reason is not None) or None


_AVX2 = ("avx2", "fma", "f16c")
_AVX512BW = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512VNNI = (*_AVX512BW, "avx512vnni")

# From the slowest to the fastest; the last ones are the CPU's.
_BUILT_IN = (
    Target("torch"),
    # bfloat16 and cp.async
    Target("triton", gpu=True, capability=(8, 0), module="triton", compiles_on_first_call=True),
    Target("sm80", gpu=True, capability=(8, 0)),
    Target("sm90", gpu=True, capability=(9, 0), exact=True, wide_tiles=True),  # wgmma
    Target("scalar"),
    Target("avx2", _AVX2),
    Target("avxvnni", (*_AVX2, "avxvnni")),
    Target("avx512bw", _AVX512BW),
    Target("avx512vnni", _AVX512VNNI),
    Target("avx512vbmi", (*_AVX512VNNI, "avx512vbmi", "avx512vbmi2")),
    Target("avx512bf16", (*_AVX512VNNI, "avx512bf16")),
    Target("amx", (*_AVX512VNNI, "avx512bf16", "amx_tile", "amx_int8", "amx_bf16")),
    Target("neon", ("neon",)),
    Target("neondot", ("neon", "dotprod")),
    Target("i8mm", ("neon", "dotprod", "i8mm")),
    Target("neonbf16", ("neon", "bf16")),
)


@lru_cache
def table() -> tuple[Target, ...]:
    """Every target from the slowest to the fastest, with those of plug-ins.

    Raises:
        plugins.PluginError: a plug-in breaks a rule.
    """
    found = plugins.rows("nybble.targets", Target, _BUILT_IN, _misplaced)
    added = found[len(_BUILT_IN) :]
    ordered = [row for own in _BUILT_IN for row in (own, *(new for new in added if new.above == own.name))]
    return (*ordered, *(new for new in added if not new.above))


def _misplaced(target: Target) -> str | None:
    known = [row.name for row in _BUILT_IN]
    return None if target.above in ("", *known) else f"has above={target.above!r}: must be one of {', '.join(known)}"


@lru_cache
def names() -> tuple[str, ...]:
    """The names of all targets, from the slowest to the fastest."""
    return tuple(target.name for target in table())


@lru_cache
def find(name: str) -> Target:
    """The target of this name, which is in the table."""
    return next(target for target in table() if target.name == name)


@dataclass(frozen=True)
class Machine:
    """This machine as nybble sees it.

    cpu: brand; features: what CPU and operating system offer; targets: usable here, the fastest last; missing: the
    others, each with the reason; cap: the value of NYBBLE_TARGET, if it is set; caches: the bytes of each level.
    """

    cpu: str
    features: tuple[str, ...]
    targets: tuple[str, ...]
    missing: dict[str, str]
    cap: str | None
    caches: dict[str, int] = field(default_factory=dict)


@lru_cache
def detect() -> Machine:
    """What this machine is. The CPU, NYBBLE_TARGET and NYBBLE_CACHE are read once, at the first call.

    Raises:
        ValueError: NYBBLE_TARGET is not a target, or one that this machine lacks; NYBBLE_CACHE is not sizes of caches.
    """
    cap = os.environ.get(CAP_VARIABLE) or None
    if cap is not None and cap not in names():
        raise ValueError(f"{CAP_VARIABLE}={cap!r}: must be one of {', '.join(names())}")
    allowed = names() if cap is None else names()[: names().index(cap) + 1]
    brand, features, refused = native.cpu(any("amx_tile" in row.needs for row in table() if row.name in allowed))
    usable, missing = [], {}
    for target in table():
        reason = target.missing(features, refused)
        if reason is not None:
            missing[target.name] = reason
        elif target.name not in allowed:
            missing[target.name] = f"above {CAP_VARIABLE}={cap}"
        else:
            usable.append(target.name)
    if cap is not None and cap not in usable:
        raise ValueError(f"{CAP_VARIABLE}={cap!r}: {missing[cap]}")
    return Machine(brand, features, tuple(usable), missing, cap, native.caches()._asdict())


def _why_no_gpu(target: Target) -> str | None:
    """Why this machine has no GPU for a target; None if it has."""
    if not torch.cuda.is_available():
        return "no CUDA device that torch can use"
    if torch.version.hip is not None:
        return "these kernels are for NVIDIA GPUs and were never run on an AMD one (this torch is for ROCm)"
    unfit = _unfit_capability(target)
    if unfit is None:
        return None
    least = "{}.{}".format(*target.capability) + ("" if target.exact else " or higher")
    return "needs compute capability {}, this GPU has {}.{}".format(least, *unfit)


def _unfit_capability(target: Target) -> tuple[int, int] | None:
    """The first compute capability among the GPUs that the target cannot use: a kernel must run on all of them."""
    for capability in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())):
        if capability != target.capability if target.exact else capability < target.capability:
            return capability
    return None
