"""Named sets of weight shapes, (N, K): output and input features of the linear layers of known models."""

from __future__ import annotations

Shape = tuple[int, int]

# Without output heads, which would take longer than all the rest.
SETS: dict[str, tuple[Shape, ...]] = {
    "minilm": ((384, 384), (1536, 384), (384, 1536)),
    "bert-base": ((768, 768), (3072, 768), (768, 3072)),
    "vit-b": ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1000, 768)),
    "llama-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "qwen-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
    "odd": ((4095, 4097), (33, 4096), (4096, 70)),
    "avx2": (
        *((4096, 4096), (4096, 11008), (11008, 4096), (2048, 2048)),
        *((384, 384), (1536, 384), (384, 1536)),  # MiniLM's
    ),
    "targets": ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048)),
}


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Comma-separated names of sets and NxK pairs, each shape once, in order.

    Raises:
        ValueError: a part is neither, or a size is below 1.
    """
    found: list[Shape] = []
    for part in text.split(","):
        found.extend(SETS[part] if part in SETS else (_pair(part),))
    return tuple(dict.fromkeys(found))


def _pair(text: str) -> Shape:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"{text!r}: must be NxK or one of {', '.join(SETS)}")
    return int(sizes[0]), int(sizes[1])
