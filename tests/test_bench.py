"""The bench: its command line, shapes, copies, checks, timing and lines of results. Nothing here asserts a time."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace

import pytest
import torch

from nybble.bench import contestants, machine, output, peers, results, run, shapes, timing
from nybble.bench.peers.peer import Peer
from nybble.bench.weights import WeightKind
from nybble.dispatch.registry import specs

cli = importlib.import_module("nybble.bench.__main__")

LIMITS = {"dram_gbps": 40, "dram_huge_gbps": 45, "l3_gbps": 200, "bf16_gflops": 900}
LIMITS |= {"int8_gops": 2000, "int7_gops": 2100, "int4_gops": 2200}
CEILINGS = {"threads": {"1": {**LIMITS, "fp32_gflops": 500}}}
KEYS = """
    kind contestant peer scheme weight_bits dtype takes m n k threads cache us us_p10 us_p90 bytes gbps gops multiply
    peak bound roofline read_gbps spread noisy rounds vs_bf16 best_peer vs_peer pattern kept vs_dense bytes_vs_dense
"""
TINY = run.Grid(((48, 64),), (1, 5), (torch.bfloat16,), (1,), ("hot",), 0.001)
W4A8 = WeightKind.parse("w4a8g32")


def scalar(family="w4a8"):
    return next(spec for spec in specs() if spec.name == f"{family}_scalar")


def lines(makers, grid=TINY):
    return [line for rows in run.race(makers, grid, CEILINGS) for line in rows]


# --- command line


def test_parser_reads_lists_and_names():
    args = cli.parser().parse_args(["--shapes", "odd,8x16", "--m", "1,4", "--dtype", "fp32,fp16", "--threads", "1,2"])
    assert args.shapes == (*shapes.SETS["odd"], (8, 16))
    assert (args.m, args.dtype, args.threads) == ([1, 4], [torch.float32, torch.float16], [1, 2])


def test_every_default_is_one_that_the_parser_would_read():
    args = cli.parser().parse_args([])
    assert args.shapes == ((4096, 4096),)
    assert args.m == [1, 4, 16, 64, 256]
    assert args.dtype == [torch.bfloat16]
    assert args.budget is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "8x"], "must be NxK or one of"),
        (["--shapes", "llama"], "must be NxK or one of"),
        (["--shapes", "0x8"], "must be NxK or one of"),
        (["--m", "0"], "above 0"),
        (["--dtype", "int8"], "not one of"),
        (["--budget", "-1"], "above 0"),
        (["--preset", "x"], "cpu-targets"),
    ],
)
def test_wrong_usage_is_refused_with_the_reason(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes_come_once_each_in_order():
    assert shapes.parse_shapes("8x16,4x4,8x16") == ((8, 16), (4, 4))
    everything = shapes.parse_shapes(",".join(shapes.SETS))
    assert set(everything) == {shape for named in shapes.SETS.values() for shape in named}


def test_a_run_writes_the_run_then_its_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_ceilings", lambda threads: CEILINGS)
    words = ["--kernel", "w4a8_scalar-w4a8g32", "--shapes", "48x64", "--m", "1,5", "--threads", "1", "--hot"]
    words += ["--peers", "torch bf16", "--budget", "0.001"]
    assert cli.main([*words, "--json", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "a").read_text()
    first, *rest = (json.loads(line) for line in printed.splitlines())
    assert set(first) == {
        "kind",
        "preset",
        "date",
        "commit",
        "cpu",
        "targets",
        "cap",
        "threads",
        "versions",
        "ceilings",
    }
    assert [(line["kind"], line["contestant"], line["m"]) for line in rest] == [
        ("result", name, m) for m in (1, 5) for name in ("w4a8_scalar", "torch bf16")
    ]
    assert cli.main(words) == 0
    assert "48x64  m=5  bf16  1 thread  hot" in capsys.readouterr().out


def test_a_glob_that_matches_nothing_is_a_stated_failure(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_ceilings", lambda threads: CEILINGS)
    assert cli.main(["--kernel", "w2*", "--threads", "1"]) == 1
    assert "no kernel that runs here matches" in capsys.readouterr().err
    assert cli.main(["--peers", "mkl"]) == 1
    assert "matches none of" in capsys.readouterr().err


# --- the machine


def test_the_commit_of_a_checkout(tmp_path):
    assert machine.commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert machine.commit(tmp_path) is None
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\n")
    assert machine.commit(tmp_path) == "abc"
    (git / "refs" / "heads" / "main").write_text("def\n")
    assert machine.commit(tmp_path) == "def"
    (git / "HEAD").write_text("123\n")
    assert machine.commit(tmp_path) == "123"


# --- copies


@pytest.mark.parametrize("weight_bytes", [1, 1000, 1 << 20, (128 << 20) - 1, 128 << 20, 1 << 30])
def test_cold_copies_exceed_four_caches_and_are_the_fewest(weight_bytes):
    copied = contestants.COLD_CACHES * (32 << 20)
    site = contestants.Site(torch.empty(1, 1), torch.float32, copied)
    count = site.copies(weight_bytes)
    assert count * weight_bytes > copied
    assert (count - 1) * weight_bytes <= copied


def test_hot_is_one_copy():
    assert contestants.Site(torch.empty(1, 1), torch.float32, 0).copies(1) == 1


@pytest.mark.parametrize(
    "maker", [contestants.KernelMaker(scalar(), W4A8), contestants.LayerMaker(W4A8.scheme)], ids=lambda m: m.name
)
def test_copies_lie_apart_and_compute_the_same(maker):
    weight, x = run.draw((33, 64), 3)
    contestant = maker.make(contestants.Site(weight, torch.float32, 10_000))
    calls = contestant.bind(x)
    assert len(calls) * contestant.weight_bytes > 10_000
    outputs = [call().clone() for call in calls]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    held = [call.args[2] if len(call.args) == 4 else call.func.packed for call in calls]
    assert len({tensor.data_ptr() for tensor in held}) == len(calls)


# --- checks


def broken(change):
    """The scalar kernel with its output changed."""
    good = scalar()

    def make(scheme, n, k):
        plan = good.make(scheme, n, k)

        def wrong(x, packed, bias, out):
            plan(x, packed, bias, out)
            change(out)

        return wrong

    return contestants.KernelMaker(replace(good, make=make), W4A8)


def poke(row, column, value):
    def change(out):
        if out.shape[0] > abs(row):
            out[row, column] = value

    return change


@pytest.mark.parametrize(
    "change",
    [poke(0, 47, 1e4), poke(-1, 0, torch.nan), poke(2, 5, 1e4), lambda out: out.mul_(1.1)],
    ids=["first", "last", "third", "all"],
)
def test_a_wrong_kernel_is_not_timed(change, monkeypatch):
    monkeypatch.setattr(run, "in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(contestants.WrongKernelError, match=r"w4a8_scalar w4a8g32 n=48 k=64 m=\d: off by .*; not timed"):
        lines([broken(change)])


def test_a_right_kernel_is_timed():
    assert [line["m"] for line in lines([broken(lambda out: None)])] == [1, 5]


def test_the_command_fails_for_a_wrong_kernel(monkeypatch, capsys):
    monkeypatch.setattr(cli, "kernel_makers", lambda pattern: [broken(lambda out: out.zero_())])
    monkeypatch.setattr(cli, "_ceilings", lambda threads: CEILINGS)
    assert cli.main(["--shapes", "48x64", "--peers", "none", "--hot", "--m", "1", "--threads", "1", "--json"]) == 1
    captured = capsys.readouterr()
    assert "w4a8_scalar" in captured.err
    assert '"result"' not in captured.out


def test_no_kernel_matches():
    with pytest.raises(ValueError, match="no kernel that runs here"):
        contestants.kernel_makers("w2*")


def some_rows():
    """A kernel for 9 rows and more of bfloat16, as those of tiles are."""
    return replace(scalar(), name="w4a8_tiles", m_range=(9, None), act_dtypes=(torch.bfloat16,))


def test_kernels_for_many_rows_or_one_dtype_are_found_by_name(monkeypatch):
    monkeypatch.setattr(contestants, "specs", lambda: (scalar(), some_rows()))
    assert [maker.spec.m_range for maker in contestants.kernel_makers("w4a8_tiles-w4a8g32")] == [(9, None)]
    rows = lines([contestants.KernelMaker(some_rows(), W4A8)])
    assert [row["m"] for row in rows] == [1, 5], "fewer rows too than dispatch would give it"


def test_a_kernel_does_not_run_on_activations_that_it_does_not_take():
    site = contestants.Site(torch.ones(2, 2), torch.float32, 0)
    with pytest.raises(contestants.NotHereError, match="takes bfloat16, not float32"):
        contestants.KernelMaker(some_rows(), W4A8).make(site)


# --- peers


def peer(make=None, **fields):
    def dense(weight, dtype, copies):
        return [lambda x: x @ weight.t()] * copies

    return Peer(
        **{"name": "p", "weight_bits": 8, "multiply": "fp32", "dtypes": (torch.float32,), **fields}, make=make or dense
    )


def refuse(weight, dtype, copies):
    raise RuntimeError("no AMX\nmore")


def wrong(weight, dtype, copies):
    return [lambda x: x @ weight.t() * 1.5]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (peer(needs=("no_such_module",)), "no_such_module not installed (pip install 'nybble[peers]')"),
        (peer(refuse), "RuntimeError: no AMX"),
        (peer(wrong), "wrong: m=1: relative error 0.5 against the dense product, above 0.06"),
    ],
    ids=["absent", "refuses", "wrong"],
)
def test_a_peer_is_left_out_with_the_reason(entry, reason):
    kernel = contestants.KernelMaker(scalar(), W4A8)
    found = lines([kernel, contestants.PeerMaker(entry)])
    assert found[0] == {"kind": "skip", "contestant": "p", "reason": reason}
    assert {line["contestant"] for line in found[1:]} == {"w4a8_scalar"}


def test_a_peer_whose_cold_copies_are_too_many_is_left_out():
    site = contestants.Site(torch.zeros(2, 2), torch.float32, 10_000)
    with pytest.raises(contestants.NotHereError, match="2x2 needs 2501 copies to exceed the cache"):
        contestants.PeerMaker(peer()).make(site)


def test_a_peer_gets_a_dtype_that_it_takes():
    both = peer(dtypes=(torch.bfloat16, torch.float32))
    assert both.takes(torch.float32) == torch.float32
    assert both.takes(torch.float16) == torch.bfloat16


def test_peers_by_glob():
    assert peers.matching("none") == ()
    assert {p.name for p in peers.matching("torch ??*32")} == {"torch fp32"}
    assert len({p.name for p in peers.PEERS}) == len(peers.PEERS)
    with pytest.raises(ValueError, match="matches none of"):
        peers.matching("mkl")


# Some of torch's products need instructions of their own, and the other libraries are extras.
@pytest.mark.parametrize("entry", peers.PEERS, ids=lambda p: p.name)
def test_each_peer_computes_the_product(entry):
    if entry.why_not() is not None:
        pytest.skip(entry.why_not())
    weight, x = run.draw((64, 256), 5)
    site = contestants.Site(weight, torch.bfloat16, entry.weight_bytes(weight))
    try:
        contestant = contestants.PeerMaker(entry).make(site)
    except contestants.NotHereError as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        assert run.verify(contestant, x, (1, 5)) is None
        calls = contestant.bind(x.to(contestant.dtype))
        first, last = (torch.as_tensor(call()).clone() for call in (calls[0], calls[-1]))
    assert len(calls) == 2
    assert torch.equal(first, last)


# --- timing and results


def test_every_contestant_is_called_in_turn_over_its_copies(monkeypatch):
    monkeypatch.setattr(timing, "SLOW", float("inf"))
    called = []
    runners = [timing.Runner([lambda i=i, c=c: called.append((i, c)) for c in range(3)]) for i in range(2)]
    timings, spread = timing.in_turns(runners, 1e-9)
    assert [t.rounds for t in timings] == [timing.MIN_ROUNDS] * 2
    assert spread >= 0
    for i in range(2):
        order = [c for who, c in called if who == i]
        assert order == [c % 3 for c in range(len(order))]


def test_the_slow_run_in_fewer_rounds():
    runners = [timing.Runner([lambda: None]), timing.Runner([lambda: time.sleep(1e-3)])]
    fast, slow = timing.in_turns(runners, 1e-9)[0]
    assert (fast.rounds, slow.rounds) == (timing.MIN_ROUNDS, -(-timing.MIN_ROUNDS // timing.SLOW_EVERY))


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 3), (10.0, 1)])
def test_a_long_call_is_timed_once_for_a_first_estimate(monkeypatch, seconds, times):
    clock = [0.0]
    called = []

    def call():
        called.append(None)
        clock[0] += seconds

    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    assert timing._Entry(timing.Runner([call])).once == max(seconds, 1e-9)
    assert len(called) == times


def test_nothing_to_time_is_refused():
    for runners in ([], [timing.Runner([])]):
        with pytest.raises(ValueError, match="at least one"):
            timing.in_turns(runners, 1)


def test_medians_and_deciles():
    found = timing.summarize([float(i) for i in range(11)])
    assert (found.p10, found.median, found.p90, found.rounds) == (1, 5, 9, 11)
    assert timing.spread(timing.Timing(1.0, 0, 0, 1), timing.Timing(1.1, 0, 0, 1)) == pytest.approx(0.1)


def test_results_have_every_key_and_hold_together():
    makers = [contestants.KernelMaker(scalar(), W4A8), *map(contestants.PeerMaker, peers.matching("torch [bf]*[26]"))]
    found = lines(makers)
    assert all(set(line) == set(KEYS.split()) for line in found)
    assert [(line["contestant"], line["m"]) for line in found] == [
        (name, m) for m in (1, 5) for name in ("w4a8_scalar", "torch fp32", "torch bf16")
    ]
    for line in found:
        assert json.loads(json.dumps(line)) == line
        assert line["gops"] == pytest.approx(2 * line["m"] * 48 * 64 / line["us"] / 1e3, abs=0.1)
        assert line["noisy"] == (line["spread"] > timing.NOISY_ABOVE)
    kernel, fp32, bf16 = found[:3]
    assert (kernel["best_peer"], kernel["vs_peer"]) == (None, None)
    assert kernel["vs_bf16"] == pytest.approx(bf16["us"] / kernel["us"], rel=1e-2)
    assert (fp32["best_peer"], fp32["vs_peer"]) == ("torch fp32", 1)
    assert (kernel["takes"], fp32["takes"], bf16["takes"]) == ("bf16", "fp32", "bf16")


def test_the_memory_is_read_in_every_cold_race(monkeypatch):
    monkeypatch.setattr(run, "last_level_cache", lambda: 10_000)
    makers = [contestants.KernelMaker(scalar(), W4A8)]
    cold, hot = lines(makers, replace(TINY, ms=(1,), caches=("cold", "hot")))
    assert cold["read_gbps"] > 0
    assert hot["read_gbps"] is None
    assert set(cold) == set(KEYS.split())
    read_bytes, calls = run.reading(contestants.Site(torch.zeros(2, 2), torch.float32, 40_000), 1003)
    assert read_bytes == 1000
    assert len(calls) * read_bytes > 40_000
    assert len({call.__self__.data_ptr() for call in calls}) == len(calls)


def test_peaks_are_measured_with_each_cell(monkeypatch):
    found = iter([1000.0, 3000.0, 5000.0, 4000.0])
    monkeypatch.setattr(run, "peaks", lambda threads: dict.fromkeys(("int8_gops", "int4_gops"), next(found)))
    one, five = lines([contestants.KernelMaker(scalar(), W4A8)])
    assert (one["peak"], five["peak"]) == (3000.0, 5000.0)


def test_the_roofline_is_the_slower_of_memory_and_multiplies(monkeypatch):
    monkeypatch.setattr(results, "last_level_cache", lambda: 200_000)
    limits = CEILINGS["threads"]["1"]
    assert results.roofline(limits, "int8", 45_000, 2_000, "cold") == ("memory", pytest.approx(1.0))
    assert results.roofline(limits, "int8", 200_000, 2_000, "hot") == ("memory", pytest.approx(1.0))
    faster = {**limits, "read_gbps": 90}
    assert results.roofline(faster, "int8", 45_000, 2_000, "cold") == ("memory", pytest.approx(0.5))
    assert results.roofline(limits, "int8", 450_000, 2_000, "hot") == ("memory", pytest.approx(10.0))
    assert results.roofline(limits, "fp32", 45_000, 1_000_000, "cold") == ("compute", pytest.approx(2.0))


def test_output_says_a_skip_once_and_writes_what_load_reads(tmp_path, capsys):
    skip = {"kind": "skip", "contestant": "p", "reason": "absent"}
    path = tmp_path / "out.jsonl"
    rows = lines([contestants.KernelMaker(scalar(), W4A8)])
    with output.sink(path, as_json=False) as put:
        put([skip])
        put([skip, *rows[:1]])
    assert output.load(path) == [skip, rows[0]]
    text = capsys.readouterr().out
    assert text.count("skipped p: absent") == 1
    assert "w4a8_scalar" in text


@pytest.mark.parametrize("text", ["{", "[1]", '{"us": 1}'])
def test_a_file_that_is_no_results_is_refused(text, tmp_path):
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x:1: not"):
        output.load(path)
