"""The text that the model reads: what the standard library and the installed packages say of themselves in English.

A document is what one source file says in its docstrings, one topic of ``help()``, or one file of documentation or
licence. Paragraphs that are code, tables or lists of names are left out, and so is every paragraph that came before.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

_PROSE = re.compile(r"[A-Za-z ,.;:'\"()\n-]")
_DOCUMENTATION = re.compile(r"(METADATA|LICEN[CS]E.*|COPYING.*|NOTICE.*|.*\.(rst|md))$", re.IGNORECASE)
_PARTS = {"held_out": 3, "calibration": 3}  # percent of the documents
_LEAST = 60  # characters of a string that is read
_SHINGLE, _MOST_SEEN = 8, 0.2  # words in a run; share of runs that the training text may have too


class Document(NamedTuple):
    """name: package and file; paragraphs: its text, one line break at most between words."""

    name: str
    paragraphs: list[str]


class Corpus(NamedTuple):
    """The parts, apart by document, and what stands in them."""

    train: list[Document]
    held_out: list[Document]
    calibration: list[Document]

    @property
    def sha256(self) -> str:
        """Of all text, in its order."""
        digest = hashlib.sha256()
        for part in self:
            for document in part:
                digest.update("\n\n".join([document.name, *document.paragraphs, ""]).encode())
        return digest.hexdigest()


def read() -> Corpus:
    """All documents of this Python, in the order of their names within a package, apart by a hash of the name."""
    seen: set[bytes] = set()
    parts: dict[str, list[Document]] = {"train": [], "held_out": [], "calibration": []}
    for name, text in _documents():
        kept = [paragraph for paragraph in _paragraphs(text) if _is_prose(paragraph) and _is_new(paragraph, seen)]
        if kept:
            parts[_part(name)].append(Document(name, kept))
    known = {shingle for document in parts["train"] for text in document.paragraphs for shingle in _shingles(text)}
    for part in _PARTS:
        fresh = [Document(name, [p for p in text if _is_unseen(p, known)]) for name, text in parts[part]]
        parts[part] = [document for document in fresh if document.paragraphs]
    return Corpus(**parts)


def _documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the topics of help(), then of each file of the standard library, then of each package."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(library).parts):
            yield f"stdlib/{path.relative_to(library)}", texts(path)
    packages = {package.name.lower(): package for package in distributions() if package.name.lower() != "nybble"}
    for _, package in sorted(packages.items()):
        for file in sorted(package.files or (), key=str):
            path = Path(str(file.locate()))
            if ".." in file.parts or "tests" in file.parts or not path.is_file():
                continue
            if file.suffix == ".py":
                yield f"{package.name}/{file}", texts(path)
            elif _DOCUMENTATION.fullmatch(file.name):
                yield f"{package.name}/{file.name}", path.read_text(encoding="utf-8", errors="replace")


def texts(path: Path) -> str:
    """The strings of 60 characters and more in a source file, in their order: its docstrings, for the most part.

    "" where it is no source of this Python.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    long = sorted((node.lineno, node.col_offset, node.value) for node in strings if len(node.value) >= _LEAST)
    return "\n\n".join(inspect.cleandoc(text) for _, _, text in long)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield re.sub(r"[ \t]*\n[ \t]*", "\n", re.sub(r"[ \t]+", " ", paragraph)).strip()


def _is_prose(text: str) -> bool:
    """Whether it reads as sentences."""
    words = len(re.findall(r"\b[a-z]{2,}\b", text))
    return (
        words >= 8
        and ">>>" not in text
        and text.isascii()
        and len(_PROSE.findall(text)) >= 0.93 * len(text)
        and len(re.findall(r"\b(the|a|an|of|to|is|in|and|or|for|that|be|this)\b", text, re.IGNORECASE)) >= 0.12 * words
    )


def _is_new(text: str, seen: set[bytes]) -> bool:
    key = hashlib.blake2b(" ".join(re.findall(r"[a-z]+", text.lower())).encode(), digest_size=12).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def _part(name: str) -> str:
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    for part, percent in _PARTS.items():
        if draw < percent:
            return part
        draw -= percent
    return "train"


def _shingles(text: str) -> set[int]:
    words = re.findall(r"[a-z]+", text.lower())
    return {hash(tuple(words[i : i + _SHINGLE])) for i in range(len(words) - _SHINGLE + 1)}


def _is_unseen(text: str, known: set[int]) -> bool:
    """Whether few of its runs of words stand in what the model trains on: licences and docstrings repeat with changes."""
    mine = _shingles(text)
    return bool(mine) and len(mine & known) <= _MOST_SEEN * len(mine)
