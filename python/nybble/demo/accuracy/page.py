"""The results as one HTML page with a plot."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .steps import DENSE, HEADERS, Story, rows

_STYLE = (
    "body{font:15px system-ui;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto;font-size:12px}"
)


def plot(story: Story) -> bytes | None:
    """A plot of the loss of each model and the harm of each layer, as PNG; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [step for step in story.steps if step.name != DENSE]
    for place, step in enumerate(steps):
        loss = step.found.metrics["delta_ln_ppl"]
        left.barh(place, loss.value, color="C0")
        if loss.low is not None and loss.high is not None:
            left.plot((loss.low, loss.high), (place, place), color="black")
    left.set_yticks(range(len(steps)), [f"{step.name}\n{step.megabytes:.1f} MB" for step in steps], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("d ln perplexity, held-out text")
    found = story.plan.sensitivity
    for scheme in found.schemes:
        known = [
            (i, layer.effects[scheme].harm.value) for i, layer in enumerate(found.layers) if scheme in layer.effects
        ]
        right.plot([value for _, value in known], [i for i, _ in known], "o", label=scheme, markersize=4)
    right.set_yticks(range(len(found.layers)), [layer.name for layer in found.layers], fontsize=6)
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xlabel("KL by this layer alone, nats per token")
    right.legend(fontsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def write(path: Path, story: Story, heading: Sequence[str]) -> None:
    """Write one page with the table, the plot, the plan, and the harm of each layer."""
    image = plot(story)
    shown = (
        "<p>No plot: matplotlib is not installed.</p>"
        if image is None
        else f'<img alt="loss of each model, harm of each layer" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>" for cells in rows(story))
    text = "".join(f"<p>{escape(line)}</p>" for line in heading)
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>nybble: accuracy</title><style>{_STYLE}</style>'
        f"<h1>What quantization costs</h1>{text}<table><tr>{head}</tr>{body}</table>{shown}"
        f"<h2>The plan</h2><pre>{escape(str(story.plan))}</pre>"
        f"<h2>Each layer alone</h2><pre>{escape(str(story.plan.sensitivity))}</pre>",
        encoding="utf-8",
    )
