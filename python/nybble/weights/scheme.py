"""What the numbers of a layer mean: the integers of its weights and activations, how they are scaled, which are zero."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .sparsity import Block, NofM, Sparsity, parse_name

GROUP_SIZES = (32, 64, 128)

# Products of an activation, 255 steps from its zero point, and a code of 7 bits that an int32 holds without wrapping.
_MAX_INT8_PRODUCTS = 65_793

_NAME = re.compile(
    r"(?P<sparsity>sp\d{1,2}|sp\d{1,3}of\d{1,3}|bs\d{1,3}x\d{1,3})?w(?P<weight>4|8|16)a(?P<act>8|16)(?:g(?P<group>32|64|128))?(?P<asymmetric>asym)?"
    r"(?P<static>static)?"
)
_GRAMMAR = (
    "w8a8, w8a16, w4a8 or w4a16; the w4 ones may take g32, g64 or g128, then asym: w4a16g128, w4a8g32asym; "
    "the a8 ones may end in static: w8a8static; before it sp50 (percent of zeros), sp24 (2:4), sp32of128 or bs32x32 (blocks): sp50w8a8; "
    "sp24w16a16 has bfloat16 weights"
)


@dataclass(frozen=True)
class Scheme:
    """Weights as integers times scales, with float (16) or quantized (8) activations.

    Args:
        weight_bits: 8 (codes in [-127, 127], one float32 scale an output channel), 4 (codes in [-8, 7], bfloat16
            scales) or 16 (bfloat16 as they are, with a scale of 1; of 2:4 and float activations alone).
        act_bits: 16 (activations stay float) or 8 (codes in [-128, 127] with a scale and a zero point).
        group_size: inputs that share a scale: 32, 64 or 128; None: all of them. 4-bit weights alone.
        symmetric: zero is code 0; otherwise each group has its own zero point. 4-bit weights alone.
        sparsity: which weights are zero and take no memory; None: all are stored. Sparse weights are symmetric, and
            blocks have 8-bit weights and activations.
        static: 8-bit activations have one scale and zero point a layer, found in calibration; otherwise (dynamic) one
            a token, found as the layer runs.

    Raises:
        ValueError: a combination that nybble does not define.
    """

    weight_bits: int
    act_bits: int
    group_size: int | None = None
    symmetric: bool = True
    sparsity: Sparsity | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8, 16):
            raise ValueError(f"weight_bits={self.weight_bits!r}: must be 4, 8 or 16")
        if self.act_bits not in (8, 16):
            raise ValueError(f"act_bits={self.act_bits!r}: must be 8 or 16")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={self.group_size!r}: must be None or one of {GROUP_SIZES}")
        if self.weight_bits != 4 and (self.group_size is not None or not self.symmetric):
            raise ValueError(
                f"group_size={self.group_size!r}, symmetric={self.symmetric!r}: "
                f"{self.weight_bits}-bit weights are symmetric with one scale a channel"
            )
        if self.weight_bits == 16 and (self.act_bits != 16 or self.sparsity not in (None, NofM(2, 4))):
            raise ValueError("weight_bits=16: bfloat16 weights are for 2:4 with float activations, sp24w16a16")
        if self.sparsity is not None and not self.symmetric:
            raise ValueError(
                f"symmetric=False: {self.sparsity} weights are symmetric, or their zeros would have a code"
            )
        if isinstance(self.sparsity, Block) and (self.weight_bits, self.act_bits) != (8, 8):
            raise ValueError(f"sparsity={self.sparsity}: blocks are for w8a8")
        if self.static and self.act_bits != 8:
            raise ValueError("static=True: float activations (a16) have no scale; static ones are for a8")

    @classmethod
    def parse(cls, name: str | Scheme) -> Scheme:
        """The scheme of a name such as ``"w8a8"`` or ``"w4a16g128asym"``; a Scheme is returned as it is.

        Raises:
            ValueError: the name is not one of the grammar's.
            TypeError: neither a string nor a Scheme.
        """
        if isinstance(name, Scheme):
            return name
        if not isinstance(name, str):
            raise TypeError(f"scheme={name!r}: must be a string or a Scheme")
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"scheme={name!r}: not a scheme; use {_GRAMMAR}")
        group = match["group"]
        try:
            return cls(
                weight_bits=int(match["weight"]),
                act_bits=int(match["act"]),
                group_size=int(group) if group else None,
                symmetric=not match["asymmetric"],
                sparsity=parse_name(match["sparsity"]) if match["sparsity"] else None,
                static=bool(match["static"]),
            )
        except ValueError as error:
            raise ValueError(f"scheme={name!r}: {error}; use {_GRAMMAR}") from None

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        sparsity = "" if self.sparsity is None else str(self.sparsity)
        rest = f"{'' if self.symmetric else 'asym'}{'static' if self.static else ''}"
        return f"{sparsity}w{self.weight_bits}a{self.act_bits}{group}{rest}"

    @property
    def family(self) -> str:
        """What a kernel is written for: bits, and whether zeros are skipped one by one (sp) or in blocks (bs)."""
        kind = "" if self.sparsity is None else "bs" if isinstance(self.sparsity, Block) else "sp"
        return f"{kind}w{self.weight_bits}a{self.act_bits}"

    @property
    def dense(self) -> Scheme:
        """The scheme of the same numbers with all weights stored."""
        return replace(self, sparsity=None)

    @property
    def dynamic(self) -> Scheme:
        """The scheme of the same numbers whose activations, if they are quantized, have a scale for each token."""
        return replace(self, static=False)

    @property
    def max_in_features(self) -> int:
        """The largest K whose integer accumulators cannot wrap."""
        if self.act_bits == 8 and self.weight_bits == 8:
            return _MAX_INT8_PRODUCTS
        return 2**31 // (15 * 255) if self.act_bits == 8 else 2**31 - 1

    def groups(self, in_features: int) -> int:
        """Scales an output channel has; the last group may be short."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def check_shape(self, out_features: int, in_features: int) -> None:
        """Raises ValueError where the scheme cannot hold an (out_features, in_features) weight."""
        for name, value in (("out_features", out_features), ("in_features", in_features)):
            if not 1 <= value <= 2**31 - 1:
                raise ValueError(f"{name}={value}: must be in [1, 2**31 - 1]")
        if out_features * in_features > 2**40:
            raise ValueError(f"out_features * in_features = {out_features * in_features}: must be at most 2**40")
        if in_features > self.max_in_features:
            raise ValueError(
                f"in_features={in_features}: above {self.max_in_features}, "
                f"where the int32 accumulators of {self} could wrap"
            )
