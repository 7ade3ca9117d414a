"""The form of a weight: what its tensors are where its scheme leaves that open. The tensors themselves tell it.

The name of a layout ends in the form of the weight that is packed in it: "n16k8" has the scales of the weight type,
"n16k8+f16" has float16 ones, and "n16k8+f32min" a float minimum in place of each zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .scheme import Scheme

_SCALES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_MINIMUM = "min"
_MARK = "+"


@dataclass(frozen=True)
class Form:
    """scale: dtype of the scales, one of WeightType.other_scales; None: WeightType.scale. minimum: whether an asymmetric
    weight has `minimum`, of the dtype of the scales, in place of `zero_point`."""

    scale: torch.dtype | None = None
    minimum: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scheme: Scheme) -> Form:
        """That of the portable tensors of a weight. Of tensors that are no weight of the scheme: the usual form."""
        scale, kind = tensors["scale"].dtype if "scale" in tensors else None, scheme.weight_type
        other = scheme.sparsity is None and scale in kind.other_scales
        return cls(scale if other else None, "minimum" in tensors and kind.minimum and not scheme.symmetric)

    @classmethod
    def parse(cls, name: str) -> Form:
        """The inverse of str.

        Raises:
            ValueError: not the name of a form.
        """
        scale, minimum = name.removesuffix(_MINIMUM), name.endswith(_MINIMUM)
        if scale and scale not in _SCALES:
            raise ValueError(f"form={name!r}: must be {', '.join(_SCALES)} or empty, then {_MINIMUM} or nothing")
        return cls(_SCALES[scale] if scale else None, minimum)

    def __str__(self) -> str:
        scale = next((name for name, dtype in _SCALES.items() if dtype is self.scale), "")
        return scale + (_MINIMUM if self.minimum else "")

    def of_layout(self, layout: str) -> str:
        """The name of a layout, which may have another form, with this one."""
        base, name = layout.partition(_MARK)[0], str(self)
        return f"{base}{_MARK}{name}" if name else base


USUAL = Form()


def split_layout(layout: str) -> tuple[str, Form]:
    """The name of a layout without the form, and the form.

    Raises:
        ValueError: not the name of a form.
    """
    base, _, name = layout.partition(_MARK)
    return base, Form.parse(name)
