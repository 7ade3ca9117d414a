"""The goals for GPUs against the machine code: a kernel that issues too many instructions cannot reach its goal."""

from __future__ import annotations

import pytest
import torch

from nybble import native
from nybble.bench import gpu_sass
from nybble.bench.gpu_goals import BF16, GOALS, Goal
from nybble.bench.weights import WeightKind
from nybble.dispatch import selection, targets
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import Problem

# An H100: multiprocessors, clocks a microsecond, instructions that one issues a clock, bytes a microsecond from memory.
MULTIPROCESSORS, CLOCK, ISSUES, MEMORY = 132, 1.7e3, 4, 3.0e6
# Of a layout: the type of its weights in the kernels' names.
WEIGHTS = {"frag4": "Frag4", "rows8": "Rows8", "quads4": "Quads4", "quads8": "Quads8", "quads16": "Quads16"}
MULTIPLY = ("HMMA.", "IMMA.")

pytestmark = [
    pytest.mark.skipif(gpu_sass.extension() is None, reason="needs the CUDA kernels: nvcc at build time"),
    pytest.mark.skipif(gpu_sass.cuobjdump() is None, reason="needs cuobjdump, of CUDA or of triton's wheel"),
]


@pytest.fixture(autouse=True)
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "detect", lambda: targets.Machine("", (), targets.names(), {}, None))


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    binary = gpu_sass.extension()
    assert binary is not None
    return gpu_sass.functions(binary, "sm_90a")


def kernel_of(goal: Goal) -> str:
    """The kernel that an H100 runs for a goal."""
    scheme = WeightKind.parse(goal.scheme).scheme
    problem = Problem(scheme, m=goal.m, n=goal.n, k=goal.k, dtype=torch.bfloat16, device="cuda")
    chosen = selection.explain(problem).kernel
    assert chosen is not None
    return chosen


OF_MMA = [goal for goal in GOALS if goal.over == BF16 and goal.m <= 192 and not goal.scheme.startswith("bs")]


@pytest.mark.parametrize("goal", OF_MMA, ids=lambda goal: goal.key)
def test_a_goal_is_within_what_its_instructions_allow(goal: Goal, compiled: dict[str, str]) -> None:
    name = kernel_of(goal)
    spec = next(spec for spec in specs() if spec.name == name)
    if spec.target != "sm80":
        pytest.skip(f"{name}: its loop is held by test_cuda_hopper.py and test_triton_aot.py")
    assert next(row for row in native.cuda_kernel_table() if row["name"] == name)["built"]
    of_tiles, eights = not name.endswith("_gemv"), 1
    if of_tiles:
        least = 1 if spec.scheme.endswith("a8") else 2
        most = 4 if spec.sparsity is not None else 8
        eights = next(size for size in (1, 2, 4, 8) if size >= least and (8 * size >= goal.m or size == most))
    found = loop_of(compiled, WEIGHTS[spec.layout], "S8" if spec.scheme.endswith("a8") else "Bf16", of_tiles, eights)
    # The warps of a block of 64 tokens unpack each weight twice; blocks beside each other do it again.
    times = (2 if eights == 8 else 1) * -(-goal.m // (8 * eights))
    tiles = goal.n * goal.k / 64**2 * times
    issued = tiles * found / ISSUES / MULTIPROCESSORS / CLOCK
    bits = WeightKind.parse(goal.scheme).scheme.weight_bits
    read = (
        goal.n * goal.k * (bits / 2 + 1 if spec.sparsity is not None else bits) / 8 / MEMORY
    )  # one bit: which are kept
    dense = 1.7 + 2 * goal.n * goal.k / (0.95 * MEMORY)
    assert goal.h100 <= dense / max(issued, read), f"{issued:.1f} us to issue, {read:.1f} us to read"


def loop_of(compiled: dict[str, str], weights: str, activations: str, of_tiles: bool, eights: int) -> float:
    """Instructions of a tile of 64 x 64 weights, in large groups and without zero points."""
    kind = "tiles_kernel" if of_tiles else "stream_kernel"
    form = {"Frag4": f"ILb1ELi1ELi{2 if activations == 'S8' else 1}EE", "Quads4": "ILi1EE"}.get(weights, "")
    end = f"ELi{eights}EEEv" if of_tiles else "EEEv"
    part = f"{kind}INS0_{len(weights)}{weights}{form}ENS0_{len(activations)}{activations}{end}"
    (sass,) = (sass for name, sass in compiled.items() if part in name)
    loop = next(loop for loop in gpu_sass.loops(sass) if any(m in text for text in loop for m in MULTIPLY))
    return len(loop) / (2 if (weights, activations) == ("Frag4", "S8") else 1)
