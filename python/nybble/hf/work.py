"""What all ways of loading have in common, and how names of a checkpoint become those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSet
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..nn.kinds import find_composite


class Work:
    """A model on its way through ``from_pretrained``, from parameters on the meta device to nybble's modules.

    The constructor gets the model before any weight is loaded, ``needs`` and ``take`` see weights as they are read, and
    ``finish`` gets the model after transformers has loaded the rest.
    """

    def modules(self, model: Any) -> Iterable[nn.Module]:
        """The modules, before ``finish``, that will be quantized layers or have some inside."""
        raise NotImplementedError

    def needs(self, name: str) -> bool:
        """Whether ``take`` wants a parameter."""
        return False

    def take(self, name: str, value: Tensor, missing: MutableSet[str]) -> bool:
        """Whether the value of a parameter was taken; if not, transformers gives it to the model."""
        return False

    def finish(self, model: Any) -> None:
        """Put nybble's modules into the model."""
        raise NotImplementedError


def names_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of modules in a checkpoint -> those in the model, for those that it has.

    A checkpoint of a model with a head has the names of the inner model with a prefix; either loads from the other.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in names:
        options = (name, name.removeprefix(prefix), prefix + name)
        mine = next((one for one in options if _is_in(modules, one)), None)
        if mine is not None:
            found[name] = mine
    return found


def holders_of(model: Any, names: Iterable[str]) -> Iterator[nn.Module]:
    """The modules with these names, or, of one that is not there yet, the module that it will be in."""
    modules = dict(model.named_modules())
    for name in names:
        while name not in modules:
            name = name.rpartition(".")[0]
        yield modules[name]


def _is_in(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether there is such a module, or will be when a module with several weights is opened."""
    above = name
    while above and above not in modules:
        above = above.rpartition(".")[0]
    return above == name or (bool(above) and find_composite(modules[above]) is not None)


@contextmanager
def tied(model: Any) -> Iterator[None]:
    """In the context, parameters are one that transformers ties after loading, so that whoever plans by parameters sees it."""
    held = []
    for target, source in model.all_tied_weights_keys.items():
        above, _, key = target.rpartition(".")
        holder = model.get_submodule(above)._parameters
        if key in holder:
            held.append((holder, key, holder[key], model.get_parameter(source)))
            holder[key] = held[-1][-1]
    yield
    for holder, key, own, shared in held:
        if holder.get(key) is shared:
            holder[key] = own


def forget_ties(model: Any, modules: Iterable[str]) -> None:
    """Modules are tied by nybble: transformers must not tie their weights."""
    gone = {f"{name}.weight" for name in modules}
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if target in gone or source in gone:
            del ties[target]


def mark_initialized(module: Any) -> None:
    """transformers must not initialize a module, which has no parameters of the kind that it knows."""
    module._is_hf_initialized = True


def mark_around(model: Any, names: Iterable[str]) -> None:
    """The same for modules and those that hold them, if these have no parameters of their own: some models' own code
    initializes the weights of modules inside."""
    for name in names:
        mark_initialized(model.get_submodule(name))
        above = model.get_submodule(name.rpartition(".")[0])
        if above is not model and not above._parameters and not above._buffers:
            mark_initialized(above)


def ignore_unexpected(model: Any, patterns: Iterable[str]) -> None:
    """transformers is not to tell of tensors of the file with such names."""
    held = model._keys_to_ignore_on_load_unexpected or set()
    model._keys_to_ignore_on_load_unexpected = type(held)([*held, *patterns])
