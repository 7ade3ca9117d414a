"""Linear kernels of this machine over random shapes, strides and addresses, against the float64 oracle's error bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.spec import KernelSpec
from ..ops import pack_as
from ..testing import checks
from ..testing.oracle import expected_output, random_weight, served_by
from ..weights.form import Form
from ..weights.scheme import Scheme, numbers_of
from .children import in_children, slices
from .figure import Tally, Trial
from .shapes import kernels_here

_LARGEST = 8192  # of n and k
_MOST = (10, 20)  # powers of two: of m * n * k, the limit that is drawn for each shape
_GUARD = 64  # values of poison before and after an output
_AHEAD = 64  # values, up to which the address of a tensor is moved

Kernels = list[tuple[KernelSpec, list[Scheme]]]


def dtype_pairs() -> dict[tuple[str, torch.dtype], Kernels]:
    """(how weights are stored, dtype of activations) -> the kernels of this machine, dense and sparse, each with its schemes.

    Weights that are stored alike are of one weight type: codes of 8, 4 or 3 bits, with a book, with levels.
    """
    found: dict[tuple[str, torch.dtype], Kernels] = {}
    for spec in kernels_here():
        if schemes := served_by(spec):
            for dtype in spec.act_dtypes:
                found.setdefault((numbers_of(spec.scheme)[0].name, dtype), []).append((spec, schemes))
    return found


def random_shapes(trial: Trial) -> Tally:
    """``count`` random shapes for each pair of weights and activations, each by a random kernel and scheme of it."""
    pairs = dtype_pairs()
    found = in_children(_random, [(trial.seed, begin, end) for begin, end in slices(trial.count)])
    found.on = {"pairs": len(pairs), "kernels": len({spec.name for kernels in pairs.values() for spec, _ in kernels})}
    return found


def _random(seed: int, first: int, last: int, say: Callable[[Tally], None]) -> None:
    """The shapes of these numbers, of each pair."""
    found = Tally()
    for (stored, dtype), kernels in dtype_pairs().items():
        for number in range(first, last):
            draw = random.Random(f"{stored} {dtype} {seed} {number}")  # noqa: S311
            spec, schemes = draw.choice(kernels)
            found.add(Product.drawn(spec, draw.choice(schemes), dtype, draw).wrong())
    say(found)


def sizes(subject: checks.Subject, draw: random.Random) -> tuple[int, int, int]:
    """m, n and k: the logarithm of each is uniform, and so is that of the limit of their product."""
    n, k, m = (int(2 ** draw.uniform(0, most)) for most in (13, 13, 8))
    m, limit = subject.tokens(m), 2 ** draw.uniform(*_MOST)
    while m * n * k > limit and n * k > 1:
        n, k = (n // 2, k) if n > k else (n, k // 2)
    return m, min(n, _LARGEST), min(k, _LARGEST)


def _moved(x: Tensor, draw: random.Random, apart: int) -> Tensor:
    """The same rows, ``apart`` values further from each other, from an address that is aligned to nothing but its dtype."""
    rows, k = x.shape
    ahead, row = draw.randrange(_AHEAD), k + apart
    held = torch.full((ahead + rows * row,), torch.nan, dtype=x.dtype)
    view = held[ahead:].view(rows, row)[:, :k]
    view.copy_(x)
    return view


@dataclass(frozen=True)
class Product:
    """A product: a kernel, a scheme of it, dtype of activations and output, sizes, and what else is drawn."""

    spec: KernelSpec
    scheme: Scheme
    dtype: torch.dtype
    shape: tuple[int, int, int]  # m, n, k
    seed: int
    has_bias: bool
    apart: int  # values between rows of the activations; 0: they are contiguous

    def __str__(self) -> str:
        m, n, k = self.shape
        drawn = f"bias={self.has_bias} apart={self.apart} seed={self.seed}"
        return f"{self.spec.name} {self.scheme} {self.dtype} m={m} n={n} k={k} {drawn}"

    @classmethod
    def drawn(cls, spec: KernelSpec, scheme: Scheme, dtype: torch.dtype, draw: random.Random) -> Product:
        """One with sizes and the rest drawn."""
        shape, apart = sizes(checks.Subject(spec, scheme), draw), draw.choice((0, draw.randrange(1, 9)))
        return cls(spec, scheme, dtype, shape, draw.getrandbits(31), draw.random() < 0.5, apart)

    def wrong(self) -> str | None:
        """What is wrong with the output; None: all of it is within the bounds, and nothing beyond it is written."""
        (m, n, k), draw = self.shape, random.Random(self.seed)  # noqa: S311
        quantized = random_weight(self.scheme, n, k, self.seed)
        x = _moved(checks.activations(m, k, self.dtype, self.seed), draw, self.apart)
        bias = None
        if self.has_bias:
            generator = torch.Generator().manual_seed(self.seed)
            bias = _moved(torch.randn(1, n, generator=generator).to(self.dtype), draw, 0)[0]
        form = Form.of(quantized.tensors(), self.scheme)
        packed = pack_as(quantized, form.of_layout(self.spec.layout), self.scheme, k)
        before = _GUARD + draw.randrange(_AHEAD)
        held = torch.full((before + m * n + _GUARD,), torch.nan, dtype=self.dtype)
        got = held[before : before + m * n].view(m, n)
        self.spec.plan(self.scheme, n, k, form)(x, packed, bias, got)
        right, bound = expected_output(self.spec, self.scheme, x, quantized, bias)
        within = int(((got.double() - right).abs() <= bound).sum())
        if within < m * n:
            return f"{self}: {m * n - within} of {m * n} outputs are wrong"
        if int(held.isnan().sum()) != len(held) - m * n:
            return f"{self}: writes beyond its output"
        return None
