"""Schemes: the types of weights and activations, how their scales are shared, and which weights are zero."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from .activation_type import ActivationType, activation_types
from .sparsity import Block, Sparsity, parse_name
from .weight_type import WeightType, weight_types

_MOST_INT32 = 2**31 - 1

_NAME = re.compile(
    r"(?P<sparsity>sp\d{1,2}|sp\d{1,3}of\d{1,3}|bs\d{1,3}x\d{1,3})?w(?P<weight>[1-9]\d?)(?P<book>[b-z]*)a(?P<act>[1-9]\d?)"
    r"(?:g(?P<group>[1-9]\d{0,4}))?(?P<asymmetric>asym)?(?P<static>static)?(?P<ordered>order)?"
)
_FAMILY = re.compile(r"(?:sp|bs)?(w\d+[b-z]*)a(\d+)")


@dataclass(frozen=True)
class Scheme:
    """Quantized weights, with float or quantized activations.

    Args:
        weight_bits: 8 (int8 codes; scales in float32, or, of other libraries, in bfloat16 or float16), 4 (codes in [-8, 7];
            scales in bfloat16, or, of other libraries, in float16 or float32), 16 (bfloat16 weights, for 2:4 sparsity with float activations), or what a plug-in adds.
        act_bits: 16 (float activations), 8 (codes in [-128, 127] with a scale and a zero point) or, with 8-bit weights,
            7 (codes in [-64, 63]: faster on CPUs without VNNI).
        group_size: number of inputs that share a scale: 16, 32, 64 or 128, for 4-bit weights and dense 8-bit ones; None: all inputs.
        symmetric: False: each group has its own zero point, for dense 4-bit and 8-bit weights.
        sparsity: the pattern of the zero weights, which are not stored; None: a dense weight. Sparse weights are
            symmetric. Blocks need 8-bit weights and 8-bit activations, and no sparse weight goes with 7-bit activations.
        static: True: quantized activations have one scale and one zero point for the layer, found by calibration. False
            (dynamic): one for each token, found at run time.
        ordered: True: the columns of the weight are in an order of their own, in which groups have similar columns (act-order);
            the tensor `order` has the input of each. For dense weights.
        book: "nf" where the codes of 4-bit weights index a table of 16 values, such as that of NF4; for float activations.

    Raises:
        ValueError: an unsupported combination.
    """

    weight_bits: int
    act_bits: int
    group_size: int | None = None
    symmetric: bool = True
    sparsity: Sparsity | None = None
    static: bool = False
    ordered: bool = False
    book: str = ""

    def __post_init__(self) -> None:
        kinds = weight_types().values()
        if self.weight_bits not in {kind.bits for kind in kinds}:
            raise ValueError(f"weight_bits={self.weight_bits!r}: must be {_or(k.bits for k in kinds if not k.book)}")
        if f"w{self.weight_bits}{self.book}" not in weight_types():
            known = [kind.book for kind in kinds if kind.bits == self.weight_bits]
            raise ValueError(f"book={self.book!r}: must be {_or(map(repr, known))} with w{self.weight_bits}")
        if self.act_bits not in activation_types():
            raise ValueError(f"act_bits={self.act_bits!r}: must be {_or(activation_types())}")
        kind = self.weight_type
        if self.act_bits not in kind.act_bits:
            raise ValueError(f"act_bits={self.act_bits!r}: must be {_or(kind.act_bits)} with {kind.name}")
        if self.group_size is not None and self.group_size not in kind.group_sizes:
            allowed = f"None or one of {kind.group_sizes}" if kind.group_sizes else "None"
            raise ValueError(f"group_size={self.group_size!r}: must be {allowed} with {kind.name}")
        if self.group_size is not None and self.sparsity is not None and not kind.sparse_groups:
            raise ValueError(f"group_size={self.group_size!r}: must be None with sparse weights of {kind.bits} bits")
        if not self.symmetric and (kind.zero_point is None or self.sparsity is not None):
            why = kind.name if kind.zero_point is None else f"sparse weights ({self.sparsity})"
            raise ValueError(f"symmetric=False: {why} must be symmetric")
        if self.static and not self.act_type.quantized:
            raise ValueError("static=True: float activations (a16) have no scale; must be False")
        if self.ordered and self.sparsity is not None:
            raise ValueError(f"ordered=True: sparse weights ({self.sparsity}) have the order of their inputs")
        self._check_sparsity()

    def _check_sparsity(self) -> None:
        patterns = self.weight_type.patterns
        if self.sparsity is None:
            return
        if not self.act_type.sparse:
            raise ValueError(f"sparsity={self.sparsity}: must be None with {self.act_type.name}")
        if isinstance(self.sparsity, Block) and (Block not in patterns or self.act_bits != 8):
            raise ValueError(f"sparsity={self.sparsity}: blocks are for w8a8")
        if self.sparsity not in patterns and type(self.sparsity) not in patterns:
            allowed = _or(p.__name__ if isinstance(p, type) else p for p in (*patterns, None))
            raise ValueError(f"sparsity={self.sparsity}: must be {allowed} with {self.weight_type.name}")

    @classmethod
    def parse(cls, name: str | Scheme) -> Scheme:
        """The scheme of a name such as ``"w8a8"`` or ``"w4a16g128asym"``. A Scheme is returned unchanged.

        Raises:
            ValueError: not the name of a scheme. The message has the grammar.
            TypeError: neither a string nor a Scheme.
        """
        if isinstance(name, Scheme):
            return name
        if not isinstance(name, str):
            raise TypeError(f"scheme={name!r}: must be a string or a Scheme")
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"scheme={name!r}: not a scheme; use {grammar()}")
        group = match["group"]
        try:
            return cls(
                weight_bits=int(match["weight"]),
                act_bits=int(match["act"]),
                group_size=int(group) if group else None,
                symmetric=not match["asymmetric"],
                sparsity=parse_name(match["sparsity"]) if match["sparsity"] else None,
                static=bool(match["static"]),
                ordered=bool(match["ordered"]),
                book=match["book"],
            )
        except ValueError as error:
            raise ValueError(f"scheme={name!r}: not a scheme: {error}; use {grammar()}") from None

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        sparsity = "" if self.sparsity is None else str(self.sparsity)
        rest = f"{'' if self.symmetric else 'asym'}{'static' if self.static else ''}{'order' if self.ordered else ''}"
        return f"{sparsity}w{self.weight_bits}{self.book}a{self.act_bits}{group}{rest}"

    @property
    def weight_type(self) -> WeightType:
        """How its weights are rounded and stored."""
        return weight_types()[f"w{self.weight_bits}{self.book}"]

    @property
    def act_type(self) -> ActivationType:
        """Which codes its activations have, if any."""
        return activation_types()[self.act_bits]

    @property
    def family(self) -> str:
        """What a kernel is written for: the bits, after "sp" (zeros anywhere, or n:m) or "bs" (blocks) if sparse."""
        kind = "" if self.sparsity is None else "bs" if isinstance(self.sparsity, Block) else "sp"
        return f"{kind}w{self.weight_bits}{self.book}a{self.act_bits}"

    @property
    def dense(self) -> Scheme:
        """The same scheme with all weights stored."""
        return replace(self, sparsity=None)

    @property
    def dynamic(self) -> Scheme:
        """The same scheme with the scales of quantized activations found at run time."""
        return replace(self, static=False)

    @property
    def without_activations(self) -> Scheme:
        """The same weights with float activations."""
        return replace(self, act_bits=16, static=False)

    def shares_codes_of(self, other: Scheme) -> bool:
        """Whether a layer can use the weight of a layer of another scheme: it is that, or its weights without activations."""
        return self == other or (other.sparsity is None and self == other.without_activations)

    @property
    def max_in_features(self) -> int:
        """The largest K for which int32 accumulators cannot overflow."""
        act, kind = self.act_type, self.weight_type
        if not act.quantized:
            return _MOST_INT32
        largest = act.steps * kind.largest_step
        if not self.symmetric:  # codes, at most half the steps from 0, times codes less zero points
            largest = max(largest, (act.steps + 1) // 2 * (kind.ends[1] - kind.ends[0]))
        return _MOST_INT32 // largest

    def groups(self, in_features: int) -> int:
        """Number of scales of an output channel; the last group may be short."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def check_shape(self, out_features: int, in_features: int) -> None:
        """Raises ValueError where the scheme cannot hold an (out_features, in_features) weight."""
        for name, value in (("out_features", out_features), ("in_features", in_features)):
            if not 1 <= value <= _MOST_INT32:
                raise ValueError(f"{name}={value}: must be in [1, 2**31 - 1]")
        if out_features * in_features > 2**40:
            raise ValueError(f"out_features * in_features = {out_features * in_features}: must be at most 2**40")
        if in_features > self.max_in_features:
            raise ValueError(
                f"in_features={in_features}: must be at most {self.max_in_features}, "
                f"or the int32 accumulators of {self} could overflow"
            )


@lru_cache
def families() -> tuple[str, ...]:
    """The family of every scheme, see Scheme.family."""
    found = []
    for kind in weight_types().values():
        for act_bits in kind.act_bits:
            found.append(f"{kind.name}a{act_bits}")
            if set(kind.patterns) - {Block} and activation_types()[act_bits].sparse:
                found.append(f"sp{kind.name}a{act_bits}")
            if Block in kind.patterns and act_bits == 8:
                found.append(f"bs{kind.name}a{act_bits}")
    return tuple(found)


def numbers_of(family: str) -> tuple[WeightType, int]:
    """The type of the weights and the bits of the activations of a family.

    Raises:
        ValueError: an unknown family.
    """
    match = _FAMILY.fullmatch(family)
    if match is None or family not in families():
        raise ValueError(f"scheme={family!r}: must be one of the families {', '.join(families())}")
    return weight_types()[match[1]], int(match[2])


def activations_of(family: str) -> ActivationType:
    """The type of the activations of a family. Raises ValueError as numbers_of."""
    return activation_types()[numbers_of(family)[1]]


def grammar() -> str:
    """The names of schemes, for messages."""
    kinds = weight_types().values()
    names = _or(f"{kind.name}a{act_bits}" for kind in kinds for act_bits in sorted(kind.act_bits))
    groups = "; ".join(f"{k.name}: {_or(f'g{size}' for size in k.group_sizes)}" for k in kinds if k.group_sizes)
    asymmetric = _or(kind.name for kind in kinds if kind.zero_point is not None)
    static = _or(kind.name for kind in activation_types().values() if kind.quantized)
    return (
        f"{names}; after it a group size ({groups}), asym ({asymmetric}), static ({static}), order (columns "
        "in an order of their own): w4a16g128, w4a8g32asym, w8a8static, w4a16g128order; before it a pattern of zeros: sp50 (percent), sp24 (2:4), sp32of128 (n of m) or bs32x32 (blocks, "
        "w8a8): sp50w8a8"
    )


def _or(values: Iterable[object]) -> str:
    words = [str(value) for value in values]
    return " or ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)
