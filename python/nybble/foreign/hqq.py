"""HQQ: codes with a scale and a zero point, both floats, for each group of the regrouped weight; see hqq_weight.

Its own save_quantized writes qmodel.pt, a file of torch.save with a dict of tensors and settings for each module, of which only
plain data is read (see plain_values). save_to_safetensors, and transformers, write the same as tensors `<module>.W_q` and so on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..checkpoint.files import CheckpointError
from .hqq_fields import SavedFields, TensorFields
from .hqq_weight import weight_of
from .opened import Layer, Opened, Part, opened
from .plain_values import Stored
from .source import Source
from .tensors import Tensors, read_header
from .torch_file import TorchFile
from .weight import ForeignWeight

_FILE, _CODES = "qmodel.pt", "W_q"
# All that HQQ saves of a layer besides its bias.
_PLAIN_KEYS = ("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype")
_OTHER_KEYS = ("offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero")
_KEYS = frozenset({"W_q", "scale", "zero", "quant_scale", "quant_zero", *_PLAIN_KEYS, *_OTHER_KEYS})


def detect(source: Source) -> bool:
    return source.has(_FILE) or source.method == "hqq" or (not source.method and _has_codes(source))


def _has_codes(source: Source) -> bool:
    """Whether the tensors are HQQ's: save_to_safetensors writes nothing else that says so."""
    files = sorted(source.path.glob("*.safetensors"))
    return bool(files) and any(name.endswith(f".{_CODES}") for name in read_header(files[0])[0])


def read_file(source: Source) -> Opened:
    return _saved(source) if source.has(_FILE) else _tensors(source)


def _tensors(source: Source) -> Opened:
    tensors = Tensors(source.path)
    modules: dict[str, dict[str, str]] = {}
    for name in tensors.entries:
        module, _, part = name.rpartition(".")
        if part in _KEYS and f"{module}.{_CODES}" in tensors.entries:
            modules.setdefault(module, {})[part] = name
    if not modules:
        raise CheckpointError(f"{source.path}: says HQQ, but has no tensor *.{_CODES}")

    def read(name: str) -> ForeignWeight:
        return weight_of(TensorFields(name, tensors), name)

    return opened(source, tensors, modules, read)


def _saved(source: Source) -> Opened:
    path = source.path / _FILE
    file = TorchFile(path)
    if not isinstance(file.values, dict):
        raise CheckpointError(f"{path}: must be a dict of modules")
    layers: dict[str, Layer] = {}
    parts: dict[str, Part] = {}
    for module, told in file.values.items():
        if not isinstance(told, dict):
            raise CheckpointError(f"{path}: {module}: must be a dict of what the module has")
        dense = told
        if _CODES in told:
            old = told.get("meta")  # where versions before 0.2 have the settings
            settings = {**told, **old} if isinstance(old, dict) else told
            bias = settings.get("bias")
            read = functools.partial(weight_of, SavedFields(module, file, settings), module)
            layers[module] = Layer(read, _nbytes(file, {**settings, "meta": None, "bias": None}))
            dense = {} if bias is None else {"bias": bias}
        for key, stored in dense.items():
            name = f"{module}.{key}" if module else key
            if not isinstance(stored, Stored):
                raise CheckpointError(f"{path}: {name}: must be a tensor")
            parts[name] = Part(functools.partial(file.tensor, stored, name), file.nbytes(stored))
    if not layers:
        raise CheckpointError(f"{path}: no module has {_CODES}")
    return Opened(layers, parts, lambda: source.config, (file.file,))


def _nbytes(file: TorchFile, told: Mapping[str, Any]) -> int:
    """The bytes of all tensors of a layer, and of those that its scales were made of."""
    inner = [value for one in told.values() if isinstance(one, dict) for value in one.values()]
    return sum(file.nbytes(value) for value in (*told.values(), *inner) if isinstance(value, Stored))
