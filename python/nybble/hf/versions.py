"""Whether the installed transformers has what nybble needs to load its layers."""

from __future__ import annotations

from functools import lru_cache

TRIED = "5.23"


@lru_cache
def why_too_old() -> str | None:
    """Why this transformers cannot load nybble's layers, or None. Raises ImportError if it is not installed."""
    import transformers

    try:
        from transformers.core_model_loading import ConversionOps  # noqa: F401
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES  # noqa: F401
        from transformers.quantizers import auto, base
    except ImportError:
        missing = True
    else:
        missing = not hasattr(auto, "register_quantizer") or not hasattr(base.HfQuantizer, "update_weight_conversions")
    if not missing:
        return None
    return f"transformers {transformers.__version__} has no way to load nybble's layers; {TRIED} has"
