"""The bench of sparse weights: kinds of weight, checks, peers, targets, crossover. Nothing here asserts a time."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from nybble import native
from nybble.bench import contestants, crossover, goals, peers, presets, run
from nybble.bench.crossover_html import crossover_parts
from nybble.bench.goal_tables import DENSE, OF_BYTES, SPARSE
from nybble.bench.peers import torch_sparse
from nybble.bench.report import report
from nybble.bench.report_html import page
from nybble.bench.setup import Setup
from nybble.bench.weights import WeightKind
from nybble.weights.rounding import dequantize_weight, unpack_nibbles

cli = importlib.import_module("nybble.bench.__main__")

LIMITS = {"dram_gbps": 40, "dram_huge_gbps": 45, "l3_gbps": 200, "bf16_gflops": 900}
LIMITS |= {"int8_gops": 2000, "int7_gops": 2100, "int4_gops": 2200}
CEILINGS = {"threads": {threads: {**LIMITS, "fp32_gflops": 500} for threads in ("1", "2")}}
TINY = run.Grid(((64, 128),), (1, 5), (torch.bfloat16,), (1,), ("hot",), 0.001)
RUN = {"kind": "run", "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "cpu": "A <CPU>", "threads": [2]}
RUN |= {"versions": {"torch": "2.13.0"}, "ceilings": CEILINGS}
EVERY_KIND = (*SPARSE.schemes, *(kind for kinds in crossover.SERIES.values() for kind in kinds))


def scalar(text):
    kind = WeightKind.parse(text)
    return next(m for m in contestants.kernel_makers(f"*_scalar*-{kind}") if m.kind == kind)


def lines(makers, grid=TINY):
    return [line for rows in run.race(makers, grid, CEILINGS) for line in rows]


# --- kinds of weight


@pytest.mark.parametrize("text", EVERY_KIND)
def test_a_kind_reads_what_it_writes(text):
    assert str(WeightKind.parse(text)) == text


@pytest.mark.parametrize("text", ["sp50w8a8:75%", "w8a8:75%", "bs32x32w8a8:0.75", "bs32x32w8a8:0%", "w3a8"])
def test_a_wrong_kind_is_refused(text):
    with pytest.raises(ValueError, match=r"must be|not a scheme"):
        WeightKind.parse(text)


@pytest.mark.parametrize("text", ["sp80w8a8", "sp32of128w8a8", "sp24w4a8g32", "sp50w4a8g128", "bs32x32w8a8:75%"])
def test_a_drawn_weight_has_the_zeros_of_its_kind_and_no_others(text):
    kind, (n, k) = WeightKind.parse(text), (512, 1024)
    weight = kind.draw(n, k)
    codes = weight.qweight if kind.scheme.weight_bits == 8 else unpack_nibbles(weight.qweight, k).int() - 8
    exact = text.startswith(("sp32of128", "sp24"))
    zeros = float((codes == 0).float().mean())
    assert zeros == pytest.approx(kind.pattern.zeros, abs=1e-6 if exact else 0.05 if "bs" in text else 0.01)
    if "bs" in text:
        kept = codes.view(n // 32, 32, k // 32, 32).ne(0).float().mean((1, 3))
        assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(weight.qweight, kind.draw(n, k).qweight)


# --- kernels


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("text", ["sp50w8a8", "sp24w4a8g32", "bs32x32w8a8:75%", "sp90w8a16"])
def test_a_sparse_kernel_is_run_with_the_bytes_that_it_packs(text):
    maker = scalar(text)
    one, five = lines([maker])
    packed = native.pack(maker.kind.draw(64, 128), maker.kind.scheme, 128, maker.spec.layout)
    assert one["bytes"] == packed.nbytes + (64 + 128) * 2
    assert (one["scheme"], one["pattern"]) == (text, str(maker.kind.pattern))
    assert one["kept"] == pytest.approx(1 - maker.kind.pattern.zeros, abs=0.2)
    assert five["gops"] == pytest.approx(2 * 5 * 64 * 128 * one["kept"] / five["us"] / 1e3, abs=0.1)


def test_copies_are_as_many_as_their_packed_bytes_ask_for():
    counts = {}
    for text in ("sp50w8a8", "sp90w8a8"):
        contestant = scalar(text).make(contestants.Site(torch.empty(256, 256), torch.float32, 200_000))
        counts[text] = len(contestant.bind(torch.zeros(1, 256)))
        assert counts[text] * contestant.weight_bytes > 200_000
    assert counts["sp90w8a8"] > counts["sp50w8a8"]


@pytest.mark.parametrize("text", ["sp50w8a8", "sp70w4a8g128", "bs32x32w8a8:50%"])
def test_a_wrong_sparse_kernel_is_not_timed(text, monkeypatch):
    good = scalar(text)

    def make(scheme, n, k):
        plan = good.spec.make(scheme, n, k)

        def wrong(x, packed, bias, out):
            plan(x, packed, bias, out)
            out[-1, 7] += 1e4

        return wrong

    monkeypatch.setattr(run, "in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(contestants.WrongKernelError, match=r"off by .*; not timed"):
        lines([contestants.KernelMaker(replace(good.spec, make=make), good.kind)])


def test_a_sparse_kernel_is_held_against_the_fastest_dense_one_of_its_numbers():
    makers = [scalar("w8a8"), scalar("w4a8g128"), scalar("sp90w8a8"), scalar("bs32x32w8a8:75%")]
    found = lines(makers, replace(TINY, ms=(1,)))
    dense, four, *sparse = found
    assert (dense["vs_dense"], four["vs_dense"], dense["pattern"], dense["kept"]) == (None, None, None, 1)
    for row in sparse:
        assert row["vs_dense"] == pytest.approx(dense["us"] / row["us"], rel=1e-2)
        assert row["bytes_vs_dense"] == pytest.approx(dense["bytes"] / row["bytes"], rel=1e-3)


def test_the_command_line_takes_a_kind_that_the_tests_do_not_have():
    assert {str(maker.kind) for maker in contestants.kernel_makers("*-sp83w8a8")} == {"sp83w8a8"}
    assert {str(maker.kind) for maker in contestants.kernel_makers("*-bs64x16w8a8:90%")} == {"bs64x16w8a8:90%"}
    assert {maker.kind.scheme.family for maker in contestants.kernel_makers("sp*_scalar*")} >= {"spw8a8", "spw4a8"}


def test_each_layout_has_its_fastest_kernel_and_dispatch_names_one_of_them():
    for text in ("sp30w8a8", "sp95w8a8", "bs32x32w8a8:50%"):
        found = contestants.each_layout(text)
        assert len({maker.spec.layout for maker in found}) == len(found)
        assert contestants.chosen(text, torch.bfloat16).spec in [maker.spec for maker in found]


# --- peers

SPARSE_PEERS = [peer for peer in peers.PEERS if peer.sparse]


def test_sparse_peers_run_with_the_patterns_that_they_are_for():
    kinds = [WeightKind.parse(text) for text in ("w8a8", "sp50w8a8", "sp50w4a8g128", "bs32x32w8a8:75%", "bs16x4w8a8")]
    names = [maker.name for maker in contestants.peer_makers(peers.PEERS, kinds)]
    assert [name for name in names if "csr" in name or "bsr" in name] == [
        "torch csr sp50",
        "torch bsr bs32x32:75%",
        "scipy csr sp50",
    ]
    assert "torch bf16" in names
    assert not any(maker.peer.sparse for maker in contestants.peer_makers(peers.PEERS, kinds[:1]))


@pytest.mark.parametrize("peer", SPARSE_PEERS, ids=lambda peer: peer.name)
def test_a_sparse_peer_multiplies_the_weight_of_the_kernels(peer):
    if peer.why_not() is not None:
        pytest.skip(peer.why_not())
    kind = WeightKind.parse({"sp": "sp80w8a8", "bs32x32": "bs32x32w8a8:75%"}[peer.sparse])
    site = contestants.Site(torch.zeros(64, 128), torch.bfloat16, 0)
    try:
        contestant = contestants.PeerMaker(peer, kind).make(site)
    except contestants.NotHereError as reason:  # torch without MKL has no product of blocks
        pytest.skip(str(reason))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    weight = dequantize_weight(kind.draw(64, 128), kind.scheme, 128)
    torch.testing.assert_close(torch.as_tensor(contestant.bind(x)[0]()), x @ weight.t(), atol=1e-3, rtol=1e-3)
    kept = int(weight.count_nonzero())
    assert contestant.kept == kept / weight.numel()
    expected = 8 * kept + 4 * 65 if peer.sparse == "sp" else kept // 1024 * 4100 + 4 * 3
    assert contestant.weight_bytes == expected


@pytest.mark.parametrize(
    ("peer", "shape", "reason"),
    [
        (replace(torch_sparse.PEERS[0], needs=("no_such_module",)), (64, 128), "no_such_module not installed"),
        (torch_sparse.PEERS[1], (48, 128), "RuntimeError: "),
    ],
    ids=["absent", "refuses"],
)
def test_a_sparse_peer_is_left_out_with_the_reason(peer, shape, reason):
    kernel = scalar("bs32x32w8a8:75%")
    found = lines([kernel, contestants.PeerMaker(peer, kernel.kind)], replace(TINY, shapes=(shape,)))
    assert found[0]["kind"] == "skip"
    assert found[0]["contestant"] == f"{peer.name} bs32x32:75%"
    assert reason in found[0]["reason"]
    assert {line["contestant"] for line in found[1:]} == {kernel.name}


def test_the_rivals_of_sparse_weights_leave_out_the_same_ones():
    kernels = [scalar("sp50w8a8"), scalar("sp90w8a8"), scalar("w8a8")]
    makers = [*kernels, *contestants.peer_makers(peers.matching("torch [bc]*"), [maker.kind for maker in kernels])]
    best = {row["scheme"] or row["contestant"]: row["best_peer"] for row in lines(makers, replace(TINY, ms=(1,)))}
    assert (best["sp50w8a8"], best["sp90w8a8"], best["w8a8"]) == ("torch csr sp50", "torch csr sp90", None)
    assert best["torch bf16"] == "torch bf16"


# --- targets


def row(scheme, m=1, shape=(4096, 4096), us=100.0, **fields):
    base = {"kind": "result", "contestant": f"{scheme} kernel", "peer": False, "scheme": scheme, "m": m, "us": us}
    base |= {"n": shape[0], "k": shape[1], "dtype": "bf16", "threads": 2, "cache": "cold", "weight_bits": 8}
    base |= {"vs_bf16": 3.0, "vs_dense": 1.5, "bytes_vs_dense": 1.6, "vs_peer": None, "best_peer": None}
    base |= {"pattern": "p", "noisy": False, "spread": 0.01, "bytes": 1000, "gops": 100.0, "bound": "memory"}
    return {**base, "roofline": 0.9, "kept": 0.5, **fields}


def cell(*sparse, shape=(4096, 4096), m=1):
    """Results of a cell: (kind, microseconds, bytes of dense over its own), w8a8 with 150 us and torch bf16 with 300."""
    found = [row(kind, m, shape, us, bytes_vs_dense=gain) for kind, us, gain in sparse]
    bf16 = row(None, m, shape, 300.0, contestant="torch bf16", peer=True, pattern=None, weight_bits=16)
    return [*found, row("w8a8", m, shape, 150.0, pattern=None), bf16]


# The table of the issue that asked for them: M = 1, 16, 256.
ASKED = """
sp50w8a8 1.4 1.0 0.9, sp70w8a8 1.4 1.1 1.2, sp80w8a8 1.9 1.4 1.6, sp90w8a8 3.2 2.0 2.4, sp95w8a8 5 3.2 3.2,
sp32of128w8a8 1.8 1.6 1.8, sp16of128w8a8 3.6 3.0 3.2, sp8of128w8a8 6 6 5, sp24w8a8 1.4 1.0 0.9,
sp50w4a8g128 1.25 - -, sp32of128w4a8g128 1.3 - -, bs32x32w8a8:50% - - 1.8, bs32x32w8a8:75% - - 3.3,
bs32x32w8a8:90% - - 7
"""


def test_every_target_that_was_asked_for_has_an_entry():
    asked = {}
    for part in ASKED.replace("\n", " ").split(","):
        kind, *ratios = part.split()
        asked |= {(kind, m): float(ratio) for m, ratio in zip((1, 16, 256), ratios, strict=True) if ratio != "-"}
    over_dense = [goal for goal in SPARSE.goals if goal.measure == DENSE]
    assert {(goal.label, goal.m): goal.bound for goal in over_dense if goal.bound is not None} == asked
    assert len(over_dense) == 3 * len(SPARSE.schemes)
    of_bytes = {goal.label: (goal.m, goal.bound) for goal in SPARSE.goals if goal.measure == OF_BYTES}
    assert of_bytes == {f"bs32x32w8a8:{percent}%": (1, 0.85) for percent in (50, 75, 90)}
    assert SPARSE.shapes == ((4096, 4096), (4096, 14336))


def test_the_table_says_what_is_reached_and_missed():
    rows = cell(("sp50w8a8", 100.0, 1.6), ("sp24w8a8", 107.0, 1.6), ("bs32x32w8a8:75%", 50.0, 4.0))
    rows += cell(
        ("sp50w8a8", 115.0, 1.6), ("sp24w8a8", 107.0, 1.6), ("bs32x32w8a8:75%", 40.0, 4.0), shape=(4096, 14336)
    )
    text = goals.show(SPARSE, rows)
    assert "1.40x (1.30x) / 1.4x MISSED, [2.61x over torch bf16]" in text
    assert "1.40x (1.40x) / 1.4x met, [2.80x over torch bf16]" in text
    assert "3.35x (3.00x), 84% (75%) of its bytes / 85% MISSED" in text
    assert "MISSED sp50w8a8 M=1: 1.30x of w8a8 kernel at 4096x14336" in text
    assert "MISSED bs32x32w8a8:75% M=1: 75% of w8a8 kernel at 4096x4096" in text
    bound = [goal for goal in SPARSE.goals if goal.bound is not None]
    assert text.count("not measured") == len(bound) - 3
    assert json.loads(json.dumps([checked.line() for checked in goals.checks(SPARSE, rows)]))


def test_without_dense_kernels_nothing_is_missed():
    rows = [row(kind) for kind in SPARSE.schemes]
    assert {checked.met for checked in goals.checks(SPARSE, rows)} == {None}


def write(path, *rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(path)


def test_report_shows_the_table_of_a_file(tmp_path, capsys):
    rows = [row for shape in SPARSE.shapes for row in cell(("sp50w8a8", 100.0, 1.6), shape=shape)]
    path = write(tmp_path / "a", {**RUN, "preset": "sparse-targets"}, *rows)
    assert cli.main(["report", path, "--markdown"]) == 0
    assert "| sp50w8a8 | 1.50x (1.50x) / 1.4x met, [3.00x over torch bf16] |" in capsys.readouterr().out
    assert cli.main(["report", path]) == 0
    assert "1.50x (1.50x) / 1.4x met" in capsys.readouterr().out


@pytest.mark.full
def test_the_preset_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_ceilings", lambda threads: CEILINGS)
    monkeypatch.setattr(presets, "SPARSE", replace(SPARSE, shapes=((32, 128),)))
    monkeypatch.setattr(run, "COLD_CACHES", 0)
    out = tmp_path / "a"
    assert (
        cli.main(["--preset", "sparse-targets", "--peers", "torch bf16", "--budget", "0.001", "--out", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["preset"] == "sparse-targets"
    measured = {line["scheme"] for line in rows if line["kind"] == "result"}
    assert measured == {None, "w8a8", "w4a8g128", *SPARSE.schemes}
    assert not any(line["met"] is None for line in rows if line["kind"] == "target" and line["bound"] is not None)
    assert "not measured" not in capsys.readouterr().out


# --- crossover


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], None),
        ([(0.5, 1.2)], 0.5),
        ([(0.5, 0.9)], None),
        ([(0.3, 1.0), (0.5, 2.0)], 0.3),
        ([(0.3, 0.5), (0.5, 2.0)], 0.4),  # halfway between half and twice as fast
        ([(0.3, 0.5), (0.5, 1.0), (0.7, 2.0)], 0.5),
        ([(0.3, 1.2), (0.5, 0.5), (0.7, 2.0), (0.9, 3.0)], 0.6),  # what is lost again does not count
        ([(0.3, 1.2), (0.5, 2.0), (0.7, 0.9)], None),
    ],
)
def test_from_which_share_of_zeros_it_pays(points, expected):
    assert crossover.pays_from(points) == (None if expected is None else pytest.approx(expected))


def race(m, times):
    """Lines of a race: from (scheme or peer, pattern, contestant) to microseconds."""
    for (name, pattern, contestant), us in times.items():
        peer = name == "torch bf16"
        scheme = None if peer else name
        yield row(scheme, m, us=us, contestant=contestant, peer=peer, pattern=pattern, series="unstructured int8")


def made_up():
    dense = {
        ("w8a8", None, "w8a8_x"): 100.0,
        ("w4a8g128", None, "w4a8_x"): 60.0,
        ("torch bf16", None, "torch bf16"): 300.0,
    }
    for m, factor in ((1, 1.0), (256, 2.0)):
        sparse = {
            ("sp50w8a8", "sp50", "mask"): 80.0,
            ("sp50w8a8", "sp50", "other"): 125.0,
            ("sp90w8a8", "sp90", "mask"): 75.0,
            ("sp90w8a8", "sp90", "other"): 50.0,
        }
        yield from race(m, {**dense, **{key: us * factor for key, us in sparse.items()}})


def test_maps_know_who_wins_and_by_how_much():
    mask, other = crossover.maps([RUN, *made_up()])
    assert (mask.contestant, other.contestant) == ("mask", "other")
    assert (mask.zeros, mask.ms) == ((0.5, 0.9), (1, 256))
    assert other.cells[0.9, 1].winner == crossover.SPARSE
    assert other.cells[0.9, 1].over(crossover.INT8) == 2.0
    assert other.cells[0.9, 1].over("mask") == 1.5
    assert (other.cells[0.5, 1].winner, mask.cells[0.5, 256].winner) == (crossover.INT4, crossover.INT4)
    assert mask.pays(1, crossover.INT8) == "<= 50%"
    assert other.pays(1, crossover.INT8) == "60%"  # 0.8x at 50 %, 2x at 90 %
    assert other.pays(256, crossover.INT8) == "90%"
    assert mask.pays(256, crossover.INT8) == "-"


def test_the_table_of_the_crossover_has_layouts_too():
    text = crossover.table(crossover.maps(list(made_up())))
    assert "| unstructured int8, mask, 4096x4096 | dense int8 | <= 50% | - |" in text
    assert "| unstructured int8, other, 4096x4096 | dense int8 | 60% | 90% |" in text
    assert "| unstructured int8, other, 4096x4096 | mask | 71% | 71% |" in text


def test_series_are_within_what_was_asked_for():
    shares = [WeightKind.parse(kind).pattern.zeros for kinds in crossover.SERIES.values() for kind in kinds]
    assert (min(shares), max(shares)) == (0.3, 0.98)
    assert crossover.MS == (1, 4, 16, 64, 256, 512)
    for kinds in crossover.SERIES.values():
        found = [WeightKind.parse(kind).pattern.zeros for kind in kinds]
        assert found == sorted(set(found))


def test_report_draws_the_maps(tmp_path, capsys):
    rows = [RUN, *made_up()]
    html = page(rows)
    assert "Where sparse weights are fastest" in html
    assert "unstructured int8, other, 4096x4096" in html
    assert "mask: 75.0 us" in html
    assert "2.00x" in html
    assert list(crossover_parts([])) == []
    path = write(tmp_path / "a", *rows)
    words = ["report", path, "--html", str(tmp_path / "a.html")]
    if find_spec("matplotlib") is not None:
        words += ["--png", str(tmp_path / "a.png")]
    assert cli.main(words) == 0
    assert "| dense int8 | 60% | 90% |" in capsys.readouterr().out
    if find_spec("matplotlib") is not None:
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["report", path, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("Share of zeros")


def test_sparse_results_without_a_crossover_have_the_usual_maps():
    rows = [RUN, row("sp50w8a8", best_peer="torch csr sp50", vs_peer=2.5)]
    assert "sp50w8a8  4096x4096  2.50x" in report(rows)


@pytest.mark.full
def test_the_crossover_preset_runs(monkeypatch):
    monkeypatch.setattr(run, "COLD_CACHES", 0)
    monkeypatch.setattr(crossover, "MS", (1, 3))
    monkeypatch.setattr(crossover, "SERIES", {"a": ("sp50w8a8", "sp90w8a8"), "b int4": ("sp50w4a8g128",)})
    rows, steps = [], []
    bf16 = peers.matching("torch bf16")
    setup = Setup(bf16, ((32, 128),), 0.001, CEILINGS, rows.extend, steps.append)
    (text,) = presets.sparse_crossover(setup)
    assert {line["series"] for line in rows} == {"a", "b int4"}
    assert len(steps) == presets.PRESETS["sparse-crossover"].steps(((32, 128),), ()) == 4
    assert "dense int4" in text
    for found in crossover.maps(rows):
        assert all({"w8a8", "w4a8g128", "torch bf16"} <= set(cell.others) for cell in found.cells.values())
