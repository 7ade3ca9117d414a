"""Probes and ceilings: exact counts of work, refusals, and a cache that survives whatever lies in its directory."""

from __future__ import annotations

import json
import multiprocessing
import stat
import warnings
from pathlib import Path

import pytest

from nybble import native
from nybble.bench import atomic, ceilings, ceilings_cache

NAMES = tuple(ceilings._COLUMNS)
LIMITS = {name: 10.0 + i for i, name in enumerate(NAMES)}
USABLE = [(name, kind) for name, kind, why_not in native.probes() if not why_not]
# (what one round of one thread counts for each probe: instructions x lanes x products x 2)
OPERATIONS = {
    "int8_scalar": 4 * 8 * 2,
    "fp32_scalar": 4 * 8 * 2,
    "int8_avx2": 8 * 8 * 2 * 2,
    "int7_avx2": 8 * 8 * 8 * 2,
    "int4_avx2": 8 * 16 * 2 * 2,
    "int8_avx512bw": 16 * 16 * 2 * 2,
    "int7_avx512bw": 16 * 16 * 8 * 2,
    "int4_avx512bw": 16 * 32 * 2 * 2,
    "int8_avxvnni": 12 * 8 * 4 * 2,
    "fp32_fma": 12 * 8 * 2,
    "int8_avx512vnni": 24 * 16 * 4 * 2,
    "bf16_avx512bf16": 24 * 16 * 2 * 2,
    "int8_amx": 4 * 16 * 16 * 64 * 2,
    "bf16_amx": 4 * 16 * 16 * 32 * 2,
    "fp32_avx512f": 24 * 16 * 2,
    "int8_neon": 24 * 8 * 2,
    "fp32_neon": 24 * 4 * 2,
    "int8_neondot": 24 * 4 * 4 * 2,
    "int8_i8mm": 24 * 4 * 8 * 2,
    "bf16_neonbf16": 24 * 4 * 4 * 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nybble"


def test_each_kind_has_a_probe_that_runs_anywhere() -> None:
    assert {"read_scalar", "int8_scalar", "fp32_scalar"} <= {name for name, _ in USABLE}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("name", "kind"), USABLE, ids=[name for name, _ in USABLE])
def test_work_is_counted_exactly(name: str, kind: str, threads: int) -> None:
    amount = 8192 if kind == "read" else 7
    seconds, work = native.probe(name, threads, amount, passes=3, runs=2)
    assert work == threads * 3 * amount * OPERATIONS.get(name, 1)
    assert seconds > 0


def test_every_multiply_is_in_the_table_of_this_test() -> None:
    assert {name for name, kind, _ in native.probes() if kind != "read"} <= OPERATIONS.keys()


@pytest.mark.parametrize("huge_pages", [False, True])
def test_reads_with_either_kind_of_page(huge_pages: bool) -> None:
    assert native.probe("read_scalar", 1, 4 << 20, huge_pages=huge_pages)[1] == 4 << 20


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("read_nothing", {}, "not in the table"),
        ("read_scalar", {"amount": 4095}, "multiple of 4096"),
        ("read_scalar", {"amount": 0}, "amount"),
        ("read_scalar", {"amount": 1 << 41}, "amount"),
        ("int8_scalar", {"threads": 0}, "at least 1"),
        ("int8_scalar", {"passes": 0}, "at least 1"),
        ("int8_scalar", {"runs": 0}, "at least 1"),
    ],
)
def test_refuses(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.probe(name, **{"threads": 1, "amount": 4096, **arguments})


def test_a_probe_of_a_missing_feature_is_refused() -> None:
    missing = [name for name, _, why_not in native.probes() if why_not]
    if not missing:
        pytest.skip("this CPU has every feature that a probe needs")
    for name in missing:
        with pytest.raises(ValueError, match="lacks"):
            native.probe(name, 1, 4096)


def test_measured_once_then_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def measure(threads: int) -> dict[str, float]:
        calls.append(threads)
        return {**LIMITS, "dram_gbps": float(threads)}

    monkeypatch.setattr(ceilings, "measure", measure)
    first = ceilings.ceilings([2])
    assert first["threads"].keys() == {"2"}
    assert first["threads"]["2"]["dram_gbps"] == 2.0
    assert ceilings.ceilings([2, 1])["threads"]["2"] == first["threads"]["2"]
    assert calls == [1, 2], "one thread is measured too"
    ceilings.ceilings([2], remeasure=True)
    assert calls == [1, 2, 1, 2]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len(list(cache.iterdir())) == 2, "no temporary file is left"


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Probes of a machine that makes 10^9 operations a second a thread; a core is taken away in two of three windows."""
    calls: list[tuple[str, int]] = []

    def probe(name: str, threads: int, amount: int, **how: object) -> tuple[float, int]:
        calls.append((name, threads))
        window = calls.count(calls[0])  # the first probe opens each window
        return (1.0 if window == 2 else 10.0), threads * 10**9

    monkeypatch.setattr(native, "probe", probe)
    return calls


def test_a_window_in_which_a_core_was_taken_away_does_not_count(shaky: list[tuple[str, int]]) -> None:
    found = ceilings.measure(2)
    assert found.keys() == set(NAMES)
    assert set(found.values()) == {2.0}
    assert len({name for name, _ in shaky}) >= 3


def test_two_threads_are_never_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 167.0, 2: 51.0, 4: 300.0}
    monkeypatch.setattr(ceilings, "measure", lambda threads: dict.fromkeys(NAMES, rates[threads]))
    found = ceilings.ceilings([1, 2, 4])["threads"]
    assert {count: set(limits.values()) for count, limits in found.items()} == {
        "1": {167.0},
        "2": {167.0},
        "4": {300.0},
    }


def test_fewer_bits_have_at_least_the_peak_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"int8": 5.0, "int7": 4.0, "int4": 3.0, "fp32": 2.0, "bf16": 1.0, "read": 9.0}
    table = [(f"{kind}_scalar", kind, "") for kind in rates]
    monkeypatch.setattr(native, "probes", lambda: table)
    monkeypatch.setattr(native, "probe", lambda name, *_, **__: (1.0, int(rates[name.split("_")[0]] * 1e9)))
    found = ceilings.measure(1)
    assert [found[name] for name in ("int4_gops", "int7_gops", "int8_gops")] == [5.0, 5.0, 5.0]
    assert (found["bf16_gflops"], found["fp32_gflops"]) == (2.0, 2.0)


def test_probes_are_held_to_the_targets_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [(f"int8_{feature}", "int8", "") for feature in ("scalar", "avx2", "avxvnni", "avx512vnni")]
    monkeypatch.setattr(native, "probes", lambda: table)
    machine = ceilings.targets.Machine("A CPU", (), ("torch", "scalar", "avx2"), {}, "avx2")
    monkeypatch.setattr(ceilings.targets, "detect", lambda: machine)
    assert ceilings._probes("int8") == ["int8_scalar", "int8_avx2"]


def _change(path: Path, **changes: object) -> str:
    found = json.loads(path.read_text())
    return json.dumps({**found, **changes})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: "",
        lambda path: path.read_text()[:-20],
        lambda path: "[" * 100_000,
        lambda path: "[1]",
        lambda path: _change(path, key=None),
        lambda path: _change(path, key={**json.loads(path.read_text())["key"], "cpu": "another"}),
        lambda path: _change(path, key={**json.loads(path.read_text())["key"], "schema": 0}),
        lambda path: _change(path, limits=None),
        lambda path: _change(path, limits={}),
        lambda path: _change(path, limits={**LIMITS, "more": 1.0}),
        lambda path: _change(path, limits={**LIMITS, "l3_gbps": "1"}),
        lambda path: _change(path, limits={**LIMITS, "l3_gbps": True}),
        lambda path: _change(path, limits={**LIMITS, "l3_gbps": -1.0}),
        lambda path: _change(path, limits={**LIMITS, "l3_gbps": float("nan")}),
        lambda path: _change(path, limits={**LIMITS, "l3_gbps": 10**400}),
    ],
)
def test_garbage_is_a_miss(spoil) -> None:
    ceilings_cache.store({2: LIMITS})
    assert ceilings_cache.load(2, NAMES) == LIMITS
    path = ceilings_cache.path_of(2)
    path.write_text(spoil(path))
    assert ceilings_cache.load(2, NAMES) is None
    path.write_bytes(b"\xff\xfe")
    assert ceilings_cache.load(2, NAMES) is None
    ceilings_cache.store({2: LIMITS})
    assert ceilings_cache.load(2, NAMES) == LIMITS


def test_another_machine_version_or_thread_count_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings_cache.store({2: LIMITS})
    assert ceilings_cache.load(1, NAMES) is None
    with monkeypatch.context() as patch:
        patch.setattr(native, "cpu", lambda: ("another CPU", ("avx2",)))
        assert ceilings_cache.load(2, NAMES) is None
    with monkeypatch.context() as patch:
        patch.setattr(ceilings_cache, "__version__", "0.0.0")
        assert ceilings_cache.load(2, NAMES) is None
    assert ceilings_cache.load(2, NAMES) == LIMITS


def test_a_directory_that_cannot_be_made_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(ceilings, "measure", lambda threads: LIMITS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ceilings.ceilings([1, 2])["threads"]["1"] == LIMITS
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "cannot cache" in str(caught[0].message)


def test_a_write_that_fails_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings_cache.store({2: LIMITS})

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="no space left"):
        ceilings_cache.store({2: {**LIMITS, "dram_gbps": 1.0}})
    assert ceilings_cache.load(2, NAMES) == LIMITS
    assert len(list(cache.iterdir())) == 1, "no temporary file is left"


def _store_often(value: float) -> None:
    for _ in range(50):
        ceilings_cache.store({2: dict.fromkeys(NAMES, value)})


def test_two_writers_and_a_reader_that_never_sees_half_a_file() -> None:
    ceilings_cache.store({2: dict.fromkeys(NAMES, 1.0)})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_store_often, args=(value,)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = ceilings_cache.load(2, NAMES)
        assert found is not None
        assert len(set(found.values())) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0


def test_relative_cache_home_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ceilings_cache.directory() == tmp_path / ".cache" / "nybble"


def test_the_table_names_every_limit() -> None:
    text = ceilings.table({"threads": {"1": LIMITS, "2": LIMITS}})
    assert len(text.splitlines()) == 4
    assert all(column in text for column in ceilings._COLUMNS.values())
