"""`nybble demo --accuracy`: the story on the language model, small."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from nybble.__main__ import main
from nybble.demo.accuracy import language, page, run, steps

FOLDER = Path(__file__).parent / "data" / "lm"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("safetensors") is None,
    reason="transformers or safetensors is not installed",
)


@pytest.fixture(scope="module")
def story(narrow_llama):
    """The whole of it on a model that knows nothing."""
    ids = torch.randint(64, (2, 16, 32), generator=torch.Generator().manual_seed(0))
    narrow = language.Language(narrow_llama, ids[0], ids[1], ids[1], {})
    told = []
    found = steps.tell(narrow, steps.Sizes(held_out=8, planned=8, calibration=16, distilling=16), told.append)
    assert len(told) == steps.STEPS
    return found


def test_the_story_has_every_model_and_its_loss(story):
    names = [step.name for step in story.steps]
    assert names[:2] == [steps.DENSE, steps.RTN]
    assert any("gptq" in name for name in names)
    assert story.steps[0].found["delta_ln_ppl"] == 0
    assert all(step.megabytes < 0.7 * story.steps[0].megabytes for step in story.steps[1:])
    planned = next(step for step in story.steps if step.name.startswith("plan"))
    nearest = next(step for step in story.steps if step.name == steps.RTN)
    assert planned.megabytes <= nearest.megabytes
    assert story.share(nearest) == 1


def test_its_page_is_whole(story, tmp_path):
    page.write(tmp_path / "page.html", story, ["a <heading>"])
    text = (tmp_path / "page.html").read_text()
    assert "a &lt;heading&gt;" in text
    assert all(step.name in text for step in story.steps)
    assert all(layer.name in text for layer in story.plan.sensitivity.layers)
    if importlib.util.find_spec("matplotlib"):
        assert "data:image/png;base64," in text


def test_it_prints_a_table_or_json(story, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "tell", lambda *_: story)
    target = tmp_path / "page.html"
    run.main(True, False, target, FOLDER)
    shown = capsys.readouterr().out
    assert all(step.name in shown for step in story.steps)
    assert "Largest harm, each layer alone:" in shown
    assert target.exists()
    run.main(True, True, target, FOLDER)
    assert len(json.loads(capsys.readouterr().out)["steps"]) == len(story.steps)


def test_without_the_model_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--accuracy"]) == 1
    assert "has no language model" in capsys.readouterr().err
