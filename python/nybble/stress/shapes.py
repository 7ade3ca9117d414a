"""Linear kernels of this machine over many shapes: each run by itself, whatever dispatch would choose."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import reference, registry, targets
from ..dispatch.spec import KernelSpec
from ..testing import checks
from ..testing.oracle import pack_for, random_weight, served_by
from ..weights.form import Form
from ..weights.scheme import Scheme
from .children import in_children, slices
from .figure import Tally, Trial

SIDE = 64
_POISON = 12345.0
_LARGEST, _MOST = 8192, 1 << 20  # of n and k; of m * n * k


def kernels_here() -> list[KernelSpec]:
    """The linear kernels that this machine can run, without the reference."""
    here = targets.detect().targets
    return [spec for spec in registry.specs() if spec.built and spec.target in here and spec.target != "torch"]


def cube(trial: Trial) -> Tally:
    """[1..64]^3 shapes of every kernel of integers, in a random order; ``count``: shapes of each kernel."""
    pairs = [(n, k) for n in range(1, SIDE + 1) for k in range(1, SIDE + 1)]
    random.Random(trial.seed).shuffle(pairs)  # noqa: S311
    pairs = pairs[: max(trial.count // SIDE, 1)]
    found = in_children(_cube, [(pairs[begin:end],) for begin, end in slices(len(pairs))])
    found.facts = {"kernels": sum(1 for spec in kernels_here() if spec.exact and _dense(spec))}
    return found


def _cube(pairs: list[tuple[int, int]], say: Callable[[Tally], None]) -> None:
    found = Tally()
    for spec in kernels_here():
        if spec.exact and (schemes := _dense(spec)):
            for n, k in pairs:
                rows = sum(map(spec.takes, range(1, SIDE + 1)))
                found.add(wrong_rows(spec, schemes[(n * SIDE + k) % len(schemes)], n, k), rows)
    say(found)


def _dense(spec: KernelSpec) -> list[Scheme]:
    return [scheme for scheme in served_by(spec) if scheme.sparsity is None]


def _whole_activations(scheme: Scheme, k: int) -> Tensor:
    """Rows (64, k) of integers whose codes are they themselves, since each row has the whole range; of K = 1, the ends."""
    act = scheme.act_type
    draw = torch.Generator().manual_seed(k)
    if k == 1:
        return (torch.randint(0, 2, (SIDE, 1), generator=draw) * 2.0 - 1) * act.steps
    x = torch.randint(act.lowest, act.highest + 1, (SIDE, k), generator=draw).float()
    x[:, k // 2], x[:, k // 2 - 1] = act.highest, act.lowest
    return x


def wrong_rows(spec: KernelSpec, scheme: Scheme, n: int, k: int) -> str | None:
    """What is wrong in products of 1 to 64 rows, as far as the kernel takes them, with a weight (n, k) of whole numbers; None: all are exact."""
    quantized = random_weight(scheme, n, k, n * SIDE + k, unit_scale=True)
    x = _whole_activations(scheme, k)
    bias = torch.arange(n).float() - n // 2 if (n + k) % 2 else None
    expected = reference.linear(x, quantized, bias, scheme, torch.float64)
    if expected.abs().max() >= 1 << 24:
        return f"{spec.name} {scheme} n={n} k={k}: float32 cannot hold the sums"
    right = expected.float()
    packed = pack_for(spec, quantized, scheme, k)
    plan = spec.plan(scheme, n, k, Form.of(quantized.tensors(), scheme))
    out, clean = torch.empty(SIDE + 1, n), torch.full((SIDE + 1, n), _POISON)
    for m in range(1, SIDE + 1):
        if not spec.takes(m):
            continue
        out.copy_(clean)
        plan(x[:m], packed, bias, out[:m])
        if not torch.equal(out[:m], right[:m]):
            return f"{spec.name} {scheme} m={m} n={n} k={k}: {int((out[:m] != right[:m]).sum())} outputs are wrong"
        if not torch.equal(out[m:], clean[m:]):
            return f"{spec.name} {scheme} m={m} n={n} k={k}: writes beyond its output"
    return None


def dtype_pairs() -> dict[tuple[str, torch.dtype], list[KernelSpec]]:
    """(family of schemes, dtype of activations) -> the kernels of this machine."""
    found: dict[tuple[str, torch.dtype], list[KernelSpec]] = {}
    for spec in kernels_here():
        for dtype in spec.act_dtypes:
            if served_by(spec):
                found.setdefault((spec.scheme, dtype), []).append(spec)
    return found


def random_shapes(trial: Trial) -> Tally:
    """``count`` random shapes for each pair of weights and activations, each by a random kernel."""
    pairs = list(dtype_pairs())
    parts = [
        (pairs[first::every], trial.count, trial.seed) for every in (len(slices(len(pairs))),) for first in range(every)
    ]
    found = in_children(_random, parts)
    found.facts = {"pairs": len(pairs), "shapes of a pair": trial.count}
    return found


def _random(pairs: list[tuple[str, torch.dtype]], count: int, seed: int, say: Callable[[Tally], None]) -> None:
    found, kernels = Tally(), dtype_pairs()
    for family, dtype in pairs:
        specs = kernels[family, dtype]
        schemes = {spec.name: served_by(spec) for spec in specs}
        draw = random.Random(f"{family} {dtype} {seed}")  # noqa: S311
        for _ in range(count):
            spec = draw.choice(specs)
            found.add(_wrong(checks.Subject(spec, draw.choice(schemes[spec.name])), dtype, draw))
    say(found)


def _sizes(subject: checks.Subject, draw: random.Random) -> tuple[int, int, int]:
    """m, n and k: the logarithm of each is uniform, and their product limited."""
    n = int(2 ** draw.uniform(0, 13))
    k = int(2 ** draw.uniform(0, 13))
    m = subject.tokens(int(2 ** draw.uniform(0, 8)))
    for _ in range(16):
        if m * n * k <= _MOST:
            break
        n, k = (n // 2 or 1, k) if n > k else (n, k // 2 or 1)
    return m, min(n, _LARGEST), min(k, _LARGEST)


def _strided(x: Tensor, draw: random.Random) -> Tensor:
    """The same rows in wider ones, from an address that is aligned to nothing but its dtype."""
    m, k = x.shape
    ahead, row = draw.randrange(64), k + draw.randrange(1, 9)
    held = torch.full((ahead + m * row,), torch.nan, dtype=x.dtype)
    view = held[ahead:].view(m, row)[:, :k]
    view.copy_(x)
    return view


def _wrong(subject: checks.Subject, dtype: torch.dtype, draw: random.Random) -> str | None:
    m, n, k = _sizes(subject, draw)
    seed = draw.getrandbits(31)
    quantized = random_weight(subject.scheme, n, k, seed)
    x = checks.activations(m, k, dtype, seed)
    if draw.random() < 0.5:
        x = _strided(x, draw)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(n, generator=generator).to(dtype) if draw.random() < 0.5 else None
    where = f"{subject.spec.name} {subject.scheme} {dtype} m={m} n={n} k={k} {x.stride()} bias={bias is not None} seed={seed}"
    try:
        got = subject.run(quantized, x, bias)
    except AssertionError as error:
        return f"{where}: {error}"
    right, bound = subject.expected(x, quantized, bias)
    count = int((~((got.double() - right).abs() <= bound)).sum())
    return f"{where}: {count} of {got.numel()} outputs are wrong" if count else None
