"""torch.nn.Embedding and torch.nn.EmbeddingBag with an integer weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .. import layouts, lookup, ops
from ..dispatch.explanation import Explanation
from ..dispatch.spec import Problem
from ..weights.activations import ActScale
from ..weights.form import Form
from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .module import QuantizedModule

if TYPE_CHECKING:
    from typing_extensions import Self

# What tables of nn.Embedding have that ours do not, and the value with which it does nothing.
_OPTIONS = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


def scheme_for(scheme: Scheme) -> Scheme:
    """The scheme of a table where another is asked for: the same weights, without activations."""
    return scheme.without_activations


def why_not(dense: nn.Module) -> str | None:
    """Why a dense table cannot be replaced, or None."""
    for name, value in _OPTIONS.items():
        found = getattr(dense, name)
        if found != value:
            return f"has {name}={found}, which changes or trains its weight"
    return None


def why_no_rows(dense: nn.Module) -> str | None:
    """Why calibration data says nothing about the weight."""
    return "its rows are read, not multiplied"


class _Table(QuantizedModule):
    """Rows of an integer weight (num_embeddings, embedding_dim) by their numbers."""

    takes_rows: ClassVar[bool] = False
    reads_all: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: str | Scheme,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        parsed = Scheme.parse(scheme)
        if parsed.act_type.quantized:
            rule = f"has no activations to quantize; use {str(parsed.without_activations)!r}"
            raise ValueError(f"scheme={str(parsed)!r}: {type(self).__name__} {rule}")
        super().__init__(num_embeddings, embedding_dim, False, parsed, device, dtype)
        self._scheme_name = str(parsed)

    @property
    def num_embeddings(self) -> int:
        """Rows of the weight."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the weight."""
        return self.in_features

    @classmethod
    def on_meta(cls, out_features: int, in_features: int, scheme: str | Scheme, dtype: torch.dtype) -> Self:
        """As QuantizedModule.on_meta."""
        return cls(out_features, in_features, scheme=scheme, device="meta", dtype=dtype)

    @classmethod
    def _of_dense(cls, dense: nn.Embedding | nn.EmbeddingBag, scheme: str | Scheme, method: str) -> Self:
        why = why_not(dense)
        if why is not None:
            raise ValueError(f"dense: {why}")
        return cls.from_weight(dense.weight, None, scheme, method).adopt(dense).train(dense.training)

    def _packed_form(self, quantized: QuantizedWeight, act: ActScale | None) -> tuple[Tensor, str]:
        layout = Form.of(quantized.tensors(), self.scheme).of_layout(layouts.PLAIN)
        return ops.pack_as(quantized, layout, self.scheme, self.in_features), layout

    def reads(self, layout: str, device: str) -> bool:
        """As PackedModule.reads."""
        try:
            lookup.kernel_for(self.scheme, layout, device)
        except ValueError:
            return False
        return True

    def explain(self, m: int = 1, verbose: bool = False) -> Explanation:
        """Which kernel reads the rows of m ids, and why each other does not. Raises ValueError if m is below 1."""
        if m < 1:
            raise ValueError(f"m={m!r}: must be at least 1")
        problem = Problem(
            self.scheme, m, self.out_features, self.in_features, self.dtype, self.device.type, layout=self.layout
        )
        return replace(lookup.explain(problem), verbose=verbose)

    def _copy_into(self, dense: nn.Module) -> nn.Module:
        dense.weight = nn.Parameter(self.dequantized_weight(), requires_grad=False)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        more = "".join(f", {name}={getattr(self, name)}" for name in self.settings)
        return f"{self.num_embeddings}, {self.embedding_dim}{more}, scheme={self.scheme}"


class Embedding(_Table):
    """Rows of an integer weight by their ids: a drop-in for torch.nn.Embedding.

    A row is (code - zero point) * scale, computed in float32 and rounded to the module's dtype. In memory the weight lies
    row by row; that of a module tied to a ``Linear`` (see ``tie_to``) is the one that the Linear multiplies with.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in nn.Embedding. Nothing is trained, so padding_idx has no effect.
        scheme: name or Scheme, without activations: "w8a16", "w4a16g128".
        device: of the weight.
        dtype: of the output.

    Raises:
        ValueError: an unknown scheme, one with activations, or a shape that the scheme cannot hold.
    """

    settings: ClassVar[tuple[str, ...]] = ("padding_idx",)
    padding_idx: int | None
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scheme: str | Scheme = "w8a16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, device, dtype)
        self.padding_idx = _checked_padding(padding_idx, num_embeddings)

    @classmethod
    def from_dense(cls, dense: nn.Embedding, scheme: str | Scheme = "w8a16", method: str = "rtn") -> Self:
        """A table with the rounded weight of a dense one, which does not change.

        Raises:
            TypeError: not an nn.Embedding.
            ValueError: as ``from_weight``, or the dense one has max_norm, or trains in a way of its own.
        """
        if not isinstance(dense, nn.Embedding):
            raise TypeError(f"dense: must be a torch.nn.Embedding, got {type(dense).__name__}")
        return cls._of_dense(dense, scheme, method)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...), int32 or int64 -> (..., embedding_dim) in the module's dtype.

        Raises IndexError for an id that is no row; see lookup.embedding.
        """
        # Straight from the dictionaries: nn.Module's attribute lookup costs as much as reading a few rows.
        packed, layout = self._buffers["packed"], self.layout
        if packed is None or layout is None:
            if self.device.type == "meta":
                return torch.empty((*ids.shape, self.embedding_dim), dtype=self.dtype, device="meta")
            packed, layout = self._pack()
        return lookup.embedding(ids, packed, self._scheme_name, layout, self.out_features, self.in_features, self.dtype)

    def reader(self) -> lookup.Reader:
        """What reads rows of the weight as it is now, on the CPU."""
        packed, layout = self._pack()
        table = self._scheme_name, layout, self.out_features, self.in_features
        return lookup.Reader(packed, table, self.dtype)

    def example(self, m: int) -> Tensor:
        """As QuantizedModule.example: m ids."""
        return torch.randint(self.num_embeddings, (m,), generator=torch.Generator().manual_seed(0))

    def dequantize(self) -> nn.Embedding:
        """A dense nn.Embedding with the rounded weight."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta", dtype=self.dtype)
        self._copy_into(dense)
        return dense


class EmbeddingBag(_Table):
    """Sums, means or maxima of rows of an integer weight: a drop-in for torch.nn.EmbeddingBag.

    They are computed in float32, in the order of the ids, and rounded once to the module's dtype. Gradients flow to
    per_sample_weights alone.

    Args:
        num_embeddings, embedding_dim, mode, include_last_offset, padding_idx: as in nn.EmbeddingBag.
        scheme, device, dtype: as in ``Embedding``.

    Raises:
        ValueError: as ``Embedding``, or an unknown mode.
    """

    settings: ClassVar[tuple[str, ...]] = ("mode", "include_last_offset", "padding_idx")
    mode: str
    include_last_offset: bool
    padding_idx: int | None
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        scheme: str | Scheme = "w8a16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, device, dtype)
        if mode not in lookup.MODES:
            raise ValueError(f"mode={mode!r}: must be one of {lookup.MODES}")
        self.mode, self.include_last_offset = mode, include_last_offset
        self.padding_idx = _checked_padding(padding_idx, num_embeddings)

    @classmethod
    def from_dense(cls, dense: nn.EmbeddingBag, scheme: str | Scheme = "w8a16", method: str = "rtn") -> Self:
        """As Embedding.from_dense, of an nn.EmbeddingBag."""
        if not isinstance(dense, nn.EmbeddingBag):
            raise TypeError(f"dense: must be a torch.nn.EmbeddingBag, got {type(dense).__name__}")
        return cls._of_dense(dense, scheme, method)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag: ids (bags, length), or (count,) with the offset of each bag -> (bags, embedding_dim).

        Raises IndexError for an id that is no row, ValueError for what does not fit; see lookup.embedding_bag.
        """
        offsets = self._offsets(ids, offsets)
        if per_sample_weights is not None:
            if per_sample_weights.shape != ids.shape:
                raise ValueError(
                    f"per_sample_weights: shape {tuple(per_sample_weights.shape)}, must be that of ids, "
                    f"{tuple(ids.shape)}"
                )
            per_sample_weights = per_sample_weights.reshape(-1)
        padding = -1 if self.padding_idx is None else self.padding_idx
        packed, layout = self._buffers["packed"], self.layout
        if packed is None or layout is None:
            if self.device.type == "meta":
                return torch.empty((len(offsets) - 1, self.embedding_dim), dtype=self.dtype, device="meta")
            packed, layout = self._pack()
        table = packed, self._scheme_name, layout, self.out_features, self.in_features, self.dtype
        return lookup.embedding_bag(ids.reshape(-1), offsets, per_sample_weights, *table, self.mode, padding)

    def _offsets(self, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """Where each bag begins, and where the last one ends."""
        if ids.dim() == 2 and offsets is None:
            bags, length = ids.shape
            return torch.arange(bags + 1, device=ids.device) * length
        if ids.dim() != 1 or offsets is None:
            given = "None" if offsets is None else "given"
            raise ValueError(
                f"ids: shape {tuple(ids.shape)} with offsets {given}; must be (bags, length) without, or (count,) with"
            )
        if self.include_last_offset:
            return offsets
        return torch.cat((offsets, offsets.new_full((1,), ids.shape[0])))

    def example(self, m: int) -> Tensor:
        """As QuantizedModule.example: m bags of eight ids."""
        return torch.randint(self.num_embeddings, (m, 8), generator=torch.Generator().manual_seed(0))

    def dequantize(self) -> nn.EmbeddingBag:
        """A dense nn.EmbeddingBag with the rounded weight."""
        dense = nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            device="meta",
            dtype=self.dtype,
        )
        self._copy_into(dense)
        return dense


def _checked_padding(padding_idx: int | None, num_embeddings: int) -> int | None:
    """padding_idx counted from the first row, as torch holds it."""
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx={padding_idx}: must be in [{-num_embeddings}, {num_embeddings})")
    return padding_idx % num_embeddings
