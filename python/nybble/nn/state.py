"""The state of a quantized module: moved, saved, loaded, copied, and sent to other processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import layouts
from ..layouts.portable import from_portable, portable_names, spec_of
from ..weights.form import Form
from .packing import PackedModule, lock

if TYPE_CHECKING:
    from typing_extensions import Self


_outlined = ContextVar("outlined", default=False)


@contextlib.contextmanager
def outlined() -> Iterator[None]:
    """In the context, ``state_dict`` has empty tensors on the meta device in the place of packed weights: their names alone,
    without the memory that they take."""
    token = _outlined.set(True)
    try:
        yield
    finally:
        _outlined.reset(token)


class StatefulModule(PackedModule):
    """A PackedModule whose ``state_dict`` always holds the portable tensors, packed or not.

    ``.to(dtype)`` changes the dtype of the bias and the output, never that of the integers and their scales.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ForkingPickler.register(cls, _send)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What fn does to devices and dtypes shows on an empty tensor.
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if fn(torch.empty(0, dtype=torch.uint8, device=self.device)).dtype != torch.uint8:
            raise TypeError("dtype: Module.type() would convert the integer weight as well; use .to(dtype)")
        if moved.device != self.device:
            self.unpack()
        # fn would convert the scales. They are taken out, and moved as integers of the same size.
        scales: dict[str, nn.Parameter | None] = {
            name: self._parameters[name]
            for name in ("scale", "minimum", "act_scale", "book")
            if name in self._parameters
        }
        self._parameters.update(dict.fromkeys(scales))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(scales)
        for name, scale in scales.items():
            if scale is not None:
                bits = torch.int16 if scale.dtype.itemsize == 2 else torch.int32
                moved_scale = fn(scale.data.view(bits)).view(scale.dtype)
                self._parameters[name] = nn.Parameter(moved_scale, requires_grad=False)
        self.dtype = moved.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with lock():
            if self.packed is not None:
                held = self._outline() if _outlined.get() else self.portable()
                destination.update({prefix + name: tensor for name, tensor in held.items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.sharding is not None:
            self.sharding.show(self, destination, prefix)

    def _outline(self) -> dict[str, Tensor]:
        return {name: torch.empty(0, dtype=dtype, device="meta") for name, (_, dtype) in self._spec().items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.sharding is not None:
            self.sharding.take(self, state_dict, prefix)
        names = [name for name in portable_names(self.scheme) if prefix + name in state_dict]
        found = {name: state_dict[prefix + name] for name in names}
        try:
            self._check_portable(found)
        except ValueError as error:
            error_msgs: list[str] = args[-1]
            error_msgs.append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
            return
        before, layout = self.packed, self.layout
        self.unpack()
        self._resize(found)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if before is None or layout is None or self.device.type == "meta":
            self.pack()
            return
        held = layouts.find(layout)
        if self.form != held.form and held.of_form is None:  # that layout holds no weights of this form
            self.pack()
            return
        # In the same layout, which a module of another class may read too.
        new = self.form.of_layout(layout)
        packed = self._packed_as(new)
        # Modules that share a weight of another form go on reading that.
        self._hold_packed(_copied_into(before, packed) if new == layout else packed, new)

    def _check_portable(self, found: dict[str, Tensor]) -> None:
        """Raise ValueError unless these are all portable tensors of a weight, or none. Values that are not here, or lie on
        several ranks, are checked when the weight is packed."""
        form = Form.of(found, self.scheme)
        missing = spec_of(self.scheme, self.out_features, self.in_features, form=form).keys() - found.keys()
        if found and missing:
            raise ValueError(f"the state has {sorted(found)} but not {sorted(missing)}")
        if found and not any(one.is_meta or type(one) not in (Tensor, nn.Parameter) for one in found.values()):
            from_portable(found, self.scheme, self.out_features, self.in_features)

    def _resize(self, found: dict[str, Tensor]) -> None:
        """Make room for tensors of another size or form: sparse weights of one shape may keep different numbers of
        values, and scales may be of different dtypes."""
        if not found:
            return
        device, now = self.device, {name: self._parameters.get(name) for name in found}
        for name, tensor in found.items():
            held = now[name]
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                room = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                now[name] = nn.Parameter(room, requires_grad=False)
        self._name_parameters(now)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed is not None:
            portable = {name: nn.Parameter(t, requires_grad=False) for name, t in self.portable().items()}
            state["_parameters"] = {**self._parameters, **portable}
            state["_buffers"] = {**self._buffers, "packed": None}
            state["layout"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Not by __getstate__: modules that share a packed weight share its copy as well.
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _copied_into(before: Tensor, new: Tensor) -> Tensor:
    """Copy a packed weight into the memory of the former one, so that modules and processes that share it see it."""
    with torch.no_grad():
        if before.shape == new.shape:
            before.copy_(new)
        else:  # memory that processes share cannot grow
            before.set_(new)  # type: ignore[call-overload]
    return before


def _send(module: StatefulModule) -> tuple[Any, ...]:
    """How ForkingPickler sends a module to a worker process: with the packed weight itself, in shared memory."""
    module.pack()
    return _restore, (type(module), module.__dict__.copy())


def _restore(cls: type[StatefulModule], state: dict[str, Any]) -> StatefulModule:
    module = cls.__new__(cls)
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    return module
