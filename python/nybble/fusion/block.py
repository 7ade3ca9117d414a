"""A module that runs as a fused chain where it can: what replaces its ``forward``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from ..nn.module import QuantizedModule
from .arguments import Arguments, copied, kind_of, large_caches
from .explain import explain
from .forms import NotUnderstood
from .held import Held, Sizes
from .image_graph import is_of_images
from .images import ImageProgram, understand_images
from .lower import Lowered, lower
from .pays import Timings
from .program import Program
from .prove import prove, try_int8
from .watch import Call, tensors_of, watch

# Kinds of calls that a block learns; others run unfused.
MOST_KINDS = 8
# How often in succession a block is understood anew after its parameters or attributes changed.
MOST_TIMES = 4

_CONSTANTS = (bool, int, float, str, tuple, type(None), FunctionType, BuiltinFunctionType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Fused:
    """The fused form of a module. ``forward`` takes the place of the module's own, on the instance.

    Calls of a kind that was not seen before are run unfused once, watched, and proved.
    """

    module: nn.Module
    timings: Timings | None = None  # what it must be faster than; None: it need not be
    skips: bool = False  # whether rows of padding are left out
    int8: bool = False  # whether attention in 8 bits is asked for
    kinds: dict[Any, list[Lowered | ImageProgram | str]] = field(default_factory=dict)
    first: Lowered | ImageProgram | None = None  # the first of them that was understood
    config: dict[str, Any] | None = None  # the attributes of the module's configuration, as they were
    undone: str | None = None  # why the last call ran unfused, if the module was changed
    again: int = 0  # how often it had to be understood anew since it last ran fused
    holders: Sizes = field(default_factory=Sizes)  # of the modules inside
    members: Held | None = None  # the modules inside; None: not bound yet
    hooks: tuple[dict[Any, Any], ...] = ()
    parameters: Held = field(default_factory=Held)
    attributes: Sizes = field(default_factory=Sizes)
    constants: Held = field(default_factory=Held)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()

    # --- running ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        if is_compiling() or torch.is_grad_enabled() or self.module.training or _watched():
            return self.own(*args, **kwargs)
        self.undone = self.changed()
        if self.undone is not None:
            return self.own(*args, **kwargs)
        if self.moved():
            self.again += 1
            self.kinds.clear()
            self.bind()
        if self.again > MOST_TIMES:
            self.undone = "its parameters or attributes change from call to call"
            return self.own(*args, **kwargs)
        for lowered in self.kinds.get(kind_of(args, kwargs), ()):
            if isinstance(lowered, str):
                return self.own(*args, **kwargs)
            result = lowered.run(args, kwargs)
            if result is not NotImplemented:
                self.again = 0
                return result
        return self.learn(args, kwargs)

    @property
    def own(self) -> Callable[..., Any]:
        """The module's own forward."""
        forward: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return forward

    # --- learning ---

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of a new kind unfused, and keeps how to run it fused, or why not."""
        self.forget_stale()
        empty = any(tensor.numel() == 0 for tensor in tensors_of((args, kwargs)))
        if sum(map(len, self.kinds.values())) >= MOST_KINDS or empty or large_caches(args, kwargs):
            return self.own(*args, **kwargs)
        found_before = len(self.kinds.get(kind_of(args, kwargs), ()))
        before = copied(args, kwargs)
        call = watch(self.module, args, kwargs, self.own)
        with self.lock:
            known = self.kinds.setdefault(kind_of(args, kwargs), [])
            if len(known) > found_before:
                return call.result  # another thread was quicker
            found = self.understood(call, before)
            known.append(found)
            if self.first is None and not isinstance(found, str):
                self.first = found
        return call.result

    def forget_stale(self) -> None:
        """Drops programs whose tensors were replaced or written to, with their buffers."""
        with self.lock:
            for kind, known in self.kinds.items():
                kept = [one for one in known if not (isinstance(one, ImageProgram) and one.versions.differ())]
                if len(kept) < len(known):
                    self.kinds[kind] = kept
                    self.again += 1

    def understood(self, call: Call, before: Arguments) -> Lowered | ImageProgram | str:
        """How to run calls of this kind fused, or why not. before: the arguments as they were before the call."""
        names = {inner: name for name, inner in self.module.named_modules()}
        try:
            if is_of_images(call):
                return self.understood_images(call, before)
            program = Program(explain(call, names))
            lowered = lower(program)
            prove(program, lowered, before, self.own)
            if self.int8:
                try_int8(program, lowered, before)
            if self.timings is not None:
                lowered.speed = self.timings.check(program, lowered, before, self.own)
            lowered.skips = self.skips
        except NotUnderstood as reason:
            return str(reason)
        program.forget()
        return lowered

    def understood_images(self, call: Call, before: Arguments) -> ImageProgram:
        """As understood, for a call with images. Raises NotUnderstood."""
        program = understand_images(call, before, self.own)
        if self.timings is not None:
            program.speed = self.timings.check(program, program, before, self.own)
        return program

    # --- changes of the module ---

    def bind(self) -> None:
        """Notes the modules inside as they are now."""
        config = _config_of(self.module)
        self.config = None if config is None else dict(config)
        inside = [self.module, *(m for m in self.module.modules() if m is not self.module)]
        self.holders = Sizes(one._modules for one in inside)
        self.members = Held((one._modules, *item) for one in inside for item in one._modules.items())
        own = [getattr(self.module, name) for name in ("_backward_hooks", "_backward_pre_hooks")]
        self.hooks = (*own, *(getattr(one, name) for one in inside[1:] for name in _HOOKS))
        self.parameters = Held(
            (one._parameters, key, held)
            for one in inside
            for key, held in one._parameters.items()
            if key == "bias" or not isinstance(one, QuantizedModule)
        )
        parts = [one for one in inside[1:] if not isinstance(one, QuantizedModule)]
        self.attributes = Sizes(vars(one) for one in parts)  # without the module's own: forward is one of them
        self.constants = Held(
            (vars(one), key, value)
            for one in (self.module, *parts)
            for key, value in vars(one).items()
            if type(value) in _CONSTANTS
        )

    def changed(self) -> str | None:
        """Why the module cannot run as a chain: a module inside was replaced, or got a hook."""
        if self.members is None:
            self.bind()
        assert self.members is not None, "bound above"  # noqa: S101
        if self.holders.differ():
            return "a module was added or removed"
        if self.members.differs():
            name, other = self.members.first_other()
            return f"{name} was replaced by {type(other).__name__}"
        if any(self.hooks):
            return f"a module inside has hooks ({_names(next(filter(None, self.hooks)))})"
        return None

    def moved(self) -> bool:
        """Whether parameters, attributes or the configuration are others than those with which it was understood."""
        if self.parameters.differs():
            return True
        return self.attributes.differ() or self.constants.unequal() or _config_of(self.module) != self.config

    def put(self) -> None:
        """Replaces the module's forward."""
        self.bind()
        self.module.forward = self.replacement()

    def replacement(self) -> Callable[..., Any]:
        """What replaces the module's forward: it looks like it. Bound at its first call if not before."""
        return MethodType(_like(type(self.module).forward), self)

    def take_away(self) -> None:
        """Gives the module its own forward back."""
        self.module.__dict__.pop("forward", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fused:
        # The new module has no parts yet: it is bound at its first call.
        return Fused(deepcopy(self.module, memo), skips=self.skips, int8=self.int8)

    def __reduce__(self) -> Any:
        return _fused_again, (self.module, self.skips, self.int8)


@lru_cache(maxsize=256)
def _like(own: Callable[..., Any]) -> Callable[..., Any]:
    """Fused.forward with the name and the signature of a module's own forward, which callers may ask for."""

    @wraps(own)
    def forward(fused: Fused, *args: Any, **kwargs: Any) -> Any:
        return fused.forward(*args, **kwargs)

    return forward


def _config_of(module: nn.Module) -> dict[str, Any] | None:
    """The attributes of a module's configuration (transformers), on which its forward may depend: no copy."""
    found: dict[str, Any] | None = getattr(module.__dict__.get("config"), "__dict__", None)
    return found


def _fused_again(module: nn.Module, skips: bool, int8: bool) -> Fused:
    return Fused(module, skips=skips, int8=int8)


def _names(hooks: dict[Any, Any]) -> str:
    return ", ".join(sorted({getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks.values()}))


def _watched() -> bool:
    """Whether modes, transforms, tracers or hooks on all modules must see each step."""
    return bool(
        _len_torch_function_stack() > 0
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _is_any_autocast_enabled()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def unfuse(model: nn.Module) -> int:
    """Gives all modules that ``fuse`` changed their own forward back. Returns how many there were."""
    found = fused_modules(model)
    for fused in found.values():
        fused.take_away()
    return len(found)


def fused_modules(model: nn.Module) -> dict[str, Fused]:
    """The fused modules by their names."""
    return {name: fused for name, module in model.named_modules() if (fused := fused_at(module)) is not None}


def fuse_again(model: nn.Module, names: Iterable[str], int8: Iterable[str] = ()) -> None:
    """Lets modules run fused that did when the model was saved; each is proved again at its first call. Names that the
    model does not have, and modules whose forward is not their own, are left. int8: those that attend in 8 bits."""
    modules, in_int8 = dict(model.named_modules()), set(int8)
    for name in names:
        module = modules.get(name)
        if module is not None and "forward" not in vars(module):
            Fused(module, int8=name in in_int8).put()


def fused_at(module: nn.Module) -> Fused | None:
    """The fused form of a module, or None."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    return owner if isinstance(owner, Fused) else None
