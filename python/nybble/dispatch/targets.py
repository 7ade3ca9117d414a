"""What this machine is: which instruction sets and which GPU a kernel may use here, and why one is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from .. import native

CAP_VARIABLE = "NYBBLE_TARGET"


@dataclass(frozen=True)
class Target:
    """A level of hardware that kernels are written for: the CPU features that it needs, or a GPU's compute capability.

    exact: no other compute capability will do, since machine code for it (sm_90a) runs nowhere else.
    """

    name: str
    needs: tuple[str, ...] = ()
    gpu: bool = False
    capability: tuple[int, int] = (0, 0)
    exact: bool = False


_AVX2 = ("avx2", "fma", "f16c")
_AVX512VNNI = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")

# From the slowest to the fastest; the last ones are the CPU's.
TARGETS = (
    Target("torch"),
    Target("triton", gpu=True, capability=(8, 0)),  # bfloat16 and cp.async
    Target("sm80", gpu=True, capability=(8, 0)),
    Target("sm90", gpu=True, capability=(9, 0), exact=True),  # wgmma
    Target("scalar"),
    Target("avx2", _AVX2),
    Target("avxvnni", (*_AVX2, "avxvnni")),
    Target("avx512vnni", _AVX512VNNI),
    Target("avx512vbmi", (*_AVX512VNNI, "avx512vbmi", "avx512vbmi2")),
    Target("avx512bf16", (*_AVX512VNNI, "avx512bf16")),
)
NAMES = tuple(target.name for target in TARGETS)


@dataclass(frozen=True)
class Machine:
    """This CPU as nybble sees it.

    cpu: brand; features: what CPU and operating system offer; targets: usable here, the fastest last; missing: the
    others, each with the reason; cap: the value of NYBBLE_TARGET, if it is set.
    """

    cpu: str
    features: tuple[str, ...]
    targets: tuple[str, ...]
    missing: dict[str, str]
    cap: str | None


@lru_cache
def detect() -> Machine:
    """What this machine is; CPU and NYBBLE_TARGET are read once, at the first call.

    Raises:
        ValueError: NYBBLE_TARGET is not a target, or one that this machine lacks.
    """
    cap = os.environ.get(CAP_VARIABLE) or None
    if cap is not None and cap not in NAMES:
        raise ValueError(f"{CAP_VARIABLE}={cap!r}: must be one of {', '.join(NAMES)}")
    brand, features = native.cpu()
    usable, missing = [], {}
    for target in TARGETS:
        lacks = [feature for feature in target.needs if feature not in features]
        if target.gpu and (no_gpu := _why_no_gpu(target)):
            missing[target.name] = no_gpu
        elif lacks:
            missing[target.name] = f"this CPU or operating system lacks {', '.join(lacks)}"
        elif cap is not None and NAMES.index(target.name) > NAMES.index(cap):
            missing[target.name] = f"above {CAP_VARIABLE}={cap}"
        else:
            usable.append(target.name)
    if cap is not None and cap not in usable:
        raise ValueError(f"{CAP_VARIABLE}={cap!r}: {missing[cap]}")
    return Machine(brand, features, tuple(usable), missing, cap)


def _why_no_gpu(target: Target) -> str | None:
    """Why a GPU's kernels cannot run here; None if they can. Triton is looked for, not imported."""
    absent = []
    if not torch.cuda.is_available():
        absent.append("no CUDA device that torch can use")
    elif torch.version.hip is not None:
        absent.append("these kernels are for NVIDIA GPUs and were never run on an AMD one (this torch is for ROCm)")
    elif (unfit := _unfit_capability(target)) is not None:
        least = "{}.{}".format(*target.capability) + ("" if target.exact else " or higher")
        absent.append("needs compute capability {}, this GPU has {}.{}".format(least, *unfit))
    if target.name == "triton" and find_spec("triton") is None:
        absent.append("triton is not installed")
    return "; ".join(absent) or None


def _unfit_capability(target: Target) -> tuple[int, int] | None:
    """The first compute capability among the GPUs that the target cannot use: a kernel must run on all of them."""
    for capability in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())):
        if capability != target.capability if target.exact else capability < target.capability:
            return capability
    return None
