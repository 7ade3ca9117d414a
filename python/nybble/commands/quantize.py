"""`nybble quantize`: quantize the model in a directory and write a directory that `nybble.load` reads."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from torch import nn

from ..model import options
from ..passes.optimize import optimize
from ..passes.prune import weight as pruning
from ..passes.round.methods import METHODS
from ..recipe.recipe import DENSE, Recipe
from . import CommandFailed
from .model_dir import load_model, load_texts, read_config
from .output import check_out, written_model

EXAMPLES = """\
examples:
  nybble quantize DIR --scheme w4a8g128 --out OUT
  nybble quantize DIR --scheme w4a8g128 --method gptq --calibration text.txt --out OUT
  nybble quantize DIR --recipe recipe.json --out OUT"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("path", type=Path, metavar="DIR", help="transformers model: config.json and safetensors")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scheme", type=_scheme, metavar="NAME", help="of every layer, such as w4a8g128 or sp24w8a8")
    what.add_argument("--recipe", type=Path, metavar="FILE", help="recipe file, .yaml or .json")
    add("--out", type=Path, required=True, metavar="OUT", help="output directory, new or empty")
    add(
        "--method",
        choices=(*METHODS, *pruning.METHODS),
        help="with --scheme: how weights are rounded (rtn), or of a sparse scheme pruned (wanda)",
    )
    add(
        "--exclude",
        action="append",
        metavar="GLOB",
        help="with --scheme: names of layers that stay dense; may be repeated",
    )
    add("--goal", choices=options.GOALS, help="with --scheme: which layers are replaced (memory: all, untimed)")
    add("--calibration", type=Path, metavar="FILE", help="text file whose paragraphs are the calibration data")
    add("--texts", type=int, default=128, metavar="N", help="how many paragraphs to use, evenly spaced (128)")
    add("--tokens", type=int, default=512, metavar="N", help="maximum tokens per paragraph (512)")
    parser.set_defaults(wrong_usage=parser.error)
    parser.epilog, parser.formatter_class = EXAMPLES, RawDescriptionHelpFormatter


def run(args: Namespace) -> None:
    """Run the command. Raises CommandFailed, and then writes nothing to --out."""
    for name in ("method", "exclude", "goal"):
        if args.recipe is not None and getattr(args, name) is not None:
            args.wrong_usage(f"argument --{name}: not allowed with argument --recipe, which has its own")
    check_out(args.out)
    try:
        recipe = Recipe.load(args.recipe) if args.recipe is not None else _recipe(args)
        model = load_model(args.path)
        done = optimize(model, recipe, calibration=_calibration(args))
        with written_model(args.out, model, _config(args.path, model), args.path, done) as aside:
            done.recipe.save(aside / "recipe.json")
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandFailed(" ".join(str(error).split())) from error
    print(done.to_json() if args.json else done)


def _scheme(name: str) -> str:
    try:
        Recipe.of_schemes({"*": name})
    except (ValueError, TypeError) as error:
        raise ArgumentTypeError(" ".join(str(error).split())) from error
    return name


def _recipe(args: Namespace) -> Recipe:
    """The recipe that the options stand for."""
    more = {"goal": args.goal or "memory"} | ({} if args.method is None else {"method": args.method})
    schemes = {**dict.fromkeys(args.exclude or (), DENSE), "*": args.scheme}
    return Recipe.of_schemes(schemes, quantize=more, sparsify=more)


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
    return load_texts(args.path, [found[i * len(found) // count] for i in range(count)], args.tokens)


def _config(directory: Path, model: nn.Module) -> dict[str, Any]:
    """config.json, with tie_word_embeddings false if the head was untied."""
    config = read_config(directory)
    untied = getattr(model.config, "tie_word_embeddings", None) is False
    return config | ({"tie_word_embeddings": False} if untied else {})
