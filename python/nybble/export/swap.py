"""Other modules in the places of quantized ones, while a model is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..nn import CompositeModule, QuantizedModule


def forms_of(
    model: nn.Module, form_of: Callable[[nn.Module], nn.Module | None], dense: bool, where: str
) -> dict[str, nn.Module]:
    """What shall stand for each quantized module of a model, by its name.

    Args:
        form_of: what stands for a module; None: nothing does, so that it is dequantized if ``dense``.
        where: the name of the format, for the errors.

    Raises:
        ValueError: the model has no quantized modules, is one itself, or has some that nothing stands for.
    """
    found: dict[str, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, CompositeModule):
            left.append(f"{name} ({type(module).__name__})")
        if not isinstance(module, QuantizedModule):
            continue
        form = form_of(module) or (module.dequantize() if dense else None)
        if form is None:
            left.append(f"{name} ({type(module).__name__})")
        else:
            found[name] = form.eval()
    if left:
        more = "" if dense else ", or pass dense=True where they have one weight"
        raise ValueError(f"model: {', '.join(left)}: have no form in {where}; leave them dense{more}")
    if not found:
        raise ValueError("model: has no quantized modules; use torch's own export")
    if "" in found:
        raise ValueError("model: is a quantized module itself; put it into an nn.Sequential")
    return found


def report_of(forms: dict[str, nn.Module]) -> dict[str, str]:
    """What each quantized module became."""
    return {name: getattr(form, "op", "dense") for name, form in forms.items()}


@contextmanager
def in_place_of(model: nn.Module, forms: dict[str, nn.Module]) -> Iterator[None]:
    """The forms in the places of the modules, for a while."""
    before = {name: model.get_submodule(name) for name in forms}
    try:
        _put(model, forms)
        yield
    finally:
        _put(model, before)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
