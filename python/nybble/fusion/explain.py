"""From the output of a watched call back to its inputs: what computes it, in the vocabulary of ``nodes``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from ..rows import ACTIVATIONS
from .arguments import leaves_of
from .attention import Attention
from .compare import constant, integers
from .forms import Applied, Explanation, Given, NotUnderstood, Out, Record, needed
from .nodes import Activate, Add, Attend, Lookup, Multiply, Node, NormKind, Path, Product, Ref, Scale
from .seen import ATTENTION, MULTI_HEAD
from .watch import CACHE, CONTAINER, MODULE, Call, Event, tensors_of


class Explainer(Attention):
    """Explains calls of torch functions, and the result."""

    def function(self, event: Event) -> Ref:
        name = event.name
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](self, event)
        if name in ACTIVATIONS:
            return self.add(
                Activate(rows=self.rows(event.outputs[0]), x=self.value(event.args[0], event.number), act=act_of(event))
            )
        raise NotUnderstood(f"the torch function {name.removesuffix('.default')} is not understood")

    def binary(self, event: Event, make: Callable[..., Node]) -> Ref:
        out, operands = event.outputs[0], event.args[:2]
        numbers = [one for one in operands if isinstance(one, (int, float))]
        if make is Multiply and len(numbers) == 1 and not event.kwargs:
            x = next(one for one in operands if isinstance(one, Tensor))
            return self.add(Scale(rows=self.rows(out), x=self.value(x, event.number), factor=float(numbers[0])))
        alone = (1, self.length, out.shape[-1])
        fits = all(isinstance(one, Tensor) and (one.numel() == out.numel() or one.shape == alone) for one in operands)
        if not fits or len(event.args) > 2 or event.kwargs:
            raise NotUnderstood(f"{event.name} of other things than two values of one shape")
        a, b = (
            self.value(one, event.number)
            if one.numel() == out.numel() and one.shape != alone
            else self.alone(one, event)
            for one in operands
        )
        return self.add(make(rows=self.rows(out), a=a, b=b))

    def alone(self, tensor: Tensor, event: Event) -> Ref:
        """A value (1, length, width): that of the only text, or rows by position."""
        try:
            return self.positions(tensor, event.number)
        except NotUnderstood:
            if self.batch > 1:
                raise
            return self.value(tensor, event.number)

    def product(self, event: Event) -> Ref:
        x, weight, bias = (event.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
        held = {id(one): one for one in self.call.module.parameters()}
        if id(weight) not in held or (bias is not None and id(bias) not in held):
            raise NotUnderstood("linear with a weight that is not a parameter")
        return self.add(
            Product(rows=self.rows(event.outputs[0]), x=self.value(x, event.number), weight=weight, bias=bias)
        )

    def layer_norm(self, event: Event) -> Ref:
        x, shape = event.args[0], event.argument(1, "normalized_shape")
        if tuple(shape) != (x.shape[-1],):
            raise NotUnderstood("layer_norm over more than the last dimension")
        weight, bias = event.argument(2, "weight"), event.argument(3, "bias")
        norm = NormKind("layer", weight, bias, event.argument(4, "eps", 1e-5))
        return self.norm(norm, x, event.outputs[0], event.number)

    def check_pure(self) -> None:
        """Raises NotUnderstood if the call changes its arguments or the module's tensors."""
        module = self.call.module
        kept = {
            one.untyped_storage().data_ptr()
            for one in (*self.tensors.values(), *module.buffers(), *module.parameters())
        }
        for event in self.call.events:
            changes = event.name.endswith("_") and not event.name.endswith("__")
            target = event.args[0] if event.args and (changes or event.name in _IN_PLACE) else None
            if isinstance(target, Tensor) and target.untyped_storage().data_ptr() in kept:
                raise NotUnderstood(f"it changes a tensor in place ({event.name})")

    def check_looks(self, nodes: Sequence[Node]) -> None:
        """Raises NotUnderstood if the call looks at values, other than in modules that run by their own forward.

        A model of texts looks whether its mask has zeros: then what it computes is taken for masks like that one.
        """
        apart = [self.apart[node] for node in nodes if node in self.apart]
        looks = [what for at, what in self.call.looks if not any(one.first <= at <= one.number for one in apart)]
        if looks and self.tensors[self.hidden].is_floating_point():
            raise NotUnderstood(f"what it computes depends on values ({looks[0]})")

    def applied(self, value: Tensor) -> Applied:
        """Explains a part of the result that is not a row for each token."""
        for event in self.call.events:
            if event.name in (MODULE, CONTAINER) and event.outputs[0] is value and event.what in self.names:
                inputs = tensors_of((event.args, event.kwargs))
                if len(inputs) == 1 == len(event.args) and inputs[0].shape[:-1] == (self.batch, self.length):
                    return Applied(self.value(inputs[0], event.first), event.what)
        raise NotUnderstood(f"it returns a tensor of shape {tuple(value.shape)}")

    def ones(self, result: Any) -> tuple[Path, ...]:
        """The tensors of integers (batch, length) without zeros that nothing was computed from, such as the mask of texts
        without padding: with zeros they might count."""
        used: set[Path | None] = {self.hidden}
        for node in needed(self.nodes, result):
            if isinstance(node, Lookup):
                used.add(node.path)
            if isinstance(node, Attend) and node.mask is not None:
                used |= node.mask.paths()
        left = [path for path, one in self.tensors.items() if integers(one) and path not in used]
        return tuple(path for path in left if bool(self.tensors[path].all()))


_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
_FUNCTIONS: dict[str, Callable[[Explainer, Event], Ref]] = {
    "add": lambda self, event: self.binary(event, Add),
    "mul": lambda self, event: self.binary(event, Multiply),
    "linear": Explainer.product,
    "layer_norm": Explainer.layer_norm,
    ATTENTION: Explainer.attention,
    MULTI_HEAD: Explainer.multi_head,
}


def act_of(event: Event) -> str:
    if event.name == "gelu" and event.kwargs.get("approximate", "none") == "tanh":
        return "gelu_tanh"
    return event.name


def explain(call: Call, names: dict[nn.Module, str]) -> Explanation:
    """What a watched call computes.

    names: the modules inside the call's module, with their names in it.

    Raises:
        NotUnderstood: what it computes is not in the vocabulary; the message says what.
    """
    self = Explainer(call, names)
    self.start()
    self.check_pure()

    def part(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(part(one) for one in value)
        if is_dataclass(value) and isinstance(value, dict):
            return Record(type(value), tuple((key, part(one)) for key, one in value.items()))
        if isinstance(value, Tensor):
            given = next((path for path, one in self.tensors.items() if one is value), None)
            if given is not None:
                return Given(given)
            prefix = (self.batch, self.length) if self.dims == 3 else (self.length,)
            if tuple(value.shape[:-1]) != prefix:
                return self.applied(value)
            return Out(self.value(value, len(call.events)))
        if constant(value) and (value is None or isinstance(value, (bool, str))):
            return Given(None, value)
        path = next((where for where, one in leaves_of(call.args, call.kwargs) if one is value), None)
        if path is None:
            raise NotUnderstood(f"it returns a {type(value).__name__}")
        return Given(path)

    result = part(call.result)
    nodes = tuple(needed(self.nodes, result))
    self.check_looks(nodes)
    ones = self.ones(result)
    caches = {node.cache.path for node in self.nodes if isinstance(node, Attend) and node.cache is not None}
    if len(caches) != sum(event.name == CACHE for event in call.events):
        raise NotUnderstood("it updates a cache that its attention does not read")
    return Explanation(self.hidden, result, nodes, self.dims, ones)
