"""nybble.sparsify: runs that go on where they were cut off, and models that are as they were after an exception."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.testing.models import Stack, snapshot
from nybble.testing.models import sparsify_small as small
from nybble.testing.models import token_batches as ids


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


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
        with pytest.raises(nybble.checkpoint.CheckpointError, match="another model, calibration data or settings"):
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

    @pytest.mark.parametrize("change", [{"kind": "other"}, {"numbers": [0.5, 0.5]}, {"notes": ["x"]}], ids=str)
    def test_a_changed_index_is_refused(self, tmp_path: Any, change: dict[str, Any]) -> None:
        model = Stack()
        resumable(copy.deepcopy(model), tmp_path)
        index = next(tmp_path.glob("*/nybble.json"))
        index.write_text(json.dumps(json.loads(index.read_text()) | change))
        with pytest.raises(nybble.checkpoint.CheckpointError, match="does not describe a layer"):
            resumable(model, tmp_path)

    @pytest.mark.parametrize("index", [b"", b"[]", b"[" * 9, b"[" * 100_000, b'{"schema": "nybble.layer/3"}'], ids=len)
    def test_a_foreign_index_is_refused(self, tmp_path: Any, index: bytes) -> None:
        model = Stack()
        resumable(copy.deepcopy(model), tmp_path)
        next(tmp_path.glob("*/nybble.json")).write_bytes(index)
        with pytest.raises(nybble.checkpoint.CheckpointError, match="does not describe a layer"):
            resumable(model, tmp_path)


class TestUndo:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("scheme", ["w8a8", None])
    @pytest.mark.parametrize("at", [1, 5, 8])
    def test_after_an_exception_the_model_is_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], scheme: str | None, at: int
    ) -> None:
        from nybble.passes.layerwise import work

        original, calls = work.output_errors, [0]

        def failing(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise error("midway")
            return original(*args)

        monkeypatch.setattr(work, "output_errors", failing)
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
        with pytest.raises(ValueError, match="strict=True: 1 of 9 layers would be left alone: head: has forward hooks"):
            small(model, strict=True)
        assert snapshot(model) == before

    def test_an_output_that_is_not_finite_leaves_the_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nybble.passes.layerwise import errors, work

        monkeypatch.setattr(work, "output_errors", lambda *_: errors.Errors(0.0, float("nan")))
        model = Stack()
        before = snapshot(model)
        report = small(model)
        assert [row.reason for row in report.layers if row.name == "head"] == [
            "the output of its replacement is not finite"
        ]
        assert snapshot(model) == before
