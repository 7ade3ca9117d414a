"""Make a model without the values of its parameters, to load a checkpoint into."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Methods, and functions of nn.init or in place of those, that set all values of their first argument. On the meta
# device torch runs some of them in Python, slowly, for nothing.
_SETTERS = {"normal_", "uniform_", "fill_", "zero_", "constant_", "kaiming_uniform_"}


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` without a device makes a tensor on the meta device, whose values are not set."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None and kwargs.get("out") is None:
            kwargs["device"] = "meta"
        if getattr(func, "__name__", "") in _SETTERS:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def skeleton() -> AbstractContextManager[object]:
    """A context in which modules are made without the memory and the random values of their parameters.

    A parameter that a module makes with ``torch.empty``, as those of torch do, is on the meta device; initializing it
    takes no time. What is computed, such as the buffers of rotary embeddings, is real. The model is for ``nybble.load``,
    which fills it:

        with nybble.skeleton():
            model = AutoModel.from_config(config).eval()
        nybble.load(model, directory)
    """
    return _EmptyOnMeta()
