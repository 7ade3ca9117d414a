"""nybble.sparsify: what is pruned, in which order, and what the report says of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.nn import Linear, SparseLinear
from nybble.passes.prune.masks import keep_mask, magnitude_scores
from nybble.report.data import Pruned
from nybble.report.report import Report
from nybble.report.speed import Speed
from nybble.testing.models import Stack, linears, snapshot, weight_of
from nybble.testing.models import sparsify_small as small
from nybble.testing.models import token_batches as ids
from nybble.weights.sparsity import NofM, Pattern

from .small_quantize import rows

PATTERNS = ["50%", "70%", "2:4", "32:128", "bs16x16:50%"]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def pruned_of(report: Report, name: str) -> Pruned:
    found = rows(report)[name].pruned
    assert found is not None
    return found


class TestSwap:
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_layers_become_sparse_and_stay_close(self, pattern: str, method: str) -> None:
        model = Stack(width=128)
        dense = copy.deepcopy(model)
        report = small(model, pattern, method=method)
        assert len(report.swapped) == 8
        form = Pattern.parse(pattern)
        for name, layer in linears(model).items():
            assert isinstance(layer, SparseLinear), name
            assert layer.scheme.sparsity == form.sparsity
            weight = weight_of(layer)
            if isinstance(form.sparsity, NofM):
                m = form.sparsity.m
                assert ((weight.view(len(weight), -1, m) != 0).sum(-1) <= form.sparsity.n).all()
            row = pruned_of(report, name)
            assert row.method == method
            assert row.kept == pytest.approx(1 - form.zeros, abs=0.07)
            assert row.error is not None
            assert row.error_dense is not None
            assert 0 < row.error_dense < 0.05
            assert row.error_dense < row.error < 1
        x = ids(seed=7)[0]
        assert 0 < (model(x) - dense(x)).norm() / dense(x).norm() < 1

    @pytest.mark.parametrize("scheme", ["w8a16", "w4a8g32", "w4a16g128", "w4a16"])
    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    def test_every_numbers(self, scheme: str, method: str) -> None:
        model = Stack()
        small(model, "2:4", scheme=scheme, method=method)
        assert {str(layer.scheme) for layer in linears(model).values()} == {f"sp24{scheme}"}  # type: ignore[attr-defined]

    def test_without_a_scheme_the_weights_change_in_place(self) -> None:
        model = Stack()
        layer, bias = model.head, model.head.bias
        report = small(model, "2:4", scheme=None)
        assert model.head is layer
        assert model.head.bias is bias
        assert model.head.weight.requires_grad
        assert (model.head.weight.view(8, -1, 4) != 0).sum(-1).max() == 2
        row = rows(report)["head"]
        assert (row.before, row.after, row.nbytes_before) == ("float32", "float32 sp24", row.nbytes_after)
        assert pruned_of(report, "head").error_dense == 0
        assert report.scheme == "sp24 floats"
        assert report.coverage == pytest.approx(
            100 * (1 - 50 * 32 / sum(p.numel() for p in model.parameters() if p.dim() > 1))
        )

    def test_magnitude_needs_no_data(self) -> None:
        model = Stack()
        weight = model.head.weight.detach().clone()
        report = small(model, "50%", method="magnitude", calibration=None, scheme=None)
        assert torch.equal(model.head.weight, weight * keep_mask(magnitude_scores(weight), Pattern.parse("50%")))
        assert pruned_of(report, "head").error is None

    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    def test_others_do(self, method: str) -> None:
        with pytest.raises(ValueError, match=f"method='{method}': needs calibration data; 'magnitude' needs none"):
            small(Stack(), method=method, calibration=None)

    def test_conv1d_and_dtypes(self) -> None:
        from transformers.pytorch_utils import Conv1D

        model = nn.Sequential(Conv1D(24, 32), nn.Linear(24, 16)).bfloat16()
        x = [torch.randn(64, 32).bfloat16()]
        plain = copy.deepcopy(model)
        small(plain, "2:4", scheme=None, calibration=x)
        assert ((plain[0].weight.T.reshape(24, -1, 4) != 0).sum(-1) == 2).all()
        small(model, "2:4", calibration=x)
        assert isinstance(model[0], SparseLinear)
        assert model(x[0]).dtype == torch.bfloat16

    def test_twins_stay_twins(self) -> None:
        model = Stack()
        model.blocks[2].up.weight = model.blocks[0].up.weight
        small(model, scheme=None)
        assert torch.equal(model.blocks[2].up.weight, model.blocks[0].up.weight)
        model = Stack()
        model.blocks[2].up.weight = model.blocks[0].up.weight
        report = small(model)
        assert rows(report)["blocks.2.up"].tied_to == "blocks.0.up"

    def test_a_weight_that_is_also_an_embedding_is_left_alone(self) -> None:
        class Tied(Stack):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(32, 50, bias=False)
                self.head.weight = self.embed.weight

        model = Tied()
        report = small(model)
        assert "shares its weight with embed.weight" in str(rows(report)["head"].reason)
        before = model.embed.weight.detach().clone()
        small(model, scheme=None, untie=True)
        assert torch.equal(model.embed.weight, before)
        assert (model.head.weight == 0).float().mean() == 0.5

    def test_speed_keeps_what_does_not_pay_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nybble.passes.measure import Timer

        model = Stack()
        before = snapshot(model)
        slow = Speed(0.5, 0.4, 0.6, 9)
        monkeypatch.setattr(Timer, "speeds", lambda timer, old, new, ms, left: dict.fromkeys(ms, slow))
        report = small(model, goal="speed", m=4)
        assert not report.swapped
        assert "slower here: 0.50x [0.40, 0.60] dense speed" in str(rows(report)["head"].reason)
        assert rows(report)["head"].pruned is None
        assert snapshot(model) == before


class TestPerLayer:
    def test_the_mean_is_what_was_asked_and_the_sensitive_stay_denser(self) -> None:
        model = Stack(width=64)
        with torch.no_grad():  # almost all of this layer is in a few weights: it can spare the rest
            model.blocks[0].up.weight[:, 5:].mul_(1e-3)
        report = small(model, "50%", per_layer=True, scheme=None)
        percents = {row.name: int(row.pruned.pattern[2:]) for row in report.layers if row.pruned}
        sizes = {name: layer.weight.numel() for name, layer in linears(model).items()}  # type: ignore[union-attr]
        mean = sum(percents[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert mean == pytest.approx(50, abs=1)
        assert percents["blocks.0.up"] == 60
        assert min(percents.values()) >= 40
        for name, layer in linears(model).items():
            assert (layer.weight == 0).float().mean().item() == pytest.approx(percents[name] / 100, abs=0.02)  # type: ignore[union-attr, operator]

    def test_it_is_for_unstructured_patterns(self) -> None:
        with pytest.raises(ValueError, match="per_layer=True, pattern='2:4': needs an unstructured pattern"):
            small(Stack(), "2:4", per_layer=True)

    def test_without_data_by_weight(self) -> None:
        report = small(Stack(), "50%", per_layer=True, method="magnitude", calibration=None)
        assert all(row.pruned for row in report.swapped)


class TestAlreadySparse:
    def masked(self, pattern: str) -> Stack:
        model = Stack(width=160)  # half of a row of 128 would be 64:128
        nybble.sparsify(model, pattern, method="magnitude", scheme=None)
        return model

    @pytest.mark.parametrize("pattern", ["50%", "2:4", "32:128", "bs16x16:50%"])
    @pytest.mark.parametrize("asked", ["auto", "same"])
    def test_it_is_packed_as_it_is(self, pattern: str, asked: str) -> None:
        model = self.masked(pattern)
        dense = copy.deepcopy(model)
        report = small(model, pattern if asked == "same" else asked, calibration=None, exclude="head")
        assert len(report.swapped) == 7
        for name, layer in linears(model).items():
            if name == "head":
                continue
            assert str(layer.scheme) == f"{Pattern.parse(pattern).sparsity}w8a8"  # type: ignore[attr-defined]
            alone = Linear.from_dense(dense.get_submodule(name), "w8a8")  # type: ignore[arg-type]
            assert torch.equal(weight_of(layer), weight_of(alone))
            assert pruned_of(report, name).method == "unchanged"

    def test_auto_leaves_dense_layers_alone(self) -> None:
        model = Stack()
        report = small(model, "auto", calibration=None)
        assert not report.swapped
        assert rows(report)["head"].reason == "its weight has none of the supported sparsity patterns"

    def test_layers_that_are_not_sparse_yet_are_pruned(self) -> None:
        model = self.masked("2:4")
        with torch.no_grad():
            model.head.weight.fill_(1.0)
        with pytest.raises(ValueError, match="needs calibration data"):
            small(model, "2:4", calibration=None)
        report = small(model, "2:4")
        assert [row.name for row in report.swapped if row.pruned and row.pruned.method == "wanda"] == ["head"]


class TestReport:
    def test_table_and_json(self) -> None:
        report = small(Stack(), "2:4", method="sparsegpt", calibration=ids(1))
        text = str(report)
        assert all(column in text for column in ("kept %", "method", "error %"))
        assert "49." in text or "50.00" in text
        assert "held-out calibration data" in text
        data = json.loads(report.to_json())
        head = next(layer for layer in data["layers"] if layer["name"] == "head")
        assert head["pruned"]["pattern"] == "sp24"
        assert head["pruned"]["kept"] == pytest.approx(0.5, abs=0.01)  # a code may round to 0
        assert 0 < head["pruned"]["error_dense"] < head["pruned"]["error"]
        assert data["scheme"] == "sp24 w8a8"

    def test_a_report_of_quantize_has_no_columns_of_pruning(self) -> None:
        report = nybble.quantize(Stack(), goal="memory")
        assert "kept %" not in str(report)
        assert json.loads(report.to_json())["layers"][0]["pruned"] is None


def _endless() -> Iterator[str]:
    yield "text"


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"pattern": "5:4"}, ValueError, "pattern='5:4'"),
        ({"pattern": 0.5}, TypeError, "pattern=0.5"),
        ({"method": "random"}, ValueError, "method='random': must be one of 'sparsegpt', 'wanda', 'magnitude'"),
        (
            {"scheme": "sp50w8a8"},
            ValueError,
            "scheme='sp50w8a8': must be dense, since pattern gives the sparsity; use 'w8a8'",
        ),
        ({"scheme": "w4a16g32asym"}, ValueError, "symmetric"),
        ({"scheme": "w4a16", "pattern": "bs16x16:50%"}, ValueError, "blocks are for w8a8"),
        ({"scheme": 8}, TypeError, "scheme=8"),
        ({"calibration": []}, ValueError, "calibration: has no batches"),
        ({"calibration": torch.ones(3)}, TypeError, "calibration=Tensor: must be an iterable of batches"),
        ({"calibration": "text"}, TypeError, "calibration=str"),
        ({"calibration": _endless()}, TypeError, r"calibration\[0\]=str: must be a tensor, a tuple or a dict"),
        ({"goal": "size"}, ValueError, "goal='size'"),
        ({"m": 0}, ValueError, "m=0"),
        ({"progress": 1}, TypeError, "progress=1: must be True, False or None"),
        ({"per_layer": 1}, TypeError, "per_layer=1"),
        ({"resume": 3}, TypeError, "resume=3: must be the path of a directory"),
        ({"include": "nothing*"}, ValueError, "matches no Linear layer"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], rule: str) -> None:
    model = Stack()
    before = snapshot(model)
    with pytest.raises(error, match=rule):
        small(model, **options)
    assert snapshot(model) == before


def test_the_model_itself_is_no_layer() -> None:
    with pytest.raises(ValueError, match="is itself a layer"):
        nybble.sparsify(nn.Linear(4, 4), "50%")


def test_progress_needs_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    small(Stack(), progress=True)
    assert capsys.readouterr().out == ""
