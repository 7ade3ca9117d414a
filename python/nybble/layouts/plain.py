"""The layout plain: the portable tensors one after another, for the reference."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..weights.form import USUAL, Form
from ..weights.rounding import QuantizedWeight, portable_spec
from ..weights.scheme import Scheme
from .layout import Layout, Spec

PLAIN = "plain"


def _fill(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    return quantized.tensors()


def _collect(parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    return QuantizedWeight(**{name: part.clone() for name, part in parts.items()})


def _rows(parts: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return QuantizedWeight(**parts).rows(rows).tensors()


def _sections(form: Form, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    return portable_spec(scheme, out_features, in_features, form)


def _layout(form: Form) -> Layout:
    sections = partial(_sections, form)
    return Layout(form.of_layout(PLAIN), sections, _fill, _collect, form=form, rows=_rows, of_form=_layout)


LAYOUTS = (_layout(USUAL),)
