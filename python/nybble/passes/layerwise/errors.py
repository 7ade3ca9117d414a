"""Output errors: a replacement's output against that of the dense layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...model.eligible import bias_of, dense_weight
from ...nn.kinds import kind_of, matrix_layer
from ...nn.linear import Linear
from ...weights.scheme import Scheme


class Errors(NamedTuple):
    """Relative output errors; None without data.

    rounding: of the dense layer rounded to nearest. new: of the replacement.
    """

    rounding: float | None = None
    new: float | None = None


def output_errors(dense: nn.Module, new: nn.Module, scheme: Scheme | None, x: Tensor | None) -> Errors:
    """The errors on rows x (T, K) of ``new``, which replaces ``dense``.

    scheme: rounds the dense layer for comparison, with dynamic activations; None: no rounding.
    """
    if x is None or not len(x):
        return Errors()
    weight = dense_weight(dense)
    x = x.to(weight.dtype)
    wanted, found = matrix_layer(dense)(x), matrix_layer(new)(x)
    if scheme is None:
        return Errors(0.0, relative_error(found, wanted))
    rounded = Linear.from_weight(weight, bias_of(dense), scheme.dynamic)
    return Errors(relative_error(rounded(x), wanted), relative_error(found, wanted))


def weight_loss(weight: Tensor, new: Tensor, x: Tensor) -> float:
    """The squared change of the output for inputs x (T, K) if a weight (N, K) is replaced by ``new``."""
    return (x @ (weight.detach().float() - new.float()).T).double().square().sum().item()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in the Frobenius norm; 0 if both are 0."""
    difference = (found.double() - wanted.double()).norm().item()
    size = wanted.double().norm().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def float_tensors(output: Any) -> list[Tensor]:
    """The float tensors in the output of a model or a block."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def output_change(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative error of any tensor in ``found`` against its counterpart in ``wanted``."""
    return max((relative_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def dense_like(dense: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of a dense layer with this weight (N, K) and the same bias."""
    kind = kind_of(dense)
    return kind.dense_like(dense, weight, kind.bias_of(dense))
