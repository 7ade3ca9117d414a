"""nybble.Monitor: what it finds, what it leaves alone, and that nothing of the model's output depends on it."""

from __future__ import annotations

import copy
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.checkpoint.files import CheckpointError
from nybble.monitor.monitor import Monitor


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> None:
    threads(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, fail: bool = False) -> Tensor:
        y = self.up(x)
        if fail:
            raise RuntimeError("the user's")
        return self.down(torch.relu(y))


def batches(count: int = 20, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(4, 16, 32, generator=generator) for _ in range(count)]


def quantized() -> Model:
    model = Model()
    nybble.quantize(model, "w8a8", goal="memory", exclude="unused")
    return model


def made(model: nn.Module | None = None, **arguments: Any) -> Monitor:
    monitor = Monitor(model or quantized(), **{"every": 1, "window": 128, **arguments})
    monitor.calibrate(batches())
    return monitor


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


class TestMonitor:
    def test_it_says_which_layer_drifts_and_what_to_do(self) -> None:
        model = quantized()
        monitor = made(model)
        with monitor:
            for x in batches(20, seed=1):
                model(x)
            assert monitor.report().drifting == ()
            assert monitor.report().suggestion is None
            model.up.register_forward_hook(lambda *_: None)
            for x in batches(20, seed=2, scale=2):
                model(x)
        drift = monitor.report()
        assert {layer.name for layer in drift.drifting} == {"up", "down"}
        assert "calibrate again" in (drift.suggestion or "")
        for word in ("up", "down", "PSI", "for 10 windows", "calibrate again"):
            assert word in str(drift), word
        assert json.loads(drift.to_json())["suggestion"] == drift.suggestion

    def test_only_the_layer_behind_the_change_is_named(self) -> None:
        model = quantized()
        monitor = made(model)
        with torch.no_grad():
            model.up.bias.mul_(0).add_(6)
        with monitor:
            for x in batches(20, seed=1):
                model(x)
        assert [layer.name for layer in monitor.report().drifting] == ["down"]

    def test_quantized_layers_are_watched_or_else_all(self) -> None:
        assert [layer.name for layer in Monitor(quantized()).report().layers] == ["up", "down"]
        assert [layer.name for layer in Monitor(Model()).report().layers] == ["up", "down", "unused"]
        assert [layer.name for layer in Monitor(Model(), include="*n*", exclude="un*").report().layers] == ["down"]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_outputs_are_the_same_bits(self, mode: Any) -> None:
        model = quantized()
        x = batches(1, seed=3)[0]
        monitor = made(model)
        with mode():
            expected = model(x)
            with monitor:
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        with monitor:
            model(x)
        assert monitor.report().sampled_calls == 2

    def test_it_is_off_until_it_is_started_and_after(self) -> None:
        model = quantized()
        monitor = made(model)
        assert hooks(model) == 0
        monitor.start()
        monitor.start()
        assert (monitor.is_on, hooks(model)) == (True, 2)
        model(batches(1)[0])
        assert hooks(model) == 2
        monitor.stop()
        assert (monitor.is_on, hooks(model)) == (False, 0)
        model(batches(1)[0])
        assert monitor.report().calls == 1

    def test_without_statistics_it_stays_off_and_warns_once(self) -> None:
        model = quantized()
        with pytest.warns(UserWarning, match="no calibration statistics") as caught, Monitor(model) as monitor:
            model(batches(1)[0])
        assert len(caught) == 1
        assert (monitor.report().calls, hooks(model)) == (0, 0)

    def test_one_call_in_so_many_is_looked_at(self) -> None:
        model = quantized()
        monitor = made(model, every=7)
        seen = []
        model.down.register_forward_hook(lambda *_: seen.append(len(model.up._forward_pre_hooks)))
        with monitor:
            for x in batches(20, seed=1):
                model(x)
        assert seen == [1 if i % 7 == 0 else 0 for i in range(20)]
        assert (monitor.report().calls, monitor.report().sampled_calls) == (20, 3)

    def test_an_input_with_nan_is_counted_and_left_out(self) -> None:
        model = quantized()
        monitor = made(model)
        bad = batches(1)[0]
        bad[0, 0, 0] = float("nan")
        with monitor:
            for x in batches(10, seed=1):
                model(x)
                model(bad)
        for layer in monitor.report().layers:
            assert (layer.bad_calls, layer.windows, layer.state) == (10, 5, "ok")
        assert "10 calls with NaN" in str(monitor.report())

    def test_padding_does_not_count(self) -> None:
        model = quantized()
        monitor = made(model)
        mask = torch.zeros(4, 16, dtype=torch.long)
        mask[:, :8] = 1
        with monitor:
            for x in batches(40, seed=1):
                x[:, 8:] = 1000
                model(x, attention_mask=mask)
        assert {layer.state for layer in monitor.report().layers} == {"ok"}
        assert {layer.windows for layer in monitor.report().layers} == {10}

    def test_the_users_exception_passes_and_the_next_call_is_looked_at(self) -> None:
        model = quantized()
        monitor = made(model)
        with monitor:
            with pytest.raises(RuntimeError, match="the user's"):
                model(batches(1)[0], fail=True)
            assert hooks(model) == 2
            model(batches(1)[0])
            assert monitor.report().sampled_calls == 2

    def test_an_interrupted_call_does_not_end_the_watch(self) -> None:
        model = quantized()
        monitor = made(model)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monitor:
            hook = model.down.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(batches(1)[0])
            hook.remove()
            model(batches(1)[0])
            assert hooks(model) == 2
        assert hooks(model) == 0

    def test_threads(self) -> None:
        model = quantized()
        monitor = made(model, every=3)
        data = batches(8, seed=1)
        with torch.no_grad():
            expected = [model(x) for x in data]
        wrong: list[int] = []

        def serve() -> None:
            with torch.no_grad():
                for _ in range(20):
                    for i, x in enumerate(data):
                        if not torch.equal(model(x), expected[i]):
                            wrong.append(i)

        with monitor:
            workers = [threading.Thread(target=serve) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert not wrong
        drift = monitor.report()
        assert drift.calls == 640
        assert 1 <= drift.sampled_calls <= 214
        assert {layer.windows for layer in drift.layers} == {drift.sampled_calls // 2}
        assert {layer.state for layer in drift.layers} == {"ok"}
        assert hooks(model) == 0

    def test_a_copy_of_a_watched_model_can_be_made_and_run(self) -> None:
        model = quantized()
        with made(model):
            x = batches(1)[0]
            assert torch.equal(copy.deepcopy(model)(x), model(x))

    def test_calibration_leaves_the_model_as_it_was(self) -> None:
        model = quantized().train()
        made(model)
        assert all(module.training for module in model.modules())
        assert hooks(model) == 0

    def test_too_little_data_is_said(self) -> None:
        monitor = Monitor(quantized(), window=1000)
        with pytest.warns(UserWarning, match="saw fewer rows than one window, among them up"):
            monitor.calibrate(batches(2))


class TestFiles:
    def test_statistics_round_trip(self, tmp_path: Path) -> None:
        model = Model()
        with pytest.warns(UserWarning, match="among them unused"):
            first = made(model)
        first.save(tmp_path / "s.safetensors")
        second = Monitor(model, statistics=tmp_path / "s.safetensors", every=1, window=128)
        assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
        for monitor in (first, second):
            with monitor:
                for x in batches(8, seed=5, scale=1.2):
                    model(x)
        assert first.report() == second.report()
        assert first.report().layers[0].windows == 4

    @pytest.mark.parametrize("kind", ["missing", "truncated", "other model", "nan", "negative"])
    def test_damaged_statistics_are_refused(self, tmp_path: Path, kind: str) -> None:
        from safetensors.torch import load_file, save_file

        path = tmp_path / "s.safetensors"
        model: nn.Module = quantized()
        made(model).save(path)
        tensors = load_file(path)
        if kind == "missing":
            path.unlink()
        elif kind == "truncated":
            path.write_bytes(path.read_bytes()[:-8])
        elif kind == "other model":
            model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
        else:
            tensors["up.scalars" if kind == "nan" else "up.histogram"][1] = -1 if kind == "negative" else float("nan")
            save_file(tensors, path)
        with pytest.raises(CheckpointError):
            Monitor(model, statistics=path)

    def test_save_needs_statistics(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="calibrate first"):
            Monitor(quantized()).save(tmp_path / "s")

    def test_the_log_has_a_line_a_window(self, tmp_path: Path) -> None:
        model = quantized()
        with made(model, log=tmp_path / "drift.jsonl"):
            for x in batches(20, seed=1, scale=3):
                model(x)
        lines = [json.loads(line) for line in (tmp_path / "drift.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(line["name"], line["windows"]) for line in lines] == [
            (n, i) for i in range(1, 11) for n in ("up", "down")
        ]
        assert [line["state"] for line in lines if line["name"] == "up"] == ["warn"] * 2 + ["alarm"] * 8
        assert lines[-1]["alarms"]

    def test_a_log_that_cannot_be_written_does_not_stop_the_model(self, tmp_path: Path, caplog: Any) -> None:
        model = quantized()
        with caplog.at_level(logging.WARNING, "nybble"), made(model, log=tmp_path / "none" / "drift.jsonl") as monitor:
            for x in batches(8, seed=1):
                model(x)
        assert len(caplog.records) == 1
        assert monitor.report().layers[0].windows == 4


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ({"model": 1}, TypeError, "model=int"),
        ({"model": nn.ReLU()}, ValueError, "no Linear layer"),
        ({"every": 0}, ValueError, "every=0"),
        ({"window": True}, ValueError, "window=True"),
        ({"include": "nothing"}, ValueError, "matches no Linear layer"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        Monitor(**{"model": Model(), **arguments})


@pytest.mark.parametrize(("data", "error"), [([], ValueError), (torch.ones(2), TypeError), ([1], TypeError)])
def test_wrong_calibration(data: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="calibration"):
        Monitor(Model()).calibrate(data)
