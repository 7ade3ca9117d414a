"""nybble: int8 and int4 linear layers for torch models, on the hardware that you already own.

import nybble
report = nybble.quantize(model, "w8a8")   # in place; print(report)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from . import _moved, nn
from ._awaited import register_with_others
from .checkpoint.io import load, save
from .checkpoint.skeleton import skeleton
from .dispatch.explanation import Explanation
from .evaluate import Evaluation, evaluate
from .report.report import Report
from .weights.scheme import Scheme

if TYPE_CHECKING:
    from .dispatch.registry import kernels
    from .export.aot import aot_package
    from .export.onnx import export_onnx
    from .foreign.load import load_pretrained
    from .foreign.save import save_pretrained
    from .fusion.fuse import fuse
    from .fusion.report import FusionReport
    from .hf.config import HfConfig
    from .hf.register import patch_transformers
    from .int8_cache import Int8Cache
    from .lora.patch import patch_peft
    from .lora.report import merge_report
    from .monitor.monitor import Monitor
    from .passes.choose import ChosenPlan, plan
    from .passes.optimize import optimize
    from .passes.quantize import quantize
    from .passes.recover import recover
    from .passes.rotate.rotate import rotate
    from .passes.sensitivity import Sensitivity, sensitivity
    from .passes.sparsify import sparsify
    from .recipe.recipe import Recipe
else:
    # The package of Triton kernels, callable: one name is both the table and the folder.
    from . import kernels

# Names that are imported at their first use, so that `import nybble` stays quick, and where they are.
_LAZY = {
    "ChosenPlan": "passes.choose",
    "FusionReport": "fusion.report",
    "HfConfig": "hf.config",
    "Int8Cache": "int8_cache",
    "Monitor": "monitor.monitor",
    "Recipe": "recipe.recipe",
    "Sensitivity": "passes.sensitivity",
    "aot_package": "export.aot",
    "export_onnx": "export.onnx",
    "fuse": "fusion.fuse",
    "load_pretrained": "foreign.load",
    "merge_report": "lora.report",
    "optimize": "passes.optimize",
    "patch_peft": "lora.patch",
    "patch_transformers": "hf.register",
    "plan": "passes.choose",
    "quantize": "passes.quantize",
    "recover": "passes.recover",
    "rotate": "passes.rotate.rotate",
    "save_pretrained": "foreign.save",
    "sensitivity": "passes.sensitivity",
    "sparsify": "passes.sparsify",
}

_moved.install()


def __getattr__(name: str) -> Any:
    """A name of ``_LAZY``, or an old import path."""
    if name not in _LAZY:
        return _moved.attribute(name)
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def explain(layer: nn.QuantizedModule, m: int = 1, verbose: bool = False) -> Explanation:
    """Which kernel runs a layer for m rows of activations, and why each other kernel of its scheme does not.

    Args:
        layer: a quantized module, such as ``nybble.nn.Linear``.
        m: rows of the activation.
        verbose: print the kernels of other schemes too; ``rejected`` always has all of them.

    Raises:
        TypeError: not a nybble layer.
    """
    if not isinstance(layer, nn.QuantizedModule):
        raise TypeError(f"layer={type(layer).__name__}: must be a nybble.nn.Linear, such as quantize puts into a model")
    return layer.explain(m, verbose)


__all__ = [
    "ChosenPlan",
    "Evaluation",
    "Explanation",
    "FusionReport",
    "HfConfig",
    "Int8Cache",
    "Monitor",
    "Recipe",
    "Report",
    "Scheme",
    "Sensitivity",
    "aot_package",
    "evaluate",
    "explain",
    "export_onnx",
    "fuse",
    "kernels",
    "load",
    "load_pretrained",
    "merge_report",
    "nn",
    "optimize",
    "patch_peft",
    "patch_transformers",
    "plan",
    "quantize",
    "recover",
    "rotate",
    "save",
    "save_pretrained",
    "sensitivity",
    "skeleton",
    "sparsify",
]

register_with_others()
