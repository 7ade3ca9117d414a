"""`nybble quantize`: apply a recipe to a model directory and write a directory that `nybble.load` reads."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..checkpoint.io import save
from ..passes.optimize import Optimized, optimize
from ..recipe.recipe import Recipe
from . import CommandFailed
from .model_dir import CONFIG, load_model, load_texts
from .output import check_out, written_at_once


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="recipe file, .yaml or .json")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="transformers model: config.json and safetensors"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output directory, new or empty")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text file whose paragraphs are the calibration data"
    )
    parser.add_argument(
        "--texts", type=int, default=128, metavar="N", help="how many paragraphs to use, evenly spaced (128)"
    )
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="maximum tokens per paragraph (512)")


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed, and then writes nothing to --out."""
    check_out(args.out)
    try:
        recipe = Recipe.load(args.recipe)
        model = load_model(args.model)
        done = optimize(model, recipe, calibration=_calibration(args))
        _write(args, model, done)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    print(done.to_json() if args.json else done)


def _calibration(args: Namespace) -> list[dict[str, Any]] | None:
    if args.calibration is None:
        return None
    for name in ("texts", "tokens"):
        if getattr(args, name) < 1:
            raise CommandFailed(f"--{name} {getattr(args, name)}: must be at least 1")
    found = [part.strip() for part in re.split(r"\n\s*\n", args.calibration.read_text(encoding="utf-8"))]
    found = [part for part in found if part]
    if not found:
        raise CommandFailed(f"--calibration {args.calibration}: has no text")
    count = min(args.texts, len(found))
    return load_texts(args.model, [found[i * len(found) // count] for i in range(count)], args.tokens)


def _write(args: Namespace, model: Any, done: Optimized) -> None:
    with written_at_once(args.out) as aside:
        save(model, aside)
        _write_config(args.model / CONFIG, aside / CONFIG, model)
        done.recipe.save(aside / "recipe.json")
        (aside / "report.json").write_text(done.to_json(), encoding="utf-8")


def _write_config(old: Path, new: Path, model: Any) -> None:
    """Copy config.json; set tie_word_embeddings to false if the head was untied."""
    text = old.read_text(encoding="utf-8")
    config = json.loads(text)
    if getattr(model.config, "tie_word_embeddings", None) is False and config.get("tie_word_embeddings") is not False:
        text = json.dumps({**config, "tie_word_embeddings": False}, indent=2)
    new.write_text(text, encoding="utf-8")
