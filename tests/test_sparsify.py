"""nybble.sparsify: what is pruned, in which order, and what the report says of it."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.nn import Linear, SparseLinear
from nybble.passes.prune.masks import keep_mask, magnitude_scores, wanda_scores
from nybble.report import LayerReport, Pruned, Report
from nybble.sparsity import NofM, Pattern
from nybble.testing import Stack
from nybble.testing import token_batches as ids

PATTERNS = ["50%", "70%", "2:4", "32:128", "bs16x16:50%"]


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def small(model: nn.Module, pattern: Any = "50%", **kwargs: Any) -> Report:
    return nybble.sparsify(model, pattern, **{"goal": "memory", "calibration": ids(), **kwargs})


def rows(report: Report) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in report.layers}


def pruned_of(report: Report, name: str) -> Pruned:
    found = rows(report)[name].pruned
    assert found is not None
    return found


def weight_of(layer: nn.Module) -> Tensor:
    return layer.dequantized_weight() if isinstance(layer, Linear) else layer.weight.detach()  # type: ignore[union-attr, operator, return-value]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Linear))}


def snapshot(model: nn.Module) -> list[tuple[str, int, bool]]:
    return [
        *((name, id(module), module.training) for name, module in model.named_modules()),
        *((name, id(tensor), False) for name, tensor in model.named_parameters()),
        *((name, tensor.sum().item(), False) for name, tensor in model.named_parameters()),
    ]


def inputs_of(model: nn.Module, names: list[str], data: Tensor) -> dict[str, Tensor]:
    """The rows that the named layers multiply when the model runs."""
    seen: dict[str, Tensor] = {}
    layers = {model.get_submodule(name): name for name in names}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layers[layer]: args[0].flatten(0, -2)}))
        for layer in layers
    ]
    with torch.no_grad():
        model(data)
    for hook in hooks:
        hook.remove()
    return seen


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
        with pytest.raises(ValueError, match=f"method='{method}': needs calibration data; 'magnitude' works without"):
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
        from nybble.passes import measure

        model = Stack()
        before = snapshot(model)
        monkeypatch.setattr(measure, "speedups", lambda dense, layer, kernels: dict.fromkeys(kernels, 0.5))
        report = small(model, goal="speed", m=4)
        assert not report.swapped
        assert "slower here: 0.50x dense speed" in str(rows(report)["head"].reason)
        assert rows(report)["head"].pruned is None
        assert snapshot(model) == before


class TestOrder:
    def test_wanda_sees_what_the_pruned_layers_before_put_out(self) -> None:
        model = Stack(depth=2)
        original, data = copy.deepcopy(model), ids(1)
        small(model, "50%", scheme=None, calibration=data)
        manual = copy.deepcopy(original)
        for stage in (["first"], ["blocks.0.up", "blocks.0.down"], ["blocks.1.up", "blocks.1.down"], ["head"]):
            seen = inputs_of(manual, stage, data[0])
            for name in stage:
                rows_used = [i for i in range(len(seen[name])) if i % 8 != 7]  # one in eight is held out
                layer = manual.get_submodule(name)
                scores = wanda_scores(layer.weight, seen[name][rows_used].double().norm(dim=0))
                with torch.no_grad():
                    layer.weight.mul_(keep_mask(scores, Pattern.parse("50%")))
        for name, tensor in manual.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name

    def test_sparsegpt_sees_the_dense_models_inputs_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nybble.passes.layerwise.inputs import Inputs

        model, data = Stack(depth=3), ids(1)
        wanted = inputs_of(model, ["blocks.0.up", "blocks.2.down"], data[0])
        seen: list[Tensor | None] = []
        original = Inputs.add

        def watching(self: Inputs, x: Tensor, dense: Tensor | None = None) -> None:
            seen.append(dense)
            original(self, x, dense)

        monkeypatch.setattr(Inputs, "add", watching)
        small(model, method="sparsegpt", scheme=None, calibration=data)
        # first; up and down of each block; head, whose dense inputs are gone by then.
        assert [dense is not None for dense in seen] == [False, True, True, True, True, True, True, False]
        assert seen[1] is not None
        assert seen[6] is not None
        assert torch.equal(seen[1], wanted["blocks.0.up"])
        assert torch.equal(seen[6], wanted["blocks.2.down"])

    def test_padding_does_not_count(self) -> None:
        tokens = ids(1)[0]
        padded = torch.cat((tokens, torch.zeros_like(tokens)), dim=1)
        mask = torch.cat((torch.ones_like(tokens), torch.zeros_like(tokens)), dim=1)
        a, b, c = Stack(), Stack(), Stack()
        b.load_state_dict(a.state_dict())
        c.load_state_dict(a.state_dict())
        small(a, scheme=None, calibration=[tokens])
        small(b, scheme=None, calibration=[{"ids": padded, "attention_mask": mask}])
        small(c, scheme=None, calibration=[{"ids": padded}])
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
        assert any(not torch.equal(tensor, c.state_dict()[name]) for name, tensor in a.state_dict().items())

    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"ids": x}])
    def test_kinds_of_batches(self, wrap: Any) -> None:
        model, plain = Stack(), Stack()
        plain.load_state_dict(model.state_dict())
        small(model, scheme=None, calibration=(wrap(x) for x in ids()))
        small(plain, scheme=None)
        assert all(torch.equal(t, plain.state_dict()[name]) for name, t in model.state_dict().items())

    def test_blocks_that_are_no_chain_are_pruned_with_the_rest(self) -> None:
        class Parallel(Stack):
            def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                x = self.first(self.embed(ids))
                return self.head(sum(block(x)[0] for block in self.blocks))

        model = Parallel()
        assert len(small(model, method="sparsegpt").swapped) == 8

    def test_a_layer_that_no_data_reaches_gets_magnitude(self) -> None:
        model = Stack()
        model.idle = nn.Linear(8, 8)
        report = small(model)
        assert pruned_of(report, "idle").method == "magnitude"
        assert "no calibration data" in pruned_of(report, "idle").notes[0]
        assert "no calibration data" in str(report)

    @pytest.mark.parametrize(("method", "times"), [("wanda", 1), ("sparsegpt", 4)])
    def test_only_one_blocks_activations_are_held(self, method: str, times: int) -> None:
        alive: list[weakref.ref[Tensor]] = []
        most = [0]

        def watch(_: nn.Module, __: Any, output: tuple[Tensor, None]) -> None:
            alive.append(weakref.ref(output[0]))
            gc.collect()
            most[0] = max(most[0], sum(ref() is not None for ref in alive))

        model = Stack(depth=8)
        originals = list(model.blocks)
        for block in originals:
            block.register_forward_hook(watch)
        gc.freeze()  # collecting looks at what comes from now on
        try:
            small(model, method=method, calibration=ids(3))
        finally:
            gc.unfreeze()
        # Three batches between two blocks, one on its way, and one in the hands of the model.
        assert len(alive) > 8 * 3
        assert most[0] <= times * 3 + 2

    def test_the_model_is_in_eval_mode_meanwhile_and_as_it_was_after(self) -> None:
        model = Stack()
        model.blocks[1].eval()
        modes: list[bool] = []
        model.embed.register_forward_hook(lambda *_: modes.append(model.training))
        small(model)
        assert modes
        assert not any(modes)
        assert model.training
        assert model.head.training
        assert not model.blocks[1].up.training


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
        with pytest.raises(ValueError, match="per_layer=True, pattern='2:4': wants an unstructured pattern"):
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
            assert pruned_of(report, name).method == "as it was"

    def test_auto_leaves_dense_layers_alone(self) -> None:
        model = Stack()
        report = small(model, "auto", calibration=None)
        assert not report.swapped
        assert rows(report)["head"].reason == "its weight has no pattern of zeros"

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


def resumable(model: nn.Module, directory: Any, **kwargs: Any) -> None:
    small(
        model,
        "2:4",
        **{"method": "sparsegpt", "resume": directory, "permute": [("blocks.0.up", "blocks.0.down")], **kwargs},
    )


class TestResume:
    @pytest.mark.parametrize(
        "options", [{}, {"scheme": None}, {"scheme": "w4a16g32"}, {"method": "wanda", "permute": False}]
    )
    def test_a_run_that_was_cut_off_ends_with_the_same_bits(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        model = Stack()
        whole, cut, again = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
        resumable(whole, tmp_path / "whole", **options)
        calls = self.counted(monkeypatch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            resumable(cut, tmp_path / "cut", **options)
        for name, tensor in cut.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
        assert calls == [4]
        calls[0] = 100
        resumable(again, tmp_path / "cut", **options)
        assert calls == [100 + 8 - 3]
        expected, found = whole.state_dict(), again.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name

    def counted(self, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> list[int]:
        from nybble.passes.prune import work

        original, calls = work.prune_weight, [0]

        def counting(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == stop_at:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(work, "prune_weight", counting)
        return calls

    @pytest.mark.parametrize("what", ["data", "model", "method"])
    def test_another_run_is_refused(self, tmp_path: Any, what: str) -> None:
        model = Stack()
        resumable(copy.deepcopy(model), tmp_path)
        options: dict[str, Any] = {"data": {"calibration": ids(seed=9)}, "method": {"method": "wanda"}}.get(what, {})
        other = Stack() if what == "model" else model
        before = snapshot(other)
        with pytest.raises(nybble.checkpoint.CheckpointError, match="another model, calibration or setting"):
            resumable(other, tmp_path, **options)
        assert snapshot(other) == before

    def test_a_damaged_file_is_refused(self, tmp_path: Any) -> None:
        model = Stack()
        resumable(copy.deepcopy(model), tmp_path)
        file = next(tmp_path.glob("*/*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(nybble.checkpoint.CheckpointError, match="is damaged"):
            resumable(model, tmp_path)

    @pytest.mark.parametrize("index", [b"", b"[]", b'{"schema": "nybble.layer/1"}'])
    def test_a_foreign_index_is_refused(self, tmp_path: Any, index: bytes) -> None:
        model = Stack()
        resumable(copy.deepcopy(model), tmp_path)
        next(tmp_path.glob("*/nybble.json")).write_bytes(index)
        with pytest.raises(nybble.checkpoint.CheckpointError, match="is not a layer's"):
            resumable(model, tmp_path)


class TestUndo:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("scheme", ["w8a8", None])
    @pytest.mark.parametrize("at", [1, 5, 8])
    def test_after_an_exception_the_model_is_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], scheme: str | None, at: int
    ) -> None:
        from nybble.passes.layerwise import work

        original, calls = work.judge, [0]

        def failing(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise error("midway")
            return original(*args)

        monkeypatch.setattr(work, "judge", failing)
        model = Stack()
        before = snapshot(model)
        with pytest.raises(error):
            small(model, "2:4", scheme=scheme, permute=[("blocks.0.up", "blocks.0.down")])
        assert snapshot(model) == before
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    def test_a_model_that_fails_on_the_data(self) -> None:
        model = Stack()
        before = snapshot(model)
        with pytest.raises(IndexError):
            small(model, calibration=[torch.full((2, 3), 99)])
        assert snapshot(model) == before

    def test_strict(self) -> None:
        model = Stack()
        model.head.register_forward_hook(lambda *_: None)
        before = snapshot(model)
        with pytest.raises(ValueError, match="strict=True: 1 of 8 layers would be left alone: head: has forward hooks"):
            small(model, strict=True)
        assert snapshot(model) == before

    def test_an_output_that_is_not_finite_leaves_the_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nybble.passes.layerwise import judge, work

        monkeypatch.setattr(work, "judge", lambda *_: judge.Errors(0.0, float("nan")))
        model = Stack()
        before = snapshot(model)
        report = small(model)
        assert rows(report)["head"].reason == "its output would not be finite"
        assert snapshot(model) == before


def _endless() -> Iterator[str]:
    yield "text"


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"pattern": "5:4"}, ValueError, "pattern='5:4'"),
        ({"pattern": 0.5}, TypeError, "pattern=0.5"),
        ({"method": "random"}, ValueError, "method='random': wants one of 'sparsegpt', 'wanda', 'magnitude'"),
        ({"scheme": "sp50w8a8"}, ValueError, "scheme='sp50w8a8': names a sparsity; use 'w8a8'"),
        ({"scheme": "w4a16g32asym"}, ValueError, "symmetric"),
        ({"scheme": "w4a16", "pattern": "bs16x16:50%"}, ValueError, "blocks are for w8a8"),
        ({"scheme": 8}, TypeError, "scheme=8"),
        ({"calibration": []}, ValueError, "calibration: has no batches"),
        ({"calibration": torch.ones(3)}, TypeError, "calibration=Tensor: wants an iterable of batches"),
        ({"calibration": "text"}, TypeError, "calibration=str"),
        ({"calibration": _endless()}, TypeError, r"calibration\[0\]=str: must be a tensor, a tuple or a dict"),
        ({"goal": "size"}, ValueError, "goal='size'"),
        ({"m": 0}, ValueError, "m=0"),
        ({"progress": 1}, TypeError, "progress=1: wants True or False"),
        ({"per_layer": 1}, TypeError, "per_layer=1"),
        ({"resume": 3}, TypeError, "resume=3: wants the path of a directory"),
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
    with pytest.raises(ValueError, match="is itself a Linear layer"):
        nybble.sparsify(nn.Linear(4, 4), "50%")


def test_progress_needs_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    small(Stack(), progress=True)
    assert capsys.readouterr().out == ""
