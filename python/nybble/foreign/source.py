"""A path that a user named, and what its configuration files say of quantization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.files import CheckpointError
from .tensors import read_json

# Where libraries write how a model was quantized, besides config.json; the first that exists counts.
_CONFIGS = ("quantize_config.json", "quantization_config.json", "quant_config.json")


@dataclass(frozen=True)
class Source:
    """A file or a directory."""

    path: Path

    def has(self, name: str) -> bool:
        """Whether it is a directory with a file of that name."""
        return (self.path / name).is_file()

    def single(self, suffix: str) -> Path | None:
        """The file itself, or the only one in the directory, with that suffix."""
        if self.path.is_file():
            return self.path if self.path.suffix == suffix else None
        found = sorted(self.path.glob(f"*{suffix}"))
        if len(found) > 1:
            raise CheckpointError(f"{self.path}: has {len(found)} {suffix} files; name the one to read")
        return found[0] if found else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty if there is none."""
        return read_json(self.path / "config.json") if self.has("config.json") else {}

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """What the configuration says of quantization; empty if it says nothing."""
        for key in ("quantization_config", "compression_config"):
            if key in self.config:
                found = self.config[key]
                if not isinstance(found, dict):
                    raise CheckpointError(f"{self.path / 'config.json'}: {key}: must be an object")
                return found
        return next((read_json(self.path / name) for name in _CONFIGS if self.has(name)), {})

    @property
    def method(self) -> str:
        """The name of the quantization, or ""."""
        found = self.quantization.get("quant_method", self.quantization.get("method", ""))
        if not isinstance(found, str):
            raise CheckpointError(f"{self.path}: quant_method {found!r}: must be a string")
        return found

    def number(self, key: str, allowed: tuple[int, ...] | None = None, default: int | None = None) -> int:
        """A number of the quantization's configuration, such as its bits. Raises CheckpointError for another."""
        found = self.quantization.get(key, default)
        whole = isinstance(found, int) and not isinstance(found, bool) and -(1 << 31) <= found < 1 << 31
        if found is None or not whole or (allowed is not None and found not in allowed):
            rule = "must be a whole number" if allowed is None else f"must be one of {allowed}"
            raise CheckpointError(f"{self.path}: {key} {found!r}: {rule}")
        return int(found)

    def text(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """A word of the quantization's configuration. Raises CheckpointError for one that is not allowed."""
        found = self.quantization.get(key) or default
        if found not in allowed:
            raise CheckpointError(f"{self.path}: {key} {found!r}: must be one of {', '.join(allowed)}")
        return str(found)
