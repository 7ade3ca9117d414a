"""torch.nn.LSTM and torch.nn.GRU with integer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from .. import recurrent
from ..weights.scheme import Scheme
from .composite import CompositeKind, CompositeModule
from .linear import Linear, _autocast
from .module import QuantizedModule

if TYPE_CHECKING:
    from typing_extensions import Self

# The weight of the input and that of the state, for each direction of each layer in turn.
_Pairs = list[tuple[nn.Module, nn.Module]]


class _Sequences(NamedTuple):
    """An input as the layers take it: (steps, batch, inputs), or (rows, inputs) with the rows of each step."""

    x: Tensor
    batch_sizes: Tensor | None
    batch: int

    def sizes(self) -> list[int] | None:
        """The rows of each step, where they are not those of a batch."""
        return None if self.batch_sizes is None else self.batch_sizes.tolist()


class Recurrent(CompositeModule):
    """What LSTM and GRU share: one or more layers, each with one direction or two.

    The members are Linear layers, named as torch names the weights: ``weight_ih_l0``, ``weight_hh_l0``,
    ``weight_ih_l0_reverse`` ... Each has the bias that torch calls ``bias_ih_l0`` and so on. While all are dense, torch
    computes; quantized ones run in one call for each layer.

    Args:
        dense: torch's module, which does not change; its parameters are shared.

    Raises:
        TypeError: a module of another class.
        ValueError: proj_size is not 0, or a weight is parametrized.
    """

    dense_class: ClassVar[type[nn.RNNBase]]
    cell: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]  # of the first states
    autocasts: ClassVar[bool]  # whether torch casts its inputs under autocast on a CPU

    def __init__(self, dense: nn.RNNBase) -> None:
        if type(dense) is not self.dense_class:
            raise TypeError(f"dense: must be a torch.nn.{self.dense_class.__name__}, got {type(dense).__name__}")
        reason = _why_not(dense)
        if reason is not None:
            raise ValueError(f"dense: {reason}")
        super().__init__({name: _member(dense, name) for name in dense._parameters if name.startswith("weight")})
        self.input_size, self.hidden_size, self.num_layers = dense.input_size, dense.hidden_size, dense.num_layers
        self.bias, self.batch_first, self.dropout = dense.bias, dense.batch_first, dense.dropout
        self.bidirectional = dense.bidirectional
        self.train(dense.training)

    @classmethod
    def from_dense(cls, dense: nn.RNNBase, scheme: str | Scheme, method: str = "rtn") -> Self:
        """A module with the rounded weights of a dense one, which does not change. Both share the bias Parameters.

        Raises:
            TypeError, ValueError: as the class, and as ``Linear.from_weight``.
        """
        new = cls(dense)
        for name in new._names:
            new.add_module(name, Linear.from_dense(new.get_submodule(name), scheme, method))  # type: ignore[arg-type]
        return new

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def close(self) -> nn.RNNBase:
        """Torch's module, with the members' weights as they are now; those of quantized members are dequantized."""
        plain = {name: _dense(self.get_submodule(name)) for name in self._names}
        dense: Any = self.dense_class  # torch gives the types of the base class
        dense = dense(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device="meta",
        )
        for name, member in plain.items():
            setattr(dense, name, member.weight)
            if self.bias:
                setattr(dense, name.replace("weight", "bias"), member.bias)
        closed: nn.RNNBase = dense.train(self.training)
        return closed

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As the forward of torch's module: the outputs and the last states, for a batch, one sequence or a PackedSequence.

        Raises:
            ValueError: a shape, dtype or device that does not fit, by name.
        """
        packed = input if isinstance(input, PackedSequence) else None
        single = not isinstance(input, PackedSequence) and input.dim() == 2  # a sequence without a batch
        sequences = _by_steps(input, self.batch_first)
        if sequences.x.shape[-1] != self.input_size or sequences.x.shape[0] < 1:
            raise ValueError(
                f"input: {tuple(sequences.x.shape)}, must have steps, and input_size={self.input_size} last"
            )
        if self.autocasts and not self.is_dense:
            sequences = sequences._replace(x=_autocast(sequences.x))
        states = self._states(hx, sequences, single)
        if packed is not None:
            states = [_ordered(state, packed.sorted_indices) for state in states]
        y, last = self._run(sequences, states)
        output: Any = y
        if packed is not None:
            output = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            last = [_ordered(state, packed.unsorted_indices) for state in last]
        elif single:
            output, last = y.squeeze(1), [state.squeeze(1) for state in last]
        elif self.batch_first:
            output = y.transpose(0, 1)
        return output, last[0] if len(last) == 1 else tuple(last)

    def _states(self, hx: Any, sequences: _Sequences, single: bool) -> list[Tensor]:
        """The first states, each (layers * directions, batch, units)."""
        shape = (self.num_layers * self.directions, sequences.batch, self.hidden_size)
        if hx is None:
            return [sequences.x.new_zeros(shape)] * len(self.state_names)
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != len(self.state_names):
            raise ValueError(f"hx: has {len(given)} tensors, must have {len(self.state_names)}: {self.state_names}")
        wanted = shape[::2] if single else shape
        for name, state in zip(self.state_names, given, strict=True):
            if state.shape != wanted:
                raise ValueError(f"hx: {name} is {tuple(state.shape)}, must be {wanted}")
        return [state.unsqueeze(1) if single else state for state in given]

    def _run(self, sequences: _Sequences, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        watched = self.is_watched()
        pairs, count = self._pairs(), self.directions
        if self.is_dense and not watched:
            return self._torch(pairs, sequences, states)
        if self.autocasts and not self.is_dense:
            states = [_autocast(state) for state in states]
        x, ends = sequences.x, []
        for layer in range(self.num_layers):
            if layer and self.training and self.dropout:
                x = F.dropout(x, self.dropout)
            at = slice(layer * count, (layer + 1) * count)
            run = self._by_members if watched else self._way(pairs[at])
            x, last = run(pairs[at], sequences._replace(x=x), [state[at] for state in states])
            ends.append(last)
        return x, [torch.cat(parts) for parts in zip(*ends, strict=True)]

    def _way(self, pairs: _Pairs) -> Callable[[_Pairs, _Sequences, list[Tensor]], tuple[Tensor, list[Tensor]]]:
        """How an unwatched layer runs: in one call if the weights of its state are quantized, else by torch."""
        members = [member for pair in pairs for member in pair]
        if any(isinstance(member, Linear) and member.device.type == "meta" for member in members):
            return self._by_members
        return self._fused if all(isinstance(hidden, Linear) for _, hidden in pairs) else self._torch

    def _torch(self, pairs: _Pairs, sequences: _Sequences, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What torch's module computes, for some layers."""
        function: Any = getattr(torch, self.cell)
        weights = [tensor for pair in pairs for tensor in _flat(pair, self.bias, sequences.x.dtype)]
        layers = len(pairs) // self.directions
        how = (weights, self.bias, layers, self.dropout if layers > 1 else 0.0, self.training, self.bidirectional)
        hx = states if len(states) > 1 else states[0]
        if sequences.batch_sizes is None:
            y, *last = function(sequences.x, hx, *how, False)
        else:
            y, *last = function(sequences.x, sequences.batch_sizes, hx, *how)
        return y, last

    def _pairs(self) -> _Pairs:
        return [
            (self.get_submodule(f"weight_ih_{end}"), self.get_submodule(f"weight_hh_{end}"))
            for layer in range(self.num_layers)
            for end in (f"l{layer}", f"l{layer}_reverse")[: self.directions]
        ]

    def _fused(self, pairs: _Pairs, sequences: _Sequences, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One call for a layer. Where weights of the input are dense, only their products come before."""
        x, inputs = sequences.x, [member for member, _ in pairs]
        multiplied = not all(isinstance(member, Linear) for member in inputs)
        if multiplied:
            x = torch.cat([member(x).float() for member in inputs], -1)
        weights = [
            _nothing(x) if multiplied and i == 0 else _weight(member) for pair in pairs for i, member in enumerate(pair)
        ]
        call: Any = getattr(recurrent, self.cell)
        y, *last = call(x, sequences.sizes(), *states, *map(list, zip(*weights, strict=True)))
        return y, last

    def _by_members(self, pairs: _Pairs, sequences: _Sequences, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A layer that calls its members: that of the state once a step."""
        y, *last = recurrent.by_steps(
            sequences.x, sequences.sizes() or [sequences.batch] * sequences.x.shape[0], states, pairs
        )
        return y, last

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"dropout={self.dropout}, bidirectional={self.bidirectional}"
        )


class LSTM(Recurrent):
    """torch.nn.LSTM with Linear layers as its weights: see Recurrent."""

    dense_class = nn.LSTM
    cell = "lstm"
    state_names = ("h_0", "c_0")
    autocasts = True


class GRU(Recurrent):
    """torch.nn.GRU with Linear layers as its weights: see Recurrent."""

    dense_class = nn.GRU
    cell = "gru"
    state_names = ("h_0",)
    autocasts = False


def _by_steps(input: Tensor | PackedSequence, batch_first: bool) -> _Sequences:
    if isinstance(input, PackedSequence):
        return _Sequences(input.data, input.batch_sizes, int(input.batch_sizes[0]))
    if input.dim() not in (2, 3):
        raise ValueError(f"input: {tuple(input.shape)}, must have 3 dimensions, or 2 for one sequence without a batch")
    x = input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if batch_first else input
    return _Sequences(x, None, x.shape[1])


def _ordered(state: Tensor, indices: Tensor | None) -> Tensor:
    return state if indices is None else state.index_select(1, indices)


def _member(dense: nn.RNNBase, name: str) -> nn.Linear:
    """A Linear layer with a weight of a dense module, and the bias that belongs to it."""
    weight, bias = dense._parameters[name], dense._parameters.get(name.replace("weight", "bias"))
    assert weight is not None, "torch's modules have all of their weights"  # noqa: S101
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear.train(dense.training)


def _dense(member: nn.Module) -> Any:
    return member.dequantize() if isinstance(member, QuantizedModule) else member


def _flat(pair: tuple[nn.Module, nn.Module], bias: bool, dtype: torch.dtype) -> list[Any]:
    """The parameters of a direction in torch's order; a quantized weight is dequantized."""
    members: Any = pair
    weights = [m.dequantized_weight().to(dtype) if isinstance(m, QuantizedModule) else m.weight for m in members]
    return weights + ([member.bias for member in members] if bias else [])


def _weight(member: Any) -> tuple[Tensor, Tensor | None, str, str]:
    """A quantized weight as the ops take it."""
    packed, layout = member._buffers["packed"], member.layout
    if packed is None:
        packed, layout = member._pack()
    return packed, member._parameters["bias"], member._scheme_name, layout


def _nothing(x: Tensor) -> tuple[Tensor, Tensor | None, str, str]:
    return x.new_empty(0, dtype=torch.uint8), None, "", ""


def _why_not(dense: nn.Module) -> str | None:
    if getattr(dense, "proj_size", 0):
        return f"proj_size={dense.proj_size}: an LSTM that projects its state"
    if parametrize.is_parametrized(dense):
        return "a weight is parametrized"
    return None


def _open(dense: nn.Module) -> Recurrent:
    return next(cls for cls in (LSTM, GRU) if type(dense) is cls.dense_class)(dense)  # type: ignore[arg-type]


LSTM_KIND = CompositeKind("LSTM", lambda module: type(module) is nn.LSTM, _open, _why_not)
GRU_KIND = CompositeKind("GRU", lambda module: type(module) is nn.GRU, _open, _why_not)
