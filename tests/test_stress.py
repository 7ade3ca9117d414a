"""nybble.stress: a small share of each figure, and that what is wrong is counted."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nybble
from nybble.stress import __main__ as command
from nybble.stress import chaos, damage, figure, headers, kills, random_shapes, readers, shapes, soak, table
from nybble.stress.attempt import wrong_of
from nybble.stress.children import Child, in_children
from nybble.stress.faults import FAULTS
from nybble.stress.figure import Figure, Tally, Trial
from nybble.testing.checks import Subject
from nybble.weights.scheme import Scheme

pytest.importorskip("safetensors")

SHARES = {
    "shapes": 64, "random-shapes": 8, "headers": 168, "kills": 2, "full-disk": 2, "calls": 600, "cycles": 6, "threads": 320,
}  # fmt: skip
# Those that the tests of checkpoints run whole or in part.
ELSEWHERE = {"hostile", "foreign", "chaos"}


def test_all_figures_are_tried() -> None:
    assert {row.name for row in table.FIGURES} == SHARES.keys() | ELSEWHERE


@pytest.mark.parametrize("name", SHARES)
def test_a_share(name: str) -> None:
    row = table.find(name)
    for package in row.needs:
        pytest.importorskip(package)
    found = row.run(Trial(SHARES[name], seed=1))
    assert found.failures == []
    assert found.tried >= SHARES[name]


CHAOS = [("gptq", tuple(name for name in FAULTS if name != "none"), 1)]
CHAOS += [(name, ("SIGKILL", "SIGINT"), 1) for name in ("sparsegpt", "recover", "plan")]


@pytest.mark.parametrize(("name", "faults", "count"), CHAOS, ids=[row[0] for row in CHAOS])
def test_moments_of_chaos(name: str, faults: tuple[str, ...], count: int) -> None:
    found = chaos.disturb(name, faults, Trial(count, seed=1))
    assert (found.tried, found.failures) == (count * len(faults), [])


def test_other_bits_than_undisturbed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "_undisturbed", lambda name: (("other", 1), 0.2))
    found = chaos.disturb("plan", ("SIGINT",), Trial(1))
    assert "resumed, it has other bits than undisturbed" in found.failures[0]


def test_bits_of_a_model_are_all_of_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    bits = [chaos.bits_of(model)]
    model[0].weight.data[1, 2] += 1
    bits.append(chaos.bits_of(model))
    model[1] = torch.nn.GELU()
    bits.append(chaos.bits_of(model))
    model.eval()
    bits.append(chaos.bits_of(model))
    assert len(set(bits)) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("row", table.FIGURES, ids=lambda row: row.name)
def test_a_whole_figure(row: Figure) -> None:
    found = row.run(Trial(row.count, data=Path(__file__).parent / "data" / "foreign" if row.takes else None))
    assert found.failures == []


def spoiled(change: Callable[[Tensor], None]) -> Any:
    """The scalar w8a8 kernel with a change of its output."""
    (spec,) = (spec for spec in shapes.kernels_here() if spec.name == "w8a8_scalar")

    def make(*shape: Any) -> Any:
        plan = spec.make(*shape)

        def run(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
            plan(x, packed, bias, out)
            change(out)

        return run

    return replace(spec, make=make)


def one_wrong(out: Tensor) -> None:
    if len(out) == 7:
        out[6, 2] += 1


def one_row_more(out: Tensor) -> None:
    out.as_strided((len(out) + 1, out.shape[1]), out.stride())[-1] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [(one_wrong, "n=5 k=9 m=7: 1 outputs are wrong"), (one_row_more, "n=5 k=9 m=1: writes beyond")],
)
def test_a_wrong_kernel_is_found(change: Callable[[Tensor], None], message: str) -> None:
    products = shapes.Products(Scheme.parse("w8a8"), 5, 9)
    assert products.wrong_of(spoiled(lambda out: None)) is None
    assert message in str(products.wrong_of(spoiled(change)))


def one_row_less(out: Tensor) -> None:
    out.as_strided((1, out.shape[1]), out.stride(), out.storage_offset() - out.shape[1]).fill_(0)


def one_wrong_of_many(out: Tensor) -> None:
    out[-1, -1] *= 1.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_wrong_of_many, "1 of 35 outputs are wrong"),
        (one_row_more, "writes beyond"),
        (one_row_less, "writes beyond"),
    ],
)
def test_a_wrong_kernel_is_found_by_random_shapes(change: Callable[[Tensor], None], message: str) -> None:
    def product(spec: Any) -> random_shapes.Product:
        return random_shapes.Product(spec, Scheme.parse("w8a8"), torch.float32, (7, 5, 9), 3, True, 2)

    assert product(spoiled(lambda out: None)).wrong() is None
    assert message in str(product(spoiled(change)).wrong())


def test_random_shapes_are_of_all_sizes() -> None:
    draw, subject = random.Random(0), Subject(spoiled(lambda out: None), Scheme.parse("w8a8"))  # noqa: S311
    found = [random_shapes.sizes(subject, draw) for _ in range(20_000)]
    for i, (least, most) in enumerate(((1, 200), (1, 8000), (1, 8000))):
        assert min(size[i] for size in found) == least
        assert max(size[i] for size in found) > most
    assert max(m * n * k for m, n, k in found) in range(1 << 19, 1 << 20)
    assert sum(min(n, k) >= 32 for _, n, k in found) > 2_000


def test_files_are_limited_where_mounts_are_not_allowed(tmp_path: Path) -> None:
    for share, said in ((0.1, "full"), (1.0, "fits")):
        (tmp_path / said).mkdir()
        child = Child(kills.save_on_small_disk, tmp_path / said, 400_000, share, False)
        assert child.heard() == said
        assert child.end() == 0


def test_memory_that_grows_is_found() -> None:
    held: list[bytes] = []
    found: list[Tally] = []
    soak._steady(lambda i: held.append(bytes(100_000)), 200, found.append)
    assert "grown by" in found[0].failures[0]


def test_a_mixed_checkpoint_is_found(tmp_path: Path) -> None:
    model = kills.valued(1.0)
    nybble.save(model, tmp_path)
    assert kills.value_in(tmp_path) == 1.0
    model[1].weight.data.fill_(2.0)
    nybble.save(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"values of \[1.0, 2.0\]"):
        kills.value_in(tmp_path)


def test_threads_whose_calls_raise_or_differ_are_found() -> None:
    ids, found = [torch.zeros(1, dtype=torch.long)], [Tally(), Tally(), Tally()]

    class Raises(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            raise RuntimeError("no")

    soak._shared(Raises(), ids, ids, 80, found[0])
    soak._shared(torch.nn.Identity(), ids, [ids[0] + 1], 80, found[1])
    soak._shared(torch.nn.Identity(), ids, ids, 80, found[2])
    assert [tally.tried for tally in found] == [80] * 3
    assert [tally.failed for tally in found] == [1, 1, 0]
    assert "thread 0: RuntimeError: no" in found[0].failures[0]
    assert "gives another output" in found[1].failures[0]


def test_every_scheme_of_a_kernel_meets_odd_and_even_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[tuple[Scheme, int, int]] = set()

    class Seen:
        def __init__(self, scheme: Scheme, n: int, k: int) -> None:
            met.add((scheme, n % 2, k % 2))

        def wrong_of(self, spec: Any) -> None:
            return None

    monkeypatch.setattr(shapes, "Products", Seen)
    shapes._cube([(n, k) for n in range(1, 33) for k in range(1, 33)], lambda found: None)
    schemes = {scheme for _, schemes in shapes.exact_kernels() for scheme in schemes}
    assert met == {(scheme, n, k) for scheme in schemes for n in (0, 1) for k in (0, 1)}
    assert any(scheme.sparsity for scheme in schemes)


def test_a_reader_that_raises_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")

    def fails(path: Path) -> None:
        raise MemoryError("of the reader")

    def silent(path: Path) -> None:
        raise ValueError("no")

    for read, message in ((fails, "here: MemoryError: of the reader"), (silent, "a message of 2 characters")):
        row = replace(readers.READERS[-1], read=read)
        assert message in str(wrong_of(lambda row=row: headers.read_once(row, path, Tally()), "here"))


@pytest.mark.parametrize("reader", headers.usable(), ids=lambda reader: reader.name)
def test_files_that_fuzzing_kept(reader: readers.Reader, tmp_path: Path) -> None:
    found, path = Tally(), tmp_path / reader.file
    with zipfile.ZipFile(Path(__file__).parent / "data" / "fuzz" / f"{reader.name}.zip") as kept:
        for name in kept.namelist():
            path.write_bytes(kept.read(name))
            found.add(wrong_of(lambda: headers.read_once(reader, path, found), name))
    assert found.failures == []
    assert found.facts["refused"] > 3


def test_children_that_end_without_a_word_are_failures() -> None:
    found = in_children(gc.disable, [(), ()])  # which takes no argument, so that it raises
    assert found.failed == 2
    assert "disable(): TypeError" in found.failures[0]


def sleeps(say: Callable[[int], None]) -> None:
    say(os.getpid())
    time.sleep(600)


@pytest.mark.full
def test_children_end_with_the_process_that_made_them() -> None:
    code = "import sys, time, test_stress as t; print(t.Child(t.sleeps).heard(), flush=True); time.sleep(600)"
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=where) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert child.exists()
        parent.kill()
    for _ in range(300):
        if not child.exists():
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


FUZZED = [pytest.param("config", 1, marks=pytest.mark.full)]
FUZZED += [pytest.param(row.name, 3600, marks=pytest.mark.nightly) for row in readers.READERS]


@pytest.mark.parametrize(("name", "seconds"), FUZZED)
def test_fuzzing(name: str, seconds: int) -> None:
    pytest.importorskip("atheris")
    script = Path(__file__).parents[1] / "fuzz" / "run.py"
    done = subprocess.run([sys.executable, script, name, str(seconds)], stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout)
    assert (row["figure"], row["reader"], row["failed"]) == (figure.FUZZ, name, 0)
    assert row["tried"] > 100 * seconds
    assert row["cpu_seconds"] > seconds / 2


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trial: Trial) -> Tally:
        found = Tally()
        for number in range(trial.count):
            found.add("wrong" if number == 3 else None)
        return found

    rows = (
        Figure("good", "holds", 300, "things", run),
        Figure("needy", "holds", 3, "things", run, takes="a directory"),
        Figure("few", "holds", 9, "things", run, finite=True),
    )
    monkeypatch.setattr(table, "FIGURES", rows)
    monkeypatch.setattr(command, "FIGURES", rows)
    assert command.main(["--list"]) == 0
    assert "good: 300 things: holds" in capsys.readouterr().out
    assert command.main(["--count", "3", "--seed", "5"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("good: 3 things tried, 0 failed (seed 5, ")
    assert "needy: left out: needs --data: a directory" in told.err
    assert "few: left out: --seed 5: there are 9 things, which 5 runs of 3 have tried" in told.err
    assert command.main(["good", "--count", "4", "--json"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["tried"], found["failed"], found["failures"], found["of"]) == (4, 1, ["wrong"], 300)
    assert {"date", "machine", "targets", "versions", "seconds"} <= found.keys()
    assert "FAILED good: wrong" in told.err
    monkeypatch.setattr(table, "FIGURES", (*rows, replace(rows[0], name="misused", run=lambda trial: trial.part(0))))
    monkeypatch.setattr(command, "FIGURES", table.FIGURES)
    for wrong in (
        ["misused"],
        ["bad"],
        ["good", "--share", "2"],
        ["good", "--count", "0"],
        ["good", "--seed", "-1"],
        ["needy"],
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(wrong)
        assert stopped.value.code == 2


def test_slices_of_what_is_finite() -> None:
    parts = [Trial(40, seed).part(100) for seed in range(3)]
    assert [*parts[0], *parts[1], *parts[2]] == list(range(100))
    with pytest.raises(figure.Misuse, match=r"seed=3: must be in \[0, 3\): 40 a run of 100"):
        Trial(40, 3).part(100)


def test_tallies_add_up() -> None:
    one, other = Tally(), Tally()
    one.add(None, 5)
    other.add("wrong")
    for tally, seconds in ((one, 1.0), (other, 2.0)):
        tally.on = {"readers": 8}
        tally.count("refused", 3)
        tally.most("most seconds", seconds)
    one.merge(other)
    assert (one.tried, one.failed, one.failures) == (6, 1, ["wrong"])
    assert (one.facts, one.on) == ({"refused": 6, "most seconds": 2.0}, {"readers": 8})
    assert figure.outcome(Figure("a", "b", 1, "c", lambda trial: one), Trial(1))["failed"] == 1


def test_a_damage_that_cannot_be_done_is_left_out() -> None:
    """A text that earlier damages nested deeper than Python reads JSON."""
    data = b"[" * 50_000 + b"]" * 50_000
    assert headers.damaged(data, (damage.told_json,), random.Random(0)) == data  # noqa: S311
