"""The table of module kinds: which dense layers nybble replaces, and with which of its modules.

A package adds kinds with an entry point of the group ``nybble.modules``, see ``nybble.plugins``:

    [project.entry-points."nybble.modules"]
    toy = "toy_package.kinds:TOY"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from .. import plugins
from ..weights.scheme import Scheme
from . import conv, embedding
from .composite import CompositeKind
from .experts import EXPERTS
from .linear import Linear
from .module import QuantizedModule
from .multihead import MULTIHEAD_KIND
from .recurrent import GRU_KIND, LSTM_KIND
from .sparse import SparseLinear


def _same(weight: Tensor) -> Tensor:
    return weight


def _as_it_is(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix


@dataclass(frozen=True)
class MatrixWeight:
    """A weight of a dense layer, and how it is read as a matrix (N, K): N outputs, K inputs.

    ``key`` is the name of the weight's parameter, ``bias`` that of the bias (N,), or None if the class has none.
    ``to_matrix`` gives the matrix, if possible as a view of the weight. ``from_matrix`` is the inverse: it takes the
    matrix and the weight's shape, and gives a contiguous tensor of that shape.
    """

    key: str = "weight"
    bias: str | None = "bias"
    to_matrix: Callable[[Tensor], Tensor] = _same
    from_matrix: Callable[[Tensor, torch.Size], Tensor] = _as_it_is


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _all_rows(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _as_asked(scheme: Scheme) -> Scheme:
    return scheme


def _never(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class ModuleKind:
    """A class of dense layers with one weight, and the modules that replace it.

    The dense layer computes with its weight and bias alone: it has no other state. Only instances of exactly the class
    are replaced. Those of a subclass stay, since they may do more. Modules with several weights are ``CompositeKind``s,
    see ``nn.composite``.

    Attributes:
        dense: the class, or its full name ("package.module.Class"), which saves importing it.
        module: replaces it under a dense scheme.
        sparse_module: replaces it under a sparse scheme; None if it cannot be sparse.
        weights: one ``MatrixWeight``.
        rows: for a dense or quantized layer and its input x, the rows (T, K) that the weight's matrix multiplies: what
            methods with calibration data learn from.
        why_no_rows: why there are no such rows for a layer, which is then rounded without data, or None.
        scheme_for: the scheme that these layers get where another is asked for, such as one with float activations.
        why_not: why a layer of the class cannot be replaced, whatever its weight, or None.
    """

    name: str
    dense: type[nn.Module] | str
    module: type[QuantizedModule]
    sparse_module: type[QuantizedModule] | None = None
    weights: tuple[MatrixWeight, ...] = (MatrixWeight(),)
    rows: Callable[[nn.Module, Tensor], Tensor] = _all_rows
    why_no_rows: Callable[[nn.Module], str | None] = _never
    scheme_for: Callable[[Scheme], Scheme] = _as_asked
    why_not: Callable[[nn.Module], str | None] = _never

    def __post_init__(self) -> None:
        if len(self.weights) != 1:
            raise ValueError(f"module kind {self.name!r}: weights must be one MatrixWeight, got {len(self.weights)}")
        for argument, cls, sparse in (("module", self.module, False), ("sparse_module", self.sparse_module, True)):
            if cls is not None and not (issubclass(cls, QuantizedModule) and cls.is_sparse is sparse):
                rule = f"must be a subclass of QuantizedModule with is_sparse = {sparse}"
                raise ValueError(f"module kind {self.name!r}: {argument}={cls.__name__} {rule}")

    def scheme_of(self, scheme: Scheme) -> Scheme:
        """``scheme_for``, without an order of the columns where the modules keep that of the inputs."""
        found = self.scheme_for(scheme)
        return found if self.module.takes_order else replace(found, ordered=False)

    @property
    def weight(self) -> MatrixWeight:
        """The only weight."""
        return self.weights[0]

    @property
    def modules(self) -> tuple[type[QuantizedModule], ...]:
        """The classes that replace the dense layer."""
        return (self.module,) if self.sparse_module is None else (self.module, self.sparse_module)

    def module_for(self, scheme: Scheme) -> type[QuantizedModule]:
        """The class that replaces the dense layer under a scheme. Raises ValueError if there is none."""
        found = self.module if scheme.sparsity is None else self.sparse_module
        if found is None:
            raise ValueError(f"scheme={str(scheme)!r}: nybble has no sparse {self.name}")
        return found

    @property
    def dense_name(self) -> str:
        """The full name of the dense class."""
        return self.dense if isinstance(self.dense, str) else _full_name(self.dense)

    @property
    def takes_rows(self) -> bool:
        """Whether the layers map rows (..., K) to (..., N)."""
        return self.module.takes_rows

    def replaces(self, cls: type) -> bool:
        """Whether this is exactly the dense class."""
        return _full_name(cls) == self.dense if isinstance(self.dense, str) else cls is self.dense

    def parameter_of(self, dense: nn.Module) -> nn.Parameter:
        """The weight of a dense layer as the layer holds it."""
        return cast(nn.Parameter, getattr(dense, self.weight.key))

    def matrix_of(self, dense: nn.Module) -> Tensor:
        """The weight of a dense layer as a matrix (N, K)."""
        return self.weight.to_matrix(self.parameter_of(dense))

    def shape_of(self, dense: nn.Module) -> tuple[int, ...]:
        """(N, K) of a dense layer, or the shape of its weight if that cannot be read as a matrix."""
        weight = self.parameter_of(dense)
        try:
            return tuple(self.weight.to_matrix(weight).shape)
        except RuntimeError:  # what torch raises for a wrong number of dimensions
            return tuple(weight.shape)

    def bias_of(self, dense: nn.Module) -> nn.Parameter | None:
        """The bias (N,) of a dense layer, or None."""
        return None if self.weight.bias is None else dense._parameters.get(self.weight.bias)

    def stored(self, dense: nn.Module, matrix: Tensor) -> nn.Parameter:
        """A parameter for a dense layer that holds a matrix (N, K) as its weight."""
        old = self.parameter_of(dense)
        return nn.Parameter(self.weight.from_matrix(matrix, old.shape), requires_grad=old.requires_grad)

    def dense_like(self, dense: nn.Module, matrix: Tensor, bias: nn.Parameter | None) -> nn.Module:
        """A copy of a dense layer with another weight, a matrix (N, K), and bias (N,)."""
        return self._copy(dense, self.stored(dense, matrix), bias)

    def shell_of(self, dense: nn.Module) -> nn.Module:
        """A copy of a dense layer whose weight has no values: it is on the device "meta"."""
        old = self.parameter_of(dense)
        empty = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=old.requires_grad)
        return self._copy(dense, empty, self.bias_of(dense))

    def _copy(self, dense: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        new = dense.__class__.__new__(dense.__class__)
        # The copy has its own dictionaries of parameters and hooks; their values are shared.
        for key, value in vars(dense).items():
            new.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
        new._parameters[self.weight.key] = weight
        if self.weight.bias is not None:
            new._parameters[self.weight.bias] = bias
        return new


def _table_kind(name: str, dense: type[nn.Module], module: type[QuantizedModule]) -> ModuleKind:
    """A kind whose layers read rows of the weight, instead of multiplying with it."""
    return ModuleKind(
        name,
        dense,
        module,
        weights=(MatrixWeight(bias=None),),
        why_no_rows=embedding.why_no_rows,
        scheme_for=embedding.scheme_for,
        why_not=embedding.why_not,
    )


BUILT_IN: tuple[ModuleKind | CompositeKind, ...] = (
    ModuleKind("Linear", nn.Linear, Linear, SparseLinear),
    ModuleKind(
        "Conv1D",
        "transformers.pytorch_utils.Conv1D",
        Linear,
        SparseLinear,
        weights=(MatrixWeight(to_matrix=torch.t, from_matrix=lambda matrix, shape: matrix.t().contiguous()),),
    ),
    _table_kind("Embedding", nn.Embedding, embedding.Embedding),
    _table_kind("EmbeddingBag", nn.EmbeddingBag, embedding.EmbeddingBag),
    LSTM_KIND,
    GRU_KIND,
    EXPERTS,
    MULTIHEAD_KIND,
    *(
        ModuleKind(
            module.__name__,
            module.dense_class,
            module,
            weights=(MatrixWeight(to_matrix=conv.patch_matrix, from_matrix=conv.patch_weight),),
            rows=conv.patch_rows,
            why_no_rows=conv.why_no_patch_rows,
        )
        for module in (conv.Conv1d, conv.Conv2d)
    ),
    ModuleKind(
        "ConvTranspose1d",
        nn.ConvTranspose1d,
        conv.ConvTranspose1d,
        weights=(MatrixWeight(to_matrix=conv.transposed_matrix, from_matrix=conv.transposed_weight),),
        why_no_rows=conv.why_no_transposed_rows,
        why_not=conv.ConvTranspose1d.why_not,
    ),
)


@lru_cache
def _table() -> tuple[ModuleKind | CompositeKind, ...]:
    """nybble's kinds and those of plug-ins.

    Raises:
        PluginError: a plug-in cannot be loaded, or two kinds replace one class, or two quantized classes have one name.
    """
    own = tuple(kind for kind in BUILT_IN if isinstance(kind, ModuleKind))
    dense = {kind.dense_name: kind.name for kind in own}
    classes = _by_name(own)

    def wrong(row: ModuleKind | CompositeKind) -> str | None:
        if isinstance(row, CompositeKind):
            return None
        owner = dense.setdefault(row.dense_name, row.name)
        if owner != row.name:
            return f"replaces {row.dense_name}, which the kind {owner!r} replaces already"
        for cls in row.modules:
            other = classes.setdefault(cls.__name__, cls)
            if other is not cls:
                return (
                    f"has the quantized class {_full_name(cls)}; checkpoints would confuse it with {_full_name(other)}"
                )
        return None

    return plugins.rows("nybble.modules", (ModuleKind, CompositeKind), BUILT_IN, wrong)


@lru_cache
def module_kinds() -> tuple[ModuleKind, ...]:
    """The kinds of layers with one weight: nybble's and those of plug-ins. Raises PluginError."""
    return tuple(kind for kind in _table() if isinstance(kind, ModuleKind))


@lru_cache
def composite_kinds() -> tuple[CompositeKind, ...]:
    """The kinds of modules with several weights: nybble's and those of plug-ins. Raises PluginError."""
    return tuple(kind for kind in _table() if isinstance(kind, CompositeKind))


def forget_kinds() -> None:
    """Read the table again at its next use: for tests that change it."""
    for table in (_table, module_kinds, composite_kinds):
        table.cache_clear()


def find_composite(module: nn.Module) -> CompositeKind | None:
    """The kind of a dense module with several weights, or None."""
    return next((kind for kind in composite_kinds() if kind.matches(module)), None)


def quantized_classes() -> dict[str, type[QuantizedModule]]:
    """The classes of quantized modules by their names in checkpoints."""
    return _by_name(module_kinds())


def _by_name(table: tuple[ModuleKind, ...]) -> dict[str, type[QuantizedModule]]:
    return {cls.__name__: cls for kind in table for cls in kind.modules}


def find_kind(module: nn.Module) -> ModuleKind | None:
    """The kind of a dense module: that of its class, or of the nearest class that it inherits from; or None."""
    for cls in type(module).__mro__:
        for kind in module_kinds():
            if kind.replaces(cls):
                return kind
    return None


def kind_of(module: nn.Module) -> ModuleKind:
    """The kind of a dense or quantized module. Raises TypeError if there is none."""
    if isinstance(module, QuantizedModule):
        found = next((kind for kind in module_kinds() if isinstance(module, kind.modules)), None)
    else:
        found = find_kind(module)
    if found is None:
        known = ", ".join(kind.name for kind in module_kinds())
        raise TypeError(f"module={type(module).__name__}: must be one of the module kinds {known}")
    return found


def matrix_layer(module: nn.Module) -> nn.Module:
    """A layer that maps rows (..., K) to (..., N) with the weight and bias of a dense or quantized module.

    It is the module itself if that takes rows.
    """
    kind = kind_of(module)
    if kind.takes_rows:
        return module
    if isinstance(module, QuantizedModule):
        cls = SparseLinear if module.is_sparse else Linear
        codes, act = module.quantized(), module.act()
        return cls.from_quantized(codes, module.in_features, module.bias, module.scheme, module.dtype, act)
    weight, bias = kind.matrix_of(module), kind.bias_of(module)
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def settings_of(module: nn.Module) -> tuple[object, ...]:
    """The class of a dense or quantized module, and the settings by which its modules differ besides their weights."""
    return type(module), *(getattr(module, name) for name in kind_of(module).module.settings)
