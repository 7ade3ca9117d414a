"""`nybble demo --accuracy`: run all steps, print a table and write an HTML page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from time import perf_counter

import torch

from ... import __version__
from ...dispatch import targets
from ...model.bar import bar
from ..table import show_table
from .language import FOLDER, load
from .page import write
from .steps import HEADERS, STEPS, UNIFORM, Sizes, Story, rows, tell

FULL, QUICK = Sizes(), Sizes(held_out=16, planned=8, calibration=16, distilling=32)
WORST = 3  # layers listed below the table


def main(quick: bool, as_json: bool, page: Path, folder: Path = FOLDER) -> None:
    """Run all steps, print the table or JSON, and write the page."""
    start = perf_counter()
    language = load(folder)
    with bar(STEPS) as advance:
        story = tell(language, QUICK if quick else FULL, advance)
    heading = _heading(story, language.facts)
    write(page, story, heading)
    if as_json:
        print(_json(story))
        return
    print(*heading, "", sep="\n")
    show_table(HEADERS, list(rows(story)), right=(1, 2, 3, 5, 6))
    print("\nLargest harm, each layer alone:", *_worst(story), sep="\n  ")
    print(f"\n{page}: the same with a plot. {perf_counter() - start:.0f} seconds in total.")


def _heading(story: Story, facts: dict[str, object]) -> list[str]:
    count = story.steps[0].found.sequences
    return [
        f"A language model of 9.6 M parameters, evaluated on {count} held-out sequences of 256 tokens",
        f"(dense: {math.exp(float(str(facts['held_out_loss']))):.2f} perplexity on all 256 of them).",
        f"{targets.detect().cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, nybble {__version__}",
    ]


def _worst(story: Story) -> list[str]:
    harms = {
        one.name: one.effects[UNIFORM].harm.value for one in story.plan.sensitivity.layers if UNIFORM in one.effects
    }
    worst = sorted(harms, key=lambda name: -harms[name])[:WORST]
    return [f"{name}: KL {harms[name]:.1e} in {UNIFORM}; planned: {story.plan.chosen.schemes[name]}" for name in worst]


def _json(story: Story) -> str:
    steps = [
        {"name": step.name, "megabytes": step.megabytes, **json.loads(step.found.to_json())} for step in story.steps
    ]
    return json.dumps({"steps": steps, "plan": json.loads(story.plan.to_json())}, indent=2)
