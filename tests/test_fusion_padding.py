"""`nybble.fuse(skip_padding=True)`: rows of padding are not computed, and all others are what they were."""

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

import nybble
from nybble.fusion import padding
from nybble.fusion.block import fused_modules
from nybble.fusion.nodes import Run

from .fusion_zoo import ids, make, run

LENGTHS = (29, 3, 17, 40, 17, 8, 1, 30)


def batch(lengths, left=False):
    length = max(lengths)
    inside = torch.arange(length) < torch.tensor(lengths)[:, None]
    return ids(len(lengths), length), inside.flip(1) if left else inside


def bert_call(lengths, left=False):
    tokens, inside = batch(lengths, left)
    call = {"input_ids": tokens, "attention_mask": inside.long()}
    return {**call, "token_type_ids": torch.zeros_like(tokens)}, inside


def fused(model, example, scheme="w8a16", **options):
    nybble.quantize(model, scheme, goal="memory")
    nybble.fuse(model, [example], goal="always", **options)
    assert fused_modules(model)
    return model


def check(found, expected, scheme="w8a16"):
    """Attention sums fewer terms, in another order. That can move a rounded activation by one step."""
    if scheme == "w8a8":
        assert (found - expected).norm() <= 0.02 * expected.norm()
    else:
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def rows_run(monkeypatch):
    """How many rows the chains of later calls have."""
    found, compute = [], nybble.fusion.lower.Lowered._compute

    def counted(self, run):
        found.append(run.batch * run.length)
        compute(self, run)

    monkeypatch.setattr(nybble.fusion.lower.Lowered, "_compute", counted)
    return found


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(padding, "_GROUP_ROWS", 4)
    monkeypatch.setattr(padding, "_SEQUENCES", 2)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_bert(monkeypatch, scheme):
    call, inside = bert_call(LENGTHS)
    model = make("bert with types")
    skips = fused(copy.deepcopy(model), call, scheme, skip_padding=True)
    expected = run(fused(model, call, scheme), call)
    rows = rows_run(monkeypatch)
    found = run(skips, call)
    assert sum(LENGTHS) <= sum(rows) < 0.7 * inside.numel()
    check(found[inside], expected[inside], scheme)
    beyond = torch.arange(inside.shape[1]) >= torch.tensor([29, 3, 29, 40, 17, 17, 3, 40])[:, None]
    assert not found[beyond & ~inside].any()


def test_encoder_of_hidden_states(monkeypatch):
    tokens, inside = batch(LENGTHS)
    hidden = torch.randn(*tokens.shape, 64)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    call = (hidden, None, ~inside)
    skips = fused(copy.deepcopy(model), call, skip_padding=True)
    expected = run(fused(model, call), call)
    rows = rows_run(monkeypatch)
    given = inside.clone()
    found = run(skips, call)
    assert torch.equal(inside, given)
    assert rows
    assert sum(rows) < 0.7 * inside.numel()  # all layers are one program
    check(found[inside], expected[inside])


def test_rotated_and_causal(monkeypatch):
    tokens, inside = batch(LENGTHS)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
    )
    model = transformers.LlamaModel(config).eval()
    call = {"inputs_embeds": torch.randn(*tokens.shape, 64), "attention_mask": inside.long(), "use_cache": False}
    skips = fused(copy.deepcopy(model), call, skip_padding=True)
    expected = run(fused(model, call), call)
    rows = rows_run(monkeypatch)
    found = run(skips, call)
    assert rows
    assert sum(rows) < 2 * 0.7 * inside.numel()
    check(found[inside], expected[inside])


@pytest.mark.parametrize(("lengths", "left"), [((40,) * 8, False), (LENGTHS, True), ((39,), False)])
def test_nothing_to_skip(monkeypatch, lengths, left):
    call, _ = bert_call(lengths, left)
    model = make("bert with types")
    skips = fused(copy.deepcopy(model), call, skip_padding=True)
    expected = run(fused(model, call), call)
    rows = rows_run(monkeypatch)
    assert torch.equal(run(skips, call), expected)
    assert len(rows) <= 1


def test_copies_skip_too(monkeypatch):
    call, inside = bert_call(LENGTHS)
    skips = copy.deepcopy(fused(make("bert with types"), call, skip_padding=True))
    run(skips, call)  # watched
    rows = rows_run(monkeypatch)
    run(skips, call)
    assert sum(rows) < 0.7 * inside.numel()


def visible(*rows):
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (visible((1, 1, 0), (1, 0, 0))[:, None, None], [2, 1]),
        (visible((0, 1, 0), (0, 0, 0))[:, None, None], [2, 3]),  # attends to none: perhaps to all
        (visible((1, 1, 0))[:, None, None], [2, 2]),
        (torch.tensor([[0.5, -1.0, -torch.inf], [0.0, torch.finfo(torch.float32).min, 0.0]])[:, None, None], [2, 3]),
        (visible((1, 0, 0), (1, 1, 0), (1, 1, 0))[None, None], [2, 2]),  # causal, one key less
        (visible((0, 0, 0), (1, 1, 0), (1, 1, 0))[None, None], [3, 3]),  # the first query attends to none
        (visible((1, 1, 0), (1, 1, 0), (0, 0, 0))[None, None], [2, 2]),  # none that stays
        (torch.stack([visible((1, 0, 0)), visible((1, 1, 0))])[None], [2, 2]),  # of two heads
    ],
)
def test_seen(mask, expected):
    assert padding.seen(mask, Run(2, 3, {}, {})).tolist() == expected


def test_wrong_option():
    with pytest.raises(TypeError, match="skip_padding=1: must be True or False"):
        nybble.fuse(torch.nn.Linear(2, 2), skip_padding=1)
