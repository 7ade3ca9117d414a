"""Whether two kinds of CPU compute the same.

    python tests/two_cpus.py write FILE      on one: products of 8-bit activations, and vectors of sentences, to a .npz
    python tests/two_cpus.py compare FILE    on the other: the products must have the same bits; prints the cosines

The products are of numbers that every CPU makes alike, and nothing but nybble computes them: schemes, dtypes, shapes with
tails, 1 to 17 rows. The vectors are those of all-MiniLM-L6-v2 in float32 and as `w8a8`; torch computes the rest of that model,
so they are only near.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

import nybble
from nybble.demo.data import all_sentences
from nybble.demo.model import embed, load
from nybble.dispatch import targets

SCHEMES = ("w8a8", "w8a8g32", "w8a8g32asym", "w4a8g32", "w4ka8g32", "w3a8g32")
# Scheme -> which weights are not zero, by output and input.
SPARSE = {
    "sp24w8a8": lambda n, k: k % 4 < 2,
    "sp50w8a8": lambda n, k: (n + k) % 2 == 0,
    "bs32x32w8a8": lambda n, k: (n // 32 + k // 32) % 2 == 0,
}
SHAPES = ((64, 128), (50, 160), (129, 384), (37, 150))
ROWS = (1, 4, 17)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SENTENCES = 12


def products() -> Iterator[tuple[str, np.ndarray]]:
    """The name and the bytes of each product."""
    for scheme in (*SCHEMES, *SPARSE):
        for n, k in SHAPES:
            random = np.random.RandomState(n + k)
            dense = torch.nn.Linear(k, n).eval()
            kept = SPARSE.get(scheme, lambda n, k: n >= 0)(*np.ogrid[:n, :k])
            with torch.no_grad():
                weight = random.randint(-127, 128, (n, k)) * kept
                dense.weight.copy_(torch.from_numpy(weight.astype(np.float32)) / 128)
                dense.bias.copy_(torch.from_numpy(random.randint(-127, 128, n).astype(np.float32)) / 8)
            inputs = torch.from_numpy(random.randint(-127, 128, (max(ROWS), k)).astype(np.float32)) / 64
            changed = (nybble.nn.SparseLinear if scheme in SPARSE else nybble.nn.Linear).from_dense(dense, scheme)
            for name, dtype in DTYPES.items():
                for rows in ROWS:
                    with torch.inference_mode():
                        y = changed(inputs[:rows].to(dtype)).contiguous()
                    yield f"{scheme}-{n}x{k}-{name}-{rows}", y.view(torch.uint8).numpy()


def vectors(sentences: list[str]) -> dict[str, np.ndarray]:
    """The vectors of the sentences, float32 [sentences, hidden], of the model as it is and as `w8a8`."""
    encoder = load()
    batches = encoder.tokenize(sentences, 16)
    dense = torch.cat([embed(encoder.model, batch) for batch in batches])
    nybble.quantize(encoder.model, "w8a8", goal="memory")
    changed = torch.cat([embed(encoder.model, batch) for batch in batches])
    return {"dense": dense.numpy(), "w8a8": changed.numpy()}


def write(path: Path) -> None:
    sentences = all_sentences()[:SENTENCES]
    found = {f"product-{name}": data for name, data in products()}
    texts = np.frombuffer("\n".join(sentences).encode(), np.uint8)
    np.savez(path, sentences=texts, **found, **vectors(sentences))
    print(f"{len(found)} products, {len(sentences)} sentences; targets: {' '.join(targets.detect().targets)}")


def compare(path: Path) -> None:
    with np.load(path, allow_pickle=False) as held:
        there: Mapping[str, np.ndarray] = dict(held)
    names, differ = 0, []
    for name, data in products():
        names += 1
        if not np.array_equal(data, there[f"product-{name}"]):
            differ.append(name)
    print(f"targets: {' '.join(targets.detect().targets)}\n{names} products, {len(differ)} differ: {' '.join(differ)}")
    here = vectors(there["sentences"].tobytes().decode().split("\n"))
    for title, a, b in (
        ("w8a8 here, float32 here", here["w8a8"], here["dense"]),
        ("w8a8 there, float32 there", there["w8a8"], there["dense"]),
        ("w8a8 here, w8a8 there", here["w8a8"], there["w8a8"]),
        ("float32 here, float32 there", here["dense"], there["dense"]),
    ):
        cosines = (a * b).sum(1)
        print(f"{title}: cosine {cosines.mean():.6f}, worst {cosines.min():.6f}")
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
