"""nybble.evaluate: each metric against its definition, its interval against theory, and data that is no good."""

import json
import math
import types

import pytest
import torch
from torch import nn

import nybble
from nybble.evaluate import bootstrap

VOCABULARY, WIDTH = 11, 8


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


class Tokens(nn.Module):
    """Logits of the next token from the last alone."""

    def __init__(self, seed=0, noise=0.0):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw))
        self.head.weight.data += noise * torch.randn(self.head.weight.shape, generator=draw)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return types.SimpleNamespace(logits=self.head(self.table(input_ids)), loss=None)


def ids(batches=6, rows=4, length=9, seed=1):
    return list(torch.randint(VOCABULARY, (batches, rows, length), generator=torch.Generator().manual_seed(seed)))


def logits(model, batch):
    return model(batch).logits.detach().double()


def test_perplexity_and_its_difference_are_those_of_the_definition():
    reference, model = Tokens(), Tokens(noise=0.3)
    data = ids()
    found = nybble.evaluate(model, reference, data, "perplexity")
    losses = {}
    for name, one in (("perplexity", model), ("reference_perplexity", reference)):
        log_p = torch.cat([torch.log_softmax(logits(one, b), -1)[:, :-1] for b in data])
        losses[name] = -log_p.gather(-1, torch.cat(data)[:, 1:, None]).mean().item()
        assert found[name] == pytest.approx(math.exp(losses[name]), rel=1e-6)
    assert found["delta_ln_ppl"] == pytest.approx(losses["perplexity"] - losses["reference_perplexity"], rel=1e-4)
    assert found.sequences == 24
    assert found.batches == 6


def test_each_token_counts_the_same_however_long_its_sequence_is():
    """One sequence of 3 tokens and one of 9: the metrics are means over tokens, not over sequences."""
    reference, model = Tokens(), Tokens(noise=0.3)
    data = [*ids(1, 1, 3, seed=2), *ids(1, 1, 9, seed=3)]
    found = nybble.evaluate(model, reference, data, ["perplexity", "kl"])
    ours, theirs = (torch.cat([torch.log_softmax(logits(one, b), -1)[0] for b in data]) for one in (model, reference))
    predicting = torch.tensor([True, True, False, *[True] * 8, False])  # the last of each sequence predicts nothing
    targets = torch.cat([b[0, 1:] for b in data])
    losses = -ours[predicting].gather(-1, targets[:, None])
    assert found["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-6)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)


def test_kl_and_cosine_are_those_of_the_definition():
    reference, model = Tokens(), Tokens(noise=0.3)
    data = ids()
    found = nybble.evaluate(model, reference, data, ["kl", "cosine"])
    p, q = (torch.cat([logits(one, b) for b in data]) for one in (reference, model))
    kl = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert found["cosine"] == pytest.approx(nn.functional.cosine_similarity(p, q, dim=-1).mean().item(), rel=1e-6)


def test_a_model_is_no_way_off_from_itself():
    model = Tokens()
    found = nybble.evaluate(model, model, ids(), ["perplexity", "kl", "cosine", "bytes"])
    assert found["delta_ln_ppl"] == 0
    assert found["kl"] == pytest.approx(0, abs=1e-7)
    assert found["cosine"] == pytest.approx(1)
    assert found["nbytes"] == found["reference_nbytes"] == 4 * (2 * VOCABULARY * WIDTH + VOCABULARY)


def test_padding_and_ignored_labels_do_not_count():
    reference, model = Tokens(), Tokens(noise=0.3)
    short = ids(length=5)
    padded = []
    for batch in short:
        wide = torch.cat([batch, torch.full((len(batch), 3), 7)], 1)
        padded.append({"input_ids": wide, "attention_mask": torch.arange(8).expand(len(batch), 8).lt(5).long()})
    metrics = ["perplexity", "kl", "cosine"]
    want, got = nybble.evaluate(model, reference, short, metrics), nybble.evaluate(model, reference, padded, metrics)
    for name in want.metrics:
        assert got[name] == pytest.approx(want[name], rel=1e-9), name
    labels = [
        {"input_ids": b["input_ids"], "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)}
        for b in padded
    ]
    assert nybble.evaluate(model, None, labels, "perplexity")["perplexity"] == pytest.approx(want["perplexity"])


def test_the_interval_is_the_normal_one_for_many_sequences():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = bootstrap.interval(lambda draws: values[draws].mean(-1), 400, seed=0)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.15 * half)


def test_intervals_are_of_sequences_and_the_same_for_a_seed():
    model, data = Tokens(), ids()
    one, two = (nybble.evaluate(model, None, data, "perplexity", seed=seed).metrics for seed in (0, 0))
    assert one == two
    assert nybble.evaluate(model, None, data, "perplexity", seed=1).metrics != one
    joined = nybble.evaluate(model, None, [torch.cat(data)], "perplexity").metrics
    assert joined["perplexity"].low == pytest.approx(one["perplexity"].low)
    single = nybble.evaluate(model, None, [data[0][:1]], "perplexity").metrics["perplexity"]
    assert (single.low, single.high) == (None, None)


def test_a_function_is_a_metric():
    def hits(output, batch):
        return (output.logits.argmax(-1) == batch).double().mean(1)

    def one(output, batch):
        return 1.0

    reference, model, data = Tokens(), Tokens(noise=4.0), ids()
    found = nybble.evaluate(model, reference, data, [hits, one])
    want = [
        torch.cat([(logits(m, b).argmax(-1) == b).double().mean(1) for b in data]).mean().item()
        for m in (model, reference)
    ]
    assert [found["hits"], found["reference_hits"]] == pytest.approx(want)
    assert found["one"] == 1
    with pytest.raises(ValueError, match="wrong returned 3 values for 4 sequences, must be 1 or 4"):
        nybble.evaluate(
            model, None, data, types.FunctionType((lambda o, b: torch.ones(3)).__code__, {"torch": torch}, "wrong")
        )


def test_all_metrics_at_once_print_and_are_json():
    found = nybble.evaluate(Tokens(noise=0.1), Tokens(), ids())
    names = {"perplexity", "reference_perplexity", "delta_ln_ppl", "kl", "cosine", "latency_ms", "speedup", "nbytes"}
    assert names <= set(found.metrics)
    assert found["latency_ms"] > 0
    if "peak_mb" in found.metrics:  # Linux
        assert found["peak_mb"] > 10
    data = json.loads(found.to_json())
    assert data["metrics"]["kl"]["value"] == found["kl"]
    assert "24 sequences in 6 batches" in str(found)
    assert all(name in str(found) for name in names)
    with pytest.raises(KeyError, match="not measured"):
        found["accuracy"]


def test_a_broken_model_shows_and_is_json():
    model = Tokens()
    model.head.weight.data.fill_(math.nan)
    found = nybble.evaluate(model, None, ids(), "perplexity")
    assert math.isnan(found["perplexity"])
    assert json.loads(found.to_json())["metrics"]["perplexity"]["value"] == "nan"


def test_the_models_are_left_as_they_were():
    model, reference = Tokens().train(), Tokens().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nybble.evaluate(model, reference, ids())
    assert model.training
    assert reference.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Vectors(nn.Linear):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


def test_vectors_without_tokens_have_a_cosine_and_no_perplexity():
    model, reference = Vectors(WIDTH, 5), Vectors(WIDTH, 5)
    x = torch.randn(7, WIDTH)
    found = nybble.evaluate(model, reference, [x], "cosine")
    want = nn.functional.cosine_similarity(model(x).double(), reference(x).double(), dim=-1).mean()
    assert found["cosine"] == pytest.approx(want.item(), rel=1e-6)
    with pytest.raises(ValueError, match="metrics='perplexity': needs token ids"):
        nybble.evaluate(model, reference, [x], "perplexity")


BAD = {
    "has NaN or Inf": {"x": torch.full((2, WIDTH), math.nan)},
    "is empty": {"x": torch.empty(0, WIDTH)},
    "has the keys other, but the first batch has the keys x": {"other": torch.ones(2, WIDTH)},
    "is str, must be a tensor, a tuple or a dict": "text",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_batch_is_an_error_or_is_counted(reason):
    model = Vectors(WIDTH, 5)
    good = [{"x": torch.randn(2, WIDTH)} for _ in range(2)]
    data = [good[0], BAD[reason], good[1], BAD[reason]]
    with pytest.raises(ValueError, match=rf"data\[1\]: {reason}"):
        nybble.evaluate(model, model, data, "cosine")
    found = nybble.evaluate(model, model, data, "cosine", on_bad="skip")
    assert found.skipped == {reason: 2}
    assert found.metrics == nybble.evaluate(model, model, good, "cosine").metrics
    assert f"2 batches left out: {reason}" in str(found)
    with pytest.raises(ValueError, match=r"none of its 1 batches is usable|is str|other"):
        nybble.evaluate(model, model, [BAD[reason]], "cosine", on_bad="skip")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"data": torch.ones(2, WIDTH)}, TypeError, "data=Tensor: must be an iterable"),
        ({"data": []}, ValueError, "data: none of its 0 batches is usable: it is empty"),
        ({"data": [(torch.ones(1), torch.ones(1), torch.ones(1))]}, ValueError, "does not fit Vectors.forward"),
        ({"metrics": "kl", "reference": None}, ValueError, "needs a reference"),
        ({"metrics": "bleu"}, ValueError, "metrics='bleu': must be one of 'perplexity'"),
        ({"metrics": ()}, ValueError, "at least one"),
        ({"metrics": ("kl", "kl")}, ValueError, "without duplicate names"),
        ({"on_bad": "ignore"}, ValueError, "on_bad='ignore'"),
        ({"model": "m"}, TypeError, "model=str: must be a torch.nn.Module"),
        ({"reference": "m"}, TypeError, "reference=str"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    model = Vectors(WIDTH, 5)
    given = {"model": model, "reference": model, "data": [torch.ones(2, WIDTH)], "metrics": "cosine", **arguments}
    with pytest.raises(error, match=words):
        nybble.evaluate(**given)
