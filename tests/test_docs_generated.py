"""The generated parts of pages: what results they show, which they refuse, and the command that writes them."""

from __future__ import annotations

import json
import re

import pytest

from nybble.bench import docs
from nybble.bench.__main__ import main as bench
from nybble.bench.docs_results import read_results
from nybble.bench.goal_tables import AVX2, CPU, SPARSE
from nybble.bench.machines import CLASSES, Machine, Result, class_of


@pytest.fixture
def repository(tmp_path):
    """A repository of one page, which has every generated part, and no results."""
    (tmp_path / "mkdocs.yml").touch()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    page = "\n\n".join(f"<!-- generated: {name} -->\nold\n<!-- /generated -->" for name in docs.PARTS)
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    return tmp_path


def add(repository, name, *rows):
    folder = repository / "bench" / "results"
    machines = {
        "one": {"class": "avx512vnni", "description": "The first CPU"},
        "two": {"class": "avx2", "description": "The second CPU"},
        "h100": {"class": "gpu", "description": "NVIDIA H100"},
    }
    (folder / "machines.json").write_text(json.dumps(machines), encoding="utf-8")
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def demo(speedup, single):
    accuracy = {"mean_cosine": 0.5, "worst_cosine": 0.25, "top1": 1.0}
    base = {"name": "torch fp32", "batch_rate": 10.0, "single_rate": 2.0, "megabytes": 9.0, "speedup": 1.0}
    return {
        "machine": {"threads": 1, "torch": "9"},
        "rows": [
            {**base, "accuracy": accuracy},
            {**base, "name": "peer", "speedup": 1.5, "single_rate": 3.0, "accuracy": accuracy},
            {**base, "name": "nybble ours", "speedup": speedup, "single_rate": 2.0 * single, "accuracy": accuracy},
        ],
    }


def test_without_results_the_parts_say_so(repository):
    assert docs.update(repository, check=False) == [repository / "README.md"]
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert text.count("Nothing has been measured yet.") == 1
    assert text.count("## ") == text.count("Never measured; the kernels are") == len(CLASSES) - 1
    assert text.count("| never | never; ") == len(CLASSES)
    assert "Where others win in the demo, over nybble's fastest: nowhere that was measured." in text
    assert "What quantizing costs was not measured yet." in text
    assert "old" not in text.split()
    assert "not measured on a GPU yet" in text
    assert docs.update(repository, check=True) == []


def test_the_picture_shows_the_newest_demo_of_each_machine_and_who_wins(repository):
    add(repository, "two-demo-2026-01-02.json", demo(3.0, 4.0))
    add(repository, "one-demo-2026-01-03.json", demo(1.25, 1.75))
    add(repository, "one-demo-2026-01-01.json", demo(9.0, 9.0))
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert "| The first CPU, 2026-01-03 | peer | **1.50x** | 1.50x | 0.5000 |" in text
    assert "|  | nybble ours | 1.25x | **1.75x** | 0.5000 |" in text
    assert "| The second CPU, 2026-01-02 | peer | 1.50x | 1.50x | 0.5000 |" in text
    assert "9.00x" not in text


def test_results_are_shown_by_class_of_machine(repository):
    held = {"kind": "skip", "contestant": "a", "reason": "b", "held": "held to avx2 on The first CPU"}
    add(repository, "one-avx2-targets-2026-01-01.jsonl", held)
    add(repository, "two-demo-2026-01-02.json", demo(3.0, 1.0))
    add(repository, "one-demo-2026-01-03.json", demo(1.25, 1.75))
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    avx2 = text[text.index("\n## AVX2 alone") : text.index("\n## AVX-VNNI without")]
    assert "2026-01-01, held to avx2 on The first CPU, `bench/results/one-avx2-targets-2026-01-01.jsonl`." in avx2
    assert "### A sentence encoder (`nybble demo`): The second CPU" in avx2
    goals = len([goal for goal in AVX2.goals if goal.bound is not None])
    layers = f"`avx2-targets`: none of {goals} targets measured, The first CPU, held to AVX2, 2026-01-01"
    assert f"(Intel Haswell to Comet Lake, AMD Zen 1 to 3) | The second CPU, 2026-01-02 | {layers} |" in text
    assert "| AMX (Intel Sapphire Rapids and later Xeon) | never | never; tested bit for bit on Emerald Rapids" in text


def test_what_quantizing_costs_is_shown_by_machine(repository):
    def figure(value, topic, at_most=True):
        fields = {"kind": "figure", "name": f"f {value}", "value": value, "unit": "x", "bound": 2.0, "topic": topic}
        return fields | {"at_most": at_most, "held": "held to avx2 on A CPU"}

    fast = [figure(value, "speed", at_most=False) for value in (3.0, 1.5, 2.5)]
    add(repository, "one-avx2-targets-2026-01-01.jsonl", *fast, figure(1.75, "peak"), figure(9.0, None))
    add(repository, "two-cpu-targets-2026-01-02.jsonl", figure(2.5, "peak") | {"name": "other"})
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    part = text[text.index("<!-- generated: quantizing -->") :].partition("<!-- /generated -->")[0]
    assert "| quantizing on | speed | peak |" in part
    assert "| The first CPU, held to AVX2, 2026-01-01 | 1.5x (>= 2x) MISSED | 1.75x (<= 2x) met |" in part
    assert "2026-01-02 | not measured | 2.5x (<= 2x) MISSED |" in part
    assert "9x" not in part
    assert " | 1 of 2 targets met, speed 1.5x (>= 2x) MISSED, The first CPU, held to AVX2, 2026-01-01; " in text
    assert "0 of 1 targets met, peak 2.5x (<= 2x) MISSED, The second CPU, held to AVX2, 2026-01-02 |" in text


def test_only_measured_targets_are_counted_and_the_others_are_named(repository):
    cell = {"kind": "result", "m": 256, "pattern": None, "weight_bits": 8, "roofline": 0.5, "peer": False}
    mine = [
        cell | {"contestant": "w8a8", "scheme": "w8a8", "n": n, "k": k, "us": 1.0, "gops": 1900.0}
        for n, k in CPU.shapes
    ]
    figure = {"kind": "figure", "name": "f", "value": 1.0, "unit": "x"}
    figures = [figure | {"bound": 0.5}, figure | {"bound": 1.0}]
    add(repository, "one-cpu-targets-2026-01-01.jsonl", *mine, *figures)
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert (
        "| never | `cpu-targets`: 1 of 1 measured targets and 1 of 2 other figures met (not measured: w4a8g128 at M = 1, 4, 16, 64, 256; w4a16g128 at"
        in text
    )
    assert "w8a8 at M = 1, 4, 16, 64, 256; w8a16 at M" in text
    assert "), The first CPU, 2026-01-01 |" in text


@pytest.mark.parametrize(
    ("what", "row", "found"),
    [
        ("cpu-targets", {"kind": "run", "targets": ["torch", "scalar", "avx2"]}, "avx2"),
        ("cpu-targets", {"kind": "run", "targets": ["scalar", "avx2", "avxvnni", "avx512bw"]}, "avx512bw"),
        ("cpu-targets", {"kind": "run", "targets": ["avx2", "avx512vnni", "avx512bf16", "amx"]}, "amx"),
        ("sparse-targets", {"kind": "run", "targets": ["avx2", "avx512vnni", "avx512vbmi"]}, "avx512vnni"),
        ("avx2-targets", {"kind": "result", "held": "held to avx2 on A CPU"}, "avx2"),
        ("demo", {"machine": {"targets": ["scalar", "avx2", "avxvnni"]}, "rows": []}, "avxvnni"),
        ("demo", {"machine": {"cpu": "A CPU"}, "rows": []}, "gpu"),
        ("model", {"kind": "model"}, "gpu"),
    ],
)
def test_the_class_is_that_of_the_cpu_that_rows_name(what, row, found):
    machines = {"one": Machine("The CPU", "gpu")}  # its own class counts only where the rows say nothing
    assert class_of(Result("one", what, "2026-01-01", "a file", [row]), machines) == found


def test_a_limited_target_and_what_the_user_vouches_for_are_told(repository):
    run = {"kind": "run", "threads": [2], "commit": None, "versions": {}, "targets": ["avx2", "avx512bw"]}
    add(repository, "one-cpu-targets-2026-01-01.jsonl", run | {"cap": "avx512bw"})
    held = {"held": "held to avx2 on A CPU", "vouched": "onnxruntime, openvino", "targets": ["avx2"], "cap": "avx2"}
    add(repository, "one-avx2-targets-2026-01-01.jsonl", run | held)
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert "2026-01-01, nybble held to avx512bw, the others not, 2 threads, no commit," in text
    by_word = "held to avx2 on A CPU (onnxruntime, openvino by other means, as NYBBLE_BENCH_HELD says)"
    assert f"2026-01-01, {by_word}, 2 threads" in text


def test_where_others_win_and_decoding_come_from_results(repository):
    add(repository, "two-demo-2026-01-02.json", demo(1.0, 2.0))
    add(repository, "one-model-2026-01-02.jsonl", *(
        {"kind": "model", "contestant": name, "threads": 2, "decode_tokens_s": speed}
        for name, speed in (("torch bf16", 12.0), ("nybble w8a8", 36.04))))  # fmt: skip
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert (
        "Where others win in the demo, over nybble's fastest: peer (1.50x in batches of 32) on The second CPU." in text
    )
    assert "one by one" not in text
    assert ": 36.0 with nybble w8a8, 12.0 with torch bf16 (The first CPU, 2026-01-02)." in text


@pytest.mark.parametrize("fields", ["A CPU", {"description": "A CPU"}, {"class": "x", "description": "A CPU"}])
def test_a_machine_without_its_class_is_refused(repository, fields):
    (repository / "bench" / "results" / "machines.json").write_text(json.dumps({"one": fields}), encoding="utf-8")
    with pytest.raises(ValueError, match="one: must be a description and a class, one of avx2"):
        read_results(repository / "bench" / "results")


def test_every_kind_of_result_has_a_table(repository):
    figure = {"kind": "figure", "name": "overhead", "value": 3.0, "unit": " us", "bound": 5.0, "at_most": True}

    def results(table, scheme, speed, m=1):
        """nybble's scheme on the shapes of a table, and a peer and the dense kernel that take `speed` times as long."""
        common = {"kind": "result", "m": m, "weight_bits": 8, "roofline": 0.5, "gops": 1.0, "peak": 2.0}
        peers = ("torch dynamic x86", "torch dynamic onednn", "onnxruntime dynamic int8", "openvino int8")
        names = {
            scheme: 10.0,
            **dict.fromkeys(peers, 10.0 * speed),
            **({} if scheme == "w8a8" else {"w8a8": 10.0 * speed}),
        }
        return [
            {**common, "contestant": name, "peer": name in peers, "scheme": None if name in peers else name,
             "n": n, "k": k, "us": us, "pattern": "sp50" if name == "sp50w8a8" else None, "bytes_vs_dense": 2.0}
            for n, k in table.shapes for name, us in names.items()
        ]  # fmt: skip

    model = {"kind": "model", "contestant": "nybble w8a8", "threads": 2, "decode_tokens_s": 59.7}
    loss = {"kind": "accuracy", "setting": "w8a8", "name": "rtn", "seed": 0, "nats": 0.0005}
    run = {"kind": "run", "threads": [2], "commit": "0123456789", "versions": {"python": "3.11", "torch": "2.13.0"}}
    add(repository, "one-cpu-targets-2026-01-01.jsonl", run, *results(CPU, "w8a8", 1.5), figure)
    add(repository, "one-avx2-targets-2026-01-01.jsonl", *results(AVX2, "w8a8", 1.25))
    add(repository, "one-sparse-targets-2026-01-01.jsonl", *results(SPARSE, "sp50w8a8", 1.45))
    add(repository, "one-model-2026-01-01.jsonl", model)
    add(repository, "two-accuracy-2026-01-01.jsonl", loss)
    add(repository, "two-demo-sparse-2026-01-01.json", demo(2.0, 2.0))
    add(repository, "h100-gpu-2026-01-01.jsonl", {"step": "machine", "key": "machine", "gpu": "NVIDIA H100 80GB HBM3"},
        {"step": "goals", "key": "K1 w4a16g128 8192x8192 m=1 over torch bf16", "us": 10.0, "over_us": 35.0})  # fmt: skip
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    for shown in (
        "## AVX-512 with VNNI (Intel Cascade Lake and Ice Lake, AMD Zen 4 and 5)\n\n### Layers",
        "### Layers (`--preset cpu-targets`): The first CPU",
        "2026-01-01, 2 threads, commit 0123456, torch 2.13.0, `bench/results/one-cpu-targets-2026-01-01.jsonl`.",
        "2026-01-01, `bench/results/one-model-2026-01-01.jsonl`.",
        "2026-01-01, 1 thread, torch 9, `bench/results/two-demo-sparse-2026-01-01.json`.",
        "| w8a8 | 1.50x (1.50x) / 1x met |",
        "| w8a8 over the best int8 peer | 1.25x (1.25x) / 1.15x met |",
        "- overhead: 3 us (<= 5 us) met",
        "| sp50w8a8 | 1.45x (1.45x) / 1.4x met",
        "| nybble w8a8 | 2 | 59.7 |",
        "w8a8     rtn       0.0005",
        "| nybble ours | 10.0 | 4.0 | 9.0 | 2.00x | 2.00x | 0.5000 | 0.2500 | 1.0000 |",
        "NVIDIA H100, 2026-01-01:",
        "M=1 3.50x met",
    ):
        assert shown in text, shown


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("none.jsonl", {}, "the name must be <machine>-<what>-<date>"),
        ("three-demo-2026-01-01.json", demo(1, 1), "does not describe the machine 'three'"),
        ("one-demo-2026-01-01.jsonl", demo(1, 1), "results of demo end in .json"),
        ("one-demo-2026-01-01.json", {"rows": []}, "not what `nybble demo --json` prints"),
        ("one-cpu-targets-2026-01-01.jsonl", {"no": "kind"}, "not a result line"),
    ],
)
def test_a_wrong_file_of_results_is_refused(repository, name, row, said):
    add(repository, name, row)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_results(repository / "bench" / "results")


def test_the_command_writes_and_checks(repository, capsys):
    assert bench(["docs", "--root", str(repository), "--check"]) == 1
    assert "README.md: out of date" in capsys.readouterr().out
    assert bench(["docs", "--root", str(repository)]) == 0
    assert bench(["docs", "--root", str(repository), "--check"]) == 0
    (repository / "README.md").write_text("<!-- generated: none -->\n\n<!-- /generated -->", encoding="utf-8")
    assert bench(["docs", "--root", str(repository)]) == 1
    assert "generated: none: must be one of picture" in capsys.readouterr().err
    (repository / "README.md").write_text("<!-- generated: kernels -->\n", encoding="utf-8")
    assert bench(["docs", "--root", str(repository)]) == 1
    assert "does not end in" in capsys.readouterr().err
    assert bench(["docs", "--root", str(repository / "bench")]) == 1
    assert "no mkdocs.yml there" in capsys.readouterr().err


def tried(figure, seed, asked, tried, **more):
    versions = {"nybble": "0.1", "torch": "9"}
    row = {"figure": figure, "seed": seed, "asked": asked, "tried": tried, "failed": 0, "date": "2026-01-02"}
    return {**row, "facts": {}, "on": {}, "targets": ["avx2"], "versions": versions, **more}


def test_what_slices_of_a_figure_tried_adds_up(repository):
    rows = [
        tried("kills", 0, 30, 30, facts={"during a save": 20}),
        tried("kills", 3, 30, 30, facts={"during a save": 11}, failed=1, date="2026-01-04"),
        *(tried("shapes", seed, 131072, 5_500_000, on={"kernels": 42}) for seed in (0, 1)),
        tried("shapes", 1, 64, 2_000, on={"kernels": 42}),
        tried("foreign", 0, 500, 24_000),
        *(tried("fuzz", seed, 0, 7_000, reader="gguf", cpu_seconds=900.0) for seed in (1, 2)),
    ]
    add(repository, "one-reliability.jsonl", *rows)
    others = [tried("kills", 0, 100, 100, targets=["amx"]), tried("fuzz", 1, 0, 500, reader="gguf", cpu_seconds=180.0)]
    add(repository, "two-reliability.jsonl", *others)
    docs.update(repository, check=False)
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert "The first CPU; nybble 0.1, torch 9; targets avx2:" in text
    both = "| 60 | 60.0% | 1 | during a save 31 | 2026-01-02 to 2026-01-04 |"
    assert f"| `kills --count 30`, seeds 0, 3 {both}" in text
    both = "| 11,000,000 | all | 0 | kernels 42 | 2026-01-02 |"  # of which the third is a part
    assert f"| `shapes --count 131072`, seeds 0 to 1 {both}" in text
    assert "| `foreign --data DIR --count 500`, seed 0 | 24,000 | 50.0% |" in text
    assert "The second CPU; nybble 0.1, torch 9; targets amx:" in text
    assert "| `kills` | 100 | all | 0 |" in text
    assert text.count("| `headers` | not run |") == 2
    assert "| `shapes` | not run |" not in text, "the first machine has run it"
    assert "- The first CPU; nybble 0.1, torch 9\n- The second CPU; nybble 0.1, torch 9\n\n| reader |" in text
    assert "| `gguf` | 14,500 | 1,980 | 55% | 0 | 2026-01-02 |" in text
    assert "| `onnx` | 0 | 0 | 0% | 0 | not run |" in text


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "one-reliability.jsonl",
            [tried("kills", 2, 1, 1), tried("kills", 2, 3, 3)],
            ":2: seed 2: another line of kills",
        ),
        ("one-reliability.jsonl", [tried("kilos", 2, 1, 1)], ":1: figure 'kilos': must be one of"),
        ("one-reliability.jsonl", [{"figure": "fuzz", "seed": 1}], ":1: lacks cpu_seconds, date, failed, reader"),
        ("one-reliability.jsonl", ["x"], ":1: figure None"),
        ("three-reliability.jsonl", [], "with a machine of machines.json"),
    ],
)
def test_lines_that_are_no_results_of_reliability_are_refused(repository, name, rows, message):
    add(repository, name, *rows)
    with pytest.raises(ValueError, match=re.escape(message)):
        docs.update(repository, check=True)
