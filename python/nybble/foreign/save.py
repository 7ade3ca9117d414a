"""nybble.save_pretrained: a model as a checkpoint that other libraries read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import written_at_once
from ..checkpoint.model import slots
from ..checkpoint.tensors import DTYPES
from ..model.allocator import return_freed
from ..model.walk import named_modules
from .export_report import ExportedLayer, ExportReport
from .held import Held, NotHeldError
from .pieces import Dense, DenseLinear, Other, Pieces
from .shards import Shards
from .writer import Encoded, ForeignWriter, Layers
from .writers import foreign_writer

CONFIG = "config.json"
_TIED = "tie_word_embeddings"
_SHARD = 5_000_000_000  # bytes of a file


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: str,
    dense: bool = False,
    round_scales: bool = False,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = _SHARD,
) -> ExportReport:
    """Write a model that nybble quantized as a checkpoint that transformers and vLLM read.

    Codes, scales and zero points are written as they are. Embeddings, which no format quantizes, are written as floats,
    in the model's dtype. A layer that the format cannot hold is refused; nothing is written then. One layer at a time is
    in memory besides the model.

    Args:
        model: of transformers, or any other: then config.json says nothing but how it is quantized.
        directory: is made; it may exist if it is empty.
        format: "compressed-tensors"; "compressed-tensors-sparse", with 2:4 layers as sparse-24-bitmask; "gptq"; "gptq-v2".
        dense: write a layer that the format cannot hold as floats, and say so in the report.
        round_scales: round scales that the format cannot hold, and tell the SQNR in the report.
        config: what config.json has besides; None: the model's own configuration.
        shard_bytes: of a safetensors file; a larger checkpoint has several and their index.

    Returns:
        What became of each layer of nybble. ``print(report)`` shows it.

    Raises:
        ValueError: an unknown format; layers that it cannot hold, with their names and the rules; or a model without
            quantized layers, or with tensors that have no values.
        FileExistsError: the directory is not empty.
        OSError: the files could not be written.
    """
    return write_pretrained(model, Path(directory), Options(format, dense, round_scales, config, shard_bytes))


@dataclass(frozen=True)
class Options:
    """Those of save_pretrained. ``release`` is called after each layer, to give back the memory that it took."""

    format: str
    dense: bool = False
    round_scales: bool = False
    config: Mapping[str, Any] | None = None
    shard_bytes: int = _SHARD
    release: Callable[[], None] = return_freed


def write_pretrained(model: nn.Module, directory: Path, options: Options) -> ExportReport:
    """As save_pretrained."""
    writer, config = foreign_writer(options.format), options.config
    if options.shard_bytes < 1:
        raise ValueError(f"shard_bytes={options.shard_bytes}: must be at least 1")
    with written_at_once(directory) as aside, torch.no_grad():
        with Shards(aside, options.shard_bytes) as shards:
            work = _Writing(model, writer, shards, options)
            work.write()
        told = dict(_config(model) if config is None else config)
        if work.pieces.untied and told.get(_TIED) is not False:
            told[_TIED] = False
        told["quantization_config"] = writer.config(work.layers)
        (aside / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None and config is None:
            generation.save_pretrained(aside)
    return work.report()


def _config(model: nn.Module) -> dict[str, Any]:
    """The configuration of a transformers model; empty for another model."""
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_diff_dict"):
        return {}
    told: dict[str, Any] = json.loads(own.to_json_string())
    dtypes = [value.dtype for value in model.parameters() if value.is_floating_point()]
    name = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    return {**told, "architectures": [type(model).__name__], "dtype": name}


class _Writing:
    """Writes the pieces of a model, and keeps what became of them."""

    def __init__(self, model: nn.Module, writer: ForeignWriter, shards: Shards, options: Options) -> None:
        self.pieces = Pieces(model)
        self._writer, self._shards, self._options = writer, shards, options
        self._rows: list[ExportedLayer] = []
        self._refused: dict[str, list[str]] = {}
        self._nbytes = 0
        self._settings: dict[str, Mapping[str, Any]] = {}
        self._left: list[str] = []

    @property
    def layers(self) -> Layers:
        return Layers(self._settings, self._left)

    def write(self) -> None:
        """Raises ValueError if a layer is refused, after all were looked at."""
        for piece in self.pieces:
            if isinstance(piece, Dense):
                self._nbytes += self._add(piece.name, piece.tensor)
            elif isinstance(piece, DenseLinear):
                self._left.append(piece.name)
            elif isinstance(piece, Other):
                self._other(piece)
            else:
                self._held(piece)
            if not isinstance(piece, DenseLinear):
                del piece  # and what it holds
                self._options.release()
        if self._refused:
            raise ValueError(f"{self._writer.name} cannot hold {self._complaints()}; dense=True writes them as floats")
        if not self._settings:
            raise ValueError(f"model={type(self.pieces.model).__name__}: has no layer that {self._writer.name} holds")

    def _held(self, layer: Held) -> None:
        try:
            encoded = self._writer.encode(layer, self._options.round_scales)
        except NotHeldError as error:
            self._floats(Other(layer.name, layer.module, str(layer.scheme), layer.shape, str(error)))
            self._left.append(layer.name)
            return
        if self._refused:  # nothing will be kept
            return
        nbytes = sum(self._add(f"{layer.name}.{name}", tensor) for name, tensor in encoded.tensors.items())
        if layer.module.bias is not None:
            nbytes += self._add(f"{layer.name}.bias", layer.module.bias)
        self._settings[layer.name] = encoded.setting
        self._rows.append(_row(layer, encoded, nbytes))

    def _other(self, piece: Other) -> None:
        if piece.linear:
            self._left.append(piece.name)
        self._floats(piece)

    def _floats(self, piece: Other) -> None:
        """Write what is no quantized layer of the format as floats, or note why it is refused."""
        if piece.why is not None and not self._options.dense:
            self._refused.setdefault(piece.why, []).append(piece.name)
            return
        new, nbytes = self.pieces.dense_of(piece.name, piece.module), 0
        for inner, module in named_modules(new):
            for slot in slots(f"{piece.name}.{inner}" if inner else piece.name, module):
                if slot.name not in self.pieces.tied:
                    nbytes += self._add(slot.name, slot.tensor)
        note = piece.why or "no format quantizes embeddings: rounded to the dtype of the model"
        self._rows.append(
            ExportedLayer(piece.name, piece.shape, piece.scheme, "dense", nbytes, dense=True, notes=(note,))
        )

    def _add(self, name: str, tensor: Tensor) -> int:
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name}: cannot be written; it has no values (lazy or on the meta device)")
        if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided:
            raise ValueError(f"{name}: cannot be written; it is a {tensor.dtype} of layout {tensor.layout}")
        return 0 if self._refused else self._shards.add(name, tensor)

    def _complaints(self) -> str:
        return "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}"
            for why, names in self._refused.items()
        )

    def report(self) -> ExportReport:
        notes = tuple(self._writer.notes(self.layers))
        return ExportReport(self._writer.name, tuple(self._rows), self._nbytes, notes)


def _row(layer: Held, encoded: Encoded, nbytes: int) -> ExportedLayer:
    return ExportedLayer(
        layer.name,
        layer.shape,
        str(layer.scheme),
        encoded.how,
        nbytes,
        sqnr_db=encoded.sqnr_db,
        notes=tuple(encoded.notes),
    )
