"""Layers that are alike but for their numbers in one row: `encoder.layer.{0..11}.attention.query`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from .data import LayerReport, Tried

# An index in a module's name.
_INDEX = re.compile(r"(?<![^.])(?:0|[1-9]\d*)(?![^.])")
# A number that stands alone in a note.
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w|\.\d)")


@dataclass(frozen=True)
class Row:
    """Layers that share a row of the table, and the name that stands for all of them."""

    name: str
    layers: tuple[LayerReport, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of the layers; a number that differs among them is a range."""
        return tuple(_merged(texts) for texts in zip(*map(notes_of, self.layers), strict=True))


def rows(layers: Iterable[LayerReport], fold: bool = True) -> list[Row]:
    """One row for each set of layers that differ in nothing but an index in their name, and in measured numbers.

    Layers of one row have the same outcome: kind, shape, scheme, kernel, reason, and the M at which they are slower.
    """
    alike: dict[Hashable, list[LayerReport]] = {}
    for i, layer in enumerate(layers):
        alike.setdefault(_outcome(layer) if fold else i, []).append(layer)
    found = []
    for group in alike.values():
        by_name = {layer.name: layer for layer in group}
        if len(by_name) == 1 or len(by_name) < len(group):
            found += [Row(" = ".join((layer.name, *layer.also)), (layer,)) for layer in group]
        else:
            found += [Row(name, tuple(by_name[full] for full in names)) for name, names in fold_names(by_name).items()]
    return found


def fold_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Patterns such as "layers.{0..3,7}.fc" -> the names that each stands for, which are all those of the pattern."""
    found: dict[str, dict[tuple[int, ...], str]] = {}
    for name in names:
        found.setdefault(_INDEX.sub("*", name), {})[tuple(map(int, _INDEX.findall(name)))] = name
    patterns = {}
    for by_index in found.values():
        for sets in _products(by_index):
            members = [by_index[index] for index in product(*sets)]
            parts = [*map(_listed, sets), ""]
            places = _INDEX.split(members[0])
            patterns["".join(text + part for text, part in zip(places, parts, strict=True))] = members
    return patterns


def _products(indices: Collection[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Products of sets of indices which share none and together are exactly those that are given."""
    if not all(indices):
        return [()]
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in sorted(indices):
        rests.setdefault(first, set()).add(tuple(rest))
    same: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, others in rests.items():
        same.setdefault(frozenset(others), []).append(first)
    return [(tuple(firsts), *more) for others, firsts in same.items() for more in _products(others)]


def _listed(values: Sequence[int]) -> str:
    """ "3", or "{0..2,7}"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    if len(values) == 1:
        return str(values[0])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(parts)}}}"


def _outcome(layer: LayerReport) -> Hashable:
    """Equal for layers that may share a row."""
    pruned, rounded = layer.pruned, layer.rounded
    made = [
        (part.method, part.error is None, *(getattr(part, name, None) is None for name in ("error_dense", "error_rtn")))
        for part in (pruned, rounded)
        if part is not None
    ]
    return (
        _INDEX.sub("*", layer.name),
        (layer.also, layer.tied_to, layer.kind, layer.shape, layer.before, layer.after, layer.kernel),
        (layer.reason, layer.slower_at, layer.undecided_at, tuple(layer.speeds)),
        layer.sqnr_db if layer.sqnr_db is None or math.isinf(layer.sqnr_db) else 0.0,
        (pruned is None, pruned and pruned.pattern, rounded is None, *made),
        tuple(_NUMBER.sub("#", note) for note in notes_of(layer)),
    )


def _merged(texts: Sequence[str]) -> str:
    """One text of several that differ in numbers."""
    numbers = iter(zip(*(_NUMBER.findall(text) for text in texts), strict=True))

    def spanned(_: re.Match[str]) -> str:
        found = next(numbers)
        least, most = min(found, key=float), max(found, key=float)
        return least if least == most else f"{least}-{most}"

    return _NUMBER.sub(spanned, texts[0])


def notes_of(layer: LayerReport) -> list[str]:
    """What is to be said of a layer beside its numbers."""
    if layer.reason is not None:
        return [f"left alone: {layer.reason}", *map(_said, layer.tried)]
    notes = [f"tied to {layer.tied_to}"] if layer.tied_to else []
    if layer.slower_at:
        notes.append(f"slower at M={', '.join(map(str, layer.slower_at))}")
    if layer.undecided_at:
        notes.append(f"no difference to dense at M={', '.join(map(str, layer.undecided_at))}")
    if "," in (layer.kernel or ""):
        notes.append(f"kernels, by M: {layer.kernel}")
    if layer.pruned is not None:
        gain = layer.pruned.permutation_gain
        notes += [f"inputs permuted: {100 * gain:.2f} % more magnitude kept"] if gain is not None else []
        notes += layer.pruned.notes
    if layer.rounded is not None:
        notes += layer.rounded.notes
    return [*notes, *map(_said, layer.tried)]


def _said(tried: Tried) -> str:
    """ "w8a7 taken: output error 0.0152, 2.10 times dense speed [2.05, 2.15]"."""
    if tried.error is None:
        return f"{tried.scheme} not taken: {tried.why}"
    facts = f"output error {tried.error:.4f}"
    if tried.speed is not None:
        low, high = tried.speed.low, tried.speed.high
        facts += f", {tried.speed.ratio:.2f} times dense speed [{low:.2f}, {high:.2f}]"
    return f"{tried.scheme} taken: {facts}" if tried.why is None else f"{tried.scheme} not taken, {tried.why}: {facts}"
