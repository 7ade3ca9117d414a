"""The language model that accuracy is measured on: it is the one that its record describes, and its parts are apart."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import nybble
from nybble.demo import DemoUnavailable
from nybble.demo.accuracy import language

FOLDER = Path(__file__).parent / "data" / "lm"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("safetensors") is None,
    reason="transformers or safetensors is not installed",
)


@pytest.fixture(scope="module")
def lm():
    return language.load(FOLDER)


def test_it_reads_english_it_has_not_seen(lm):
    found = nybble.evaluate(lm.model, None, lm.held_out_batches(32), "perplexity")
    recorded = torch.tensor(lm.facts["held_out_loss"]).exp().item()
    assert found.metrics["perplexity"].low < recorded < found.metrics["perplexity"].high
    assert found["perplexity"] < 30  # 2048 for one that knows nothing


def test_its_size_is_what_the_repository_can_carry(lm):
    parameters = sum(p.numel() for p in lm.model.parameters())
    assert 8e6 <= parameters <= 12e6
    assert (FOLDER / "model.safetensors").stat().st_size < 25e6
    widths = {size for p in lm.model.model.layers.parameters() if p.dim() == 2 for size in p.shape}
    assert all(width % 128 == 0 for width in widths)


def test_its_parts_are_apart_and_text(lm):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    rows = {tuple(row) for row in lm.held_out.tolist()}
    assert len(rows) == len(lm.held_out) == 256
    assert not rows & {tuple(row) for part in (lm.calibration, lm.teaching) for row in part.tolist()}
    text = tokenizer.decode(lm.held_out[0].tolist())
    assert tokenizer.encode(text).ids
    words = {w for row in lm.held_out[:8].tolist() for w in tokenizer.decode(row).split()}
    assert {"the", "of", "to", "is"} <= words


def test_its_record_is_whole(lm):
    assert lm.facts["seconds_on_2_cores"] <= 40 * 60
    assert len(lm.facts["corpus_sha256"]) == 64
    curve = lm.facts["curve"]
    assert curve[-1]["step"] == lm.facts["step"]
    assert curve[-1]["held_out"] < curve[0]["held_out"] - 1
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_batches_are_drawn_by_the_seed(lm):
    one, two, other = (torch.cat(lm.calibrating(16, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.cat(lm.held_out_batches(32)).shape == (32, 256)
    assert lm.teaching.unique(dim=0).shape == (2048, 256)


def test_a_folder_without_it_is_named(tmp_path):
    with pytest.raises(DemoUnavailable, match="has no language model"):
        language.load(tmp_path)
