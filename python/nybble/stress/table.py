"""The figures."""

from __future__ import annotations

from . import chaos, foreign, headers, hostile, hostile_cases, hostile_files, kills, random_shapes, shapes, soak
from .figure import Figure

FIGURES = (
    Figure(
        "shapes",
        "products of whole numbers are exact for every shape in [1..64]^3, by every kernel of this machine with integer sums, dense and"
        " sparse",
        shapes.SIDE**3,
        "shapes (each kernel counted)",
        shapes.cube,
        finite=True,
    ),
    Figure(
        "random-shapes",
        "outputs of random shapes, strides and addresses are within their error bounds, for each pair of weights and activations",
        100_000,
        "shapes",
        random_shapes.random_shapes,
    ),
    Figure(
        "headers",
        "damaged files of every format that nybble reads are read, or refused in words, with little memory and time",
        10_000_000,
        "damaged files",
        headers.mutated,
        ("safetensors",),
    ),
    Figure(
        "hostile",
        "files that were damaged or forged by hand are refused in two seconds, with the field named, and a model that was to be filled"
        " stays as it was",
        len(hostile_cases.CASES) + len(hostile_files.CASES),
        "files",
        hostile.refused,
        ("safetensors", "yaml"),
        finite=True,
    ),
    Figure(
        "kills",
        "a save that is killed at a random moment leaves the old checkpoint or the new one, whole, and the next save nothing else",
        100,
        "kills",
        kills.killed,
        ("safetensors",),
    ),
    Figure(
        "full-disk",
        "a save over a checkpoint, on a disk that gets full after a random number of bytes, leaves the old checkpoint and nothing else",
        50,
        "saves",
        kills.on_full_disk,
        ("safetensors",),
    ),
    Figure(
        "chaos",
        "gptq, sparsegpt, recover and plan: killed, interrupted, without disk or memory, and resumed, give the bits of an undisturbed"
        " run; what is interrupted leaves the model as it was",
        50,
        "moments (for each run and fault)",
        chaos.disturbed,
        ("safetensors",),
    ),
    Figure(
        "calls",
        "the memory of a process does not grow by calls, and each gives the same bits",
        100_000,
        "calls",
        soak.calls,
    ),
    Figure(
        "cycles",
        "the memory of a process does not grow by quantizing, saving and loading",
        200,
        "cycles",
        soak.cycles,
        ("safetensors",),
    ),
    Figure(
        "threads",
        "8 Python threads that call one model, from its first call on, get the bits of one thread",
        100_000,
        "calls",
        soak.threads,
    ),
    Figure(
        "foreign",
        "damages of checkpoints of other libraries are refused by name, or change no other weight than that of a bit",
        1_000,
        "damages (of each checkpoint)",
        foreign.mutated,
        ("safetensors",),
        "a directory of small checkpoints, such as tests/data/foreign",
    ),
)


def find(name: str) -> Figure:
    """The figure of this name. Raises ValueError."""
    found = next((figure for figure in FIGURES if figure.name == name), None)
    if found is None:
        raise ValueError(f"figure={name!r}: must be one of {', '.join(figure.name for figure in FIGURES)}")
    return found
