"""nybble.HfConfig: what ``from_pretrained(quantization_config=)`` takes, and what ``config.json`` says of a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from .. import __version__
from ..model.options import Patterns, check_choice
from ..weights.scheme import Scheme
from ..weights.search import check_hqq
from .versions import why_too_old

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("nybble.HfConfig needs transformers: pip install 'nybble[hf]'") from error

METHOD = "nybble"  # the name of the quantization method
_WITHOUT_DATA = ("rtn", "mse", "hqq")
_ACT_BITS = (16, 8)


class HfConfig(QuantizationConfigMixin):
    """How transformers quantizes a model while it loads it: ``from_pretrained(path, quantization_config=HfConfig("w4a8g128"))``.

    Each weight is rounded as soon as it is read, so that no more than one is there as floats. The layers that change are those
    that ``nybble.quantize(model, scheme, goal="memory")`` would change, embeddings among them, and get the same codes.

    Of a checkpoint of GPTQ, AWQ, compressed-tensors, bitsandbytes or another format that ``nybble.load_pretrained`` reads, the
    codes are kept as they are, and run on nybble's kernels: ``HfConfig()``, without a scheme.

    Args:
        scheme: of weights and activations, such as ``"w4a8g128"``: dense weights, and activations that are floats or dynamic.
            None for checkpoints that are quantized already.
        include: glob patterns on full module names; only layers that match one are quantized. None: all.
        exclude: glob patterns; layers that match one stay dense.
        per_layer: glob pattern -> scheme, or None for a layer that stays dense; the first that matches a layer counts.
        method: how weights are rounded, as in ``nybble.quantize``: "rtn", "mse" or "hqq".
        act_bits: for checkpoints that are quantized already: 16, float activations, or 8, quantized for each token.
        stored: what a saved model holds; written by ``save_pretrained``.

    Raises:
        TypeError, ValueError: an argument is wrong.
        ImportError: transformers is not installed, or too old.
    """

    def __init__(
        self,
        scheme: str | Scheme | None = None,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        per_layer: Mapping[str, str | Scheme | None] | None = None,
        method: str = "rtn",
        act_bits: int = 16,
        stored: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        nybble: str = __version__,
    ) -> None:
        if (why := why_too_old()) is not None:
            raise ImportError(f"nybble.HfConfig: {why}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method={quant_method!r}: must be {METHOD!r}")
        if act_bits not in _ACT_BITS:
            raise ValueError(f"act_bits={act_bits!r}: must be one of {_ACT_BITS}")
        for name, mapping in (("per_layer", per_layer), ("stored", stored)):
            if mapping is not None and not isinstance(mapping, Mapping):
                raise TypeError(f"{name}={mapping!r}: must be a mapping")
        self.quant_method: Any = METHOD
        self.nybble = nybble
        self.scheme = None if scheme is None else str(_parsed("scheme", scheme))
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.per_layer = {
            pattern: None if one is None else str(_parsed(f"per_layer[{pattern!r}]", one))
            for pattern, one in (per_layer or {}).items()
        }
        if scheme is None and (self.per_layer or include is not None or exclude is not None):
            raise ValueError("scheme=None: include, exclude and per_layer choose layers for a scheme; name one")
        self.method = _checked_method(method, self.schemes())
        self.act_bits = act_bits
        self.stored = None if stored is None else dict(stored)

    def schemes(self) -> list[Scheme]:
        """All schemes that a layer may get."""
        return [Scheme.parse(one) for one in (self.scheme, *self.per_layer.values()) if one is not None]

    def unused(self) -> HfConfig:
        """A copy that says nothing of a saved model."""
        new = copy(self)
        new.stored = None
        return new

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: the arguments that are not as usual."""
        told = super().to_dict()
        usual: dict[str, Any] = {
            "include": None,
            "exclude": None,
            "per_layer": {},
            "method": "rtn",
            "act_bits": 16,
            "scheme": None,
        }
        return {key: value for key, value in told.items() if key not in usual or value != usual[key]}


def _parsed(argument: str, scheme: str | Scheme) -> Scheme:
    found = Scheme.parse(scheme)
    if found.sparsity is not None:
        rule = "sparse weights are chosen by nybble.sparsify, after loading"
    elif found.static:
        rule = "the scale of static activations is found by nybble.quantize with calibration data, after loading"
    else:
        return found
    raise ValueError(f"{argument}={str(found)!r}: {rule}")


def _patterns(argument: str, patterns: Patterns) -> list[str] | None:
    if patterns is None:
        return None
    values = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(one, str) for one in values):
        raise TypeError(f"{argument}={patterns!r}: must be a glob pattern or a sequence of them")
    return values


def _checked_method(method: str, schemes: list[Scheme]) -> str:
    if isinstance(method, str) and method not in _WITHOUT_DATA:
        raise ValueError(
            f"method={method!r}: must be one of {', '.join(map(repr, _WITHOUT_DATA))}; methods with calibration data run "
            "after loading: nybble.quantize(model, method=..., calibration=...)"
        )
    check_choice("method", method, _WITHOUT_DATA)
    if method == "hqq":
        for scheme in schemes:
            check_hqq(scheme)
    return method
