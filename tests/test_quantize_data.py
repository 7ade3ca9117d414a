"""nybble.quantize with calibration data: what is rounded how, in which order, again after a kill, with any threads."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.nn import Linear
from nybble.passes.layerwise import work
from nybble.report.data import Rounded
from nybble.report.report import Report
from nybble.report.speed import Speed
from nybble.testing.models import Stack, token_batches


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def small(model: nn.Module, scheme: str = "w4a8g32", **kwargs: Any) -> Report:
    own = {"exclude": "embed"} if hasattr(model, "embed") else {}  # which has no inputs to learn from
    options = {**own, "goal": "memory", "method": "gptq", "calibration": token_batches(8), **kwargs}
    return nybble.quantize(model, scheme, **options)


def rounded(report: Report) -> dict[str, Rounded]:
    return {row.name: row.rounded for row in report.layers if row.rounded is not None}


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8g32", "w4a16g128asym", "w4a16"])
def test_every_layer_is_no_worse_than_rtn_and_the_report_says_so(scheme: str) -> None:
    model = Stack()
    dense = copy.deepcopy(model)
    report = small(model, scheme)
    found = rounded(report)
    assert len(found) == len(report.swapped) == 8
    for name, one in found.items():
        assert isinstance(model.get_submodule(name), Linear)
        assert one.method in ("gptq", "mse", "rtn")
        assert one.error is not None
        assert one.error_rtn is not None
        # The errors count the rounding of activations too, which no method for weights can promise to lower.
        assert 0 < one.error <= one.error_rtn * 1.05
    assert sum(one.method == "gptq" for one in found.values()) >= 4
    x = token_batches(1, seed=7)[0]
    assert (model(x) - dense(x)).norm() / dense(x).norm() < 0.2
    assert all(word in str(report) for word in ("method", "error %", "held-out calibration data", "gptq"))


def test_the_model_loses_less_than_by_rtn() -> None:
    model, x = Stack(width=128), token_batches(4, seed=7)
    dense = copy.deepcopy(model)
    errors = []
    for method in ("gptq", "rtn"):
        new = copy.deepcopy(model)
        small(new, "w4a16", method=method, calibration=token_batches(32))
        errors.append(sum((new(batch) - dense(batch)).square().sum().item() for batch in x))
    assert errors[0] < 0.7 * errors[1]


def test_layers_see_what_the_quantized_layers_before_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.model.inputs import Inputs

    model, seen = Stack(depth=2), []
    original = Inputs.add

    def watching(self: Inputs, x: Tensor, dense: Tensor | None = None) -> None:
        seen.append(x)
        original(self, x, dense)

    monkeypatch.setattr(Inputs, "add", watching)
    data = token_batches(1)[0]
    small(model, calibration=[data])
    found: dict[str, Tensor] = {}
    for name in ("blocks.1.up", "head"):
        keep: Callable[..., None] = lambda _, args, name=name: found.update({name: args[0].flatten(0, -2)})
        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(data)
    assert torch.equal(seen[3], found["blocks.1.up"])
    assert torch.equal(seen[5], found["head"])


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_methods_without_data_are_judged_where_there_is_some(method: str) -> None:
    with_data, without = Stack(), Stack()
    without.load_state_dict(with_data.state_dict())
    report = small(with_data, method=method)
    plain = small(without, method=method, calibration=None)
    assert all(one.error is not None for one in rounded(report).values())
    assert all(one == Rounded(method) for one in rounded(plain).values())
    assert "error %" not in str(plain)
    if method == "rtn":
        assert equal(with_data, without)


def test_a_layer_that_no_data_reaches_gets_rtn() -> None:
    model = Stack()
    model.idle = nn.Linear(8, 8)
    found = rounded(small(model))["idle"]
    assert found.method == "rtn"
    assert "rtn instead of gptq: no calibration data" in found.notes[0]


def test_speed_is_asked_once_for_layers_that_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.passes.measure import Timer
    from nybble.passes.round import work as round_work

    solved: list[Any] = []
    original = round_work.round_weight
    monkeypatch.setattr(round_work, "round_weight", lambda *args: solved.append(args) or original(*args))
    monkeypatch.setattr(Timer, "speeds", lambda timer, old, new, ms, left: dict.fromkeys(ms, Speed(0.5, 0.4, 0.6, 9)))
    model = Stack()
    before = copy.deepcopy(model)
    report = small(model, goal="speed", m=4)
    assert not report.swapped
    assert not rounded(report)
    assert len(solved) == 4  # first, up, down, head: one of each kind
    assert equal(model, before)


class TestAgain:
    @pytest.mark.parametrize("options", [{}, {"method": "mse"}])
    def test_a_run_that_was_cut_off_ends_with_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        model = Stack()
        whole, cut, again = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
        expected = small(whole, **options)
        original, calls = work.output_errors, [0]

        def cutting(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 5:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(work, "output_errors", cutting)
        with pytest.raises(KeyboardInterrupt):
            small(cut, resume=tmp_path, **options)
        assert equal(cut, model)
        found = small(again, resume=tmp_path, **options)
        assert equal(again, whole)
        assert rounded(found) == rounded(expected)

    def test_after_a_kill_too(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys, torch\n"
            "import nybble\n"
            "from nybble.passes.layerwise import work\n"
            "from nybble.testing.models import Stack, token_batches\n"
            "torch.manual_seed(3); torch.set_num_threads(1)\n"
            "model, output_errors, calls = Stack(), work.output_errors, []\n"
            "def killing(*args):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return output_errors(*args)\n"
            "work.output_errors = killing\n"
            "nybble.quantize(model, 'w4a8g32', method='gptq', goal='memory', exclude='embed', calibration=token_batches(8),"
            " resume=sys.argv[1])\n"
        )
        done = subprocess.run([sys.executable, *_flags(), "-c", code, str(tmp_path)], env=dict(os.environ), check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("layer-*/nybble.json"))) >= 4
        torch.manual_seed(3)
        model = Stack()
        whole, again = copy.deepcopy(model), copy.deepcopy(model)
        small(whole)
        small(again, resume=tmp_path)
        assert equal(again, whole)

    def test_another_run_is_refused(self, tmp_path: Path) -> None:
        small(Stack(), resume=tmp_path)
        with pytest.raises(nybble.checkpoint.CheckpointError, match="another model, calibration data or settings"):
            small(Stack(), resume=tmp_path)

    def test_twice_the_same_bits_and_close_to_them_with_more_threads(self, threads: Callable[[int], None]) -> None:
        model = Stack()
        first, second, more = (copy.deepcopy(model) for _ in range(3))
        small(first)
        small(second)
        assert equal(first, second)
        threads(2)
        small(more)
        x = token_batches(1, seed=7)[0]
        assert (first(x) - more(x)).norm() <= 0.02 * first(x).norm()  # torch's own products may differ in the last bits


def _flags() -> list[str]:
    """Those that this interpreter was started with, for one that finds the same packages."""
    return ["-S"] if sys.flags.no_site else []


class TestData:
    def test_dataloader(self) -> None:
        a, b = Stack(), Stack()
        b.load_state_dict(a.state_dict())
        ids = torch.cat(token_batches(4))
        small(a, calibration=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4))
        small(b, calibration=token_batches(4))
        assert equal(a, b)

    @pytest.mark.parametrize(
        ("batch", "error", "rule"),
        [
            ({"tokens": torch.zeros(1, 3).long()}, TypeError, r"calibration\[1\]: does not fit Stack.forward"),
            ((1, 2, 3, 4), TypeError, r"calibration\[1\]: does not fit Stack.forward.*too many"),
            (torch.zeros(0, 4).long(), ValueError, r"calibration\[1\]: holds an empty tensor"),
            ({"ids": torch.zeros(0, 4).long()}, ValueError, r"calibration\[1\]: holds an empty tensor"),
            (3, TypeError, r"calibration\[1\]=int"),
        ],
    )
    def test_bad_batches_are_named(self, batch: Any, error: type[Exception], rule: str) -> None:
        model = Stack()
        with pytest.raises(error, match=rule):
            small(model, calibration=[token_batches(1)[0], batch])
        assert type(model.head) is nn.Linear

    def test_a_batch_with_nan_is_left_out_and_counted(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
        clean = copy.deepcopy(model)
        good = torch.randn(256, 32)
        bad = good[:16].clone()
        bad[3, 3] = torch.nan
        found = rounded(small(model, calibration=[bad, good]))
        small(clean, calibration=[good])
        assert all(one.notes[0] == "1 batches with NaN or Inf left out" for one in found.values())
        assert equal(model, clean)

    def test_it_is_needed(self) -> None:
        with pytest.raises(ValueError, match="method='gptq': needs calibration data; 'rtn' needs none"):
            small(Stack(), calibration=None)
