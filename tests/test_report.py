"""The report: totals, coverage, table and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch

from nybble.report.data import LayerReport, Pruned, Rounded, Tried
from nybble.report.fold import fold_names
from nybble.report.report import Report
from nybble.report.speed import Speed, mean_speed, product
from nybble.testing.reports import left, report, speeds, swapped


def test_totals_and_parts() -> None:
    a, b = swapped(), left()
    both = report(a, b)
    assert both.swapped == (a,)
    assert both.left == (b,)
    assert (both.nbytes_before, both.nbytes_after) == (8528, 2640)
    assert both.coverage == pytest.approx(100 * 8192 / 8272)


def test_coverage_of_a_model_without_weights_is_zero() -> None:
    assert report(weight_bytes=0, weight_bytes_changed=0).coverage == 0.0


def test_reports_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        swapped().name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().goal = "memory"  # type: ignore[misc]


@pytest.mark.parametrize(("values", "mean"), [((4.0,), 4.0), ((0.5, 2.0), 1.0), ((1.0, 2.0, 4.0), 2.0)])
def test_geometric_mean(values: tuple[float, ...], mean: float) -> None:
    assert mean_speed(list(speeds(dict(enumerate(values))).values())).ratio == pytest.approx(mean)


def test_geometric_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="speeds"):
        mean_speed(())


def test_a_product_of_speeds() -> None:
    both = product(Speed(2.0, 1.0, 4.0, 30), Speed(3.0, 1.5, 6.0, 20))
    reach = 2 ** (2**0.5)
    assert (both.ratio, both.low, both.high, both.pairs) == pytest.approx((6.0, 6 / reach, 6 * reach, 20))
    sure = Speed(1.1, 1.01, 1.2, 9)
    assert product(sure, sure).is_faster, "what is faster than something faster is faster"


def test_mean_speedup() -> None:
    assert swapped().mean_speedup == pytest.approx(math.sqrt(2))
    assert left().mean_speedup is None


def test_table_has_every_layer_and_fact() -> None:
    text = str(report(swapped(also=("decoder.fc",)), left()))
    header, _, first, second = text.splitlines()[:4]
    assert header.split()[:5] == ["layer", "kind", "shape", "before", "after"]
    for word in (
        "encoder.0.fc = decoder.fc [1]",
        "64x32",
        "w8a8",
        "8.2 -> 2.5 KiB",
        "41.3",
    ):
        assert word in first
    speed = next(line for line in reversed(text.splitlines()) if line.startswith("encoder.0.fc"))
    assert speed.split()[4:] == ["0.50", "4.00", "1.41x", "[1.31,", "1.51]", "60"]
    assert second.startswith("embed [2]")
    for line in ("  [1] slower at M=1", "  [2] left alone: not a kind of module that nybble replaces"):
        assert line in text.splitlines()
    for word in (
        "1 of 2 layers swapped",
        "coverage 99.0 %",
        "Some CPU, threads: 2, kernel: w8a8_avx2",
        "3.23x smaller",
    ):
        assert word in text


def test_what_timing_found_is_in_words() -> None:
    undecided = swapped(name="b", speeds=speeds({1: 1.05, 16: 2.0}))
    text = str(report(swapped(), undecided, timing_s=1.25, timing_limit_s=10.0))
    assert "[2] no difference to dense at M=1" in text
    assert "a layer is swapped where the interval is above 1 (goal='speed')" in text
    assert "timing took 1.2 s of 10 s (timing_s)" in text
    assert "reaches 1 or more (goal='no_slower')" in str(report(undecided, goal="no_slower"))
    verdicts = [Speed(1.0, *ends, pairs=9).verdict for ends in ((1.1, 1.2), (0.8, 0.9), (1.0, 1.2), (0.9, 1.0))]
    assert verdicts == ["faster", "slower", "no difference", "no difference"]


def test_kernels_have_a_column_where_they_differ() -> None:
    both = report(swapped(), swapped(name="b", kernel="w8a8_a, w8a8_b, w8a8_c"))
    lines = str(both).splitlines()
    assert any(line.startswith("layer") and "kernel" in line.split() for line in lines)
    assert any(line.startswith("encoder.0.fc") and "w8a8_avx2" in line.split() for line in lines)
    assert any(line.startswith("b ") and "w8a8_a +2" in line for line in lines)
    assert "kernels, by M: w8a8_a, w8a8_b, w8a8_c" in str(both)
    assert "kernel:" not in str(both)


def test_table_columns_are_aligned() -> None:
    lines = str(report(swapped(), left(name="a.very.long.name.of.a.layer"))).splitlines()
    kind = lines[0].index("kind")
    assert lines[2][kind:].startswith("Linear")
    assert lines[3][kind:].startswith("Embedding")
    assert all(line == line.rstrip() and "\t" not in line for line in lines)


def test_table_says_when_speed_was_not_measured() -> None:
    text = str(report(swapped(speeds={}), goal="memory"))
    assert "not measured" in text
    assert "slower" not in text


def test_table_says_what_the_first_call_of_a_triton_kernel_costs() -> None:
    text = str(report(swapped(kernel="w8a8_triton")))
    assert "..._triton : compiled when it is first called, which takes about a second" in text
    assert "_triton" not in str(report(swapped()))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(300, 100, "(3.00x smaller)"), (100, 125, "(1.25x larger)"), (100, 100, ""), (0, 100, "")],
)
def test_table_says_by_how_much_the_bytes_change(before: int, after: int, words: str) -> None:
    (line,) = (
        line
        for line in str(report(swapped(nbytes_before=before, nbytes_after=after))).splitlines()
        if line.startswith("listed bytes")
    )
    assert line == " ".join(f"listed bytes {before} B -> {after} B {words}".split())


def test_table_of_nothing() -> None:
    assert "0 of 0 layers swapped" in str(report(weight_bytes=0, weight_bytes_changed=0))


# --- rows that share what they say

STACK = [
    swapped(name=f"model.layers.{i}.fc", sqnr_db=40 + i / 4, speeds=speeds({1: 0.5, 16: 3 + i / 10})) for i in range(12)
]


def folded(*layers: LayerReport) -> list[str]:
    """The first column of the rows of the first table."""
    table = report(*layers).table().split("\n\n")[0].splitlines()
    return [line.split("  ")[0].split(" [")[0] for line in table[2:]]


def test_layers_that_differ_in_their_index_share_a_row() -> None:
    lines = report(*STACK, left()).table().splitlines()
    assert [line.split()[2:] for line in lines if "layers" in line] == [
        ["12x", "Linear", "64x32", "float32", "w8a8", "99.0", "->", "30.0", "KiB", "40.0-42.8"],
        ["0.50", "3.00-4.10", "1.22-1.43x", "[1.14,", "1.53]", "60"],
    ]
    assert sum("embed" in line for line in lines) == 1, "it has nothing to say in the second part"
    text = report(*STACK).table(fold=False)
    assert all(f"model.layers.{i}.fc" in text for i in range(12))
    assert "{" not in text
    assert "12x" not in text
    assert "report.table(fold=False)" in str(report(*STACK))
    assert "report.table(fold=False)" not in str(report(STACK[0], left()))


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "excluded by 'x'"},
        {"shape": (64, 64)},
        {"after": "w4a8"},
        {"before": "bfloat16"},
        {"kernel": "w8a8_scalar"},
        {"speeds": speeds({1: 2.0, 16: 3.0})},
        {"speeds": speeds({1: 0.5, 16: 1.0})},
        {"sqnr_db": math.inf},
        {"sqnr_db": None},
        {"kind": "Conv1D"},
        {"tied_to": "model.layers.0.fc"},
        {"also": ("other",)},
        {"pruned": Pruned("sp50", 0.5, "wanda")},
        {"rounded": Rounded("gptq", 0.2, 0.1)},
        {"rounded": Rounded("rtn", notes=("not gptq: no usable Hessian",))},
    ],
    ids=str,
)
def test_layers_of_another_outcome_have_a_row_of_their_own(change: dict[str, object]) -> None:
    layers = [*STACK[:5], dataclasses.replace(STACK[5], **change), *STACK[6:]]
    first, last = folded(*layers)
    assert first == "model.layers.{0..4,6..11}.fc"
    assert last.split(" = ")[0] == "model.layers.5.fc"


def test_numbers_in_notes_become_ranges() -> None:
    layers = [
        swapped(
            name=f"h.{i}.fc",
            rounded=Rounded("rtn", notes=(f"not gptq: its loss on inputs held out is 1.{i} of rtn's",)),
        )
        for i in range(1, 4)
    ]
    assert "not gptq: its loss on inputs held out is 1.1-1.3 of rtn's" in report(*layers).table()
    assert folded(*layers) == ["h.{1..3}.fc"]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["a.0", "a.2"], ["a.{0,2}"]),
        (["0", "1", "2"], ["{0..2}"]),
        (["a.0.b", "a.0.c"], ["a.0.b", "a.0.c"]),
        (["a.0.x.0", "a.0.x.1", "a.1.x.0", "a.1.x.1"], ["a.{0,1}.x.{0,1}"]),
        (["a.0.x.0", "a.0.x.1", "a.1.x.0"], ["a.0.x.{0,1}", "a.1.x.0"]),
        (["a.00", "a.01"], ["a.00", "a.01"]),
        (["a1.fc", "a2.fc"], ["a1.fc", "a2.fc"]),
        (["*.0", "*.1"], ["*.{0,1}"]),
    ],
    ids=str,
)
def test_folded_names_stand_for_just_the_names_there_are(names: list[str], rows: list[str]) -> None:
    found = fold_names(names)
    assert sorted(found) == sorted(rows)
    assert sorted(name for members in found.values() for name in members) == sorted(names)


def unfolded(pattern: str) -> list[str]:
    """All names that a pattern stands for."""
    found = re.search(r"\{(.*?)\}", pattern)
    if found is None:
        return [pattern]
    ends = [part.partition("..") for part in found[1].split(",")]
    values = [i for first, _, last in ends for i in range(int(first), int(last or first) + 1)]
    return [name for i in values for name in unfolded(pattern.replace(found[0], str(i), 1))]


def test_any_set_of_indices_is_folded_without_loss() -> None:
    for count in range(1, 60):
        names = {"a.{}.b.{}.c.{}".format(*index) for index in torch.randint(4, (count, 3)).tolist()}
        found = fold_names(sorted(names))
        assert sorted(name for members in found.values() for name in members) == sorted(names)
        assert all(sorted(unfolded(pattern)) == sorted(members) for pattern, members in found.items())


# --- the width, and notebooks


@pytest.mark.parametrize("fold", [True, False])
def test_every_line_fits_120_columns(fold: bool) -> None:
    ms = tuple(2**i for i in range(20))
    layers = [
        swapped(
            name="x" * 300 + f".{i}." + "y" * 100,
            kind="Z" * 90,
            kernel="w8a8_" + "k" * 150,
            speeds=speeds(dict.fromkeys(ms, 0.123456 + i)),
            pruned=Pruned("sp50", 0.5, "m" * 60, 0.1, 0.9, 0.1, notes=("word " * 60, "w" * 400)),
        )
        for i in range(3)
    ]
    found = report(*layers, left(reason="r" * 500), m=ms, machine="cpu " * 80)
    for text in (str(found), found.table(fold)):
        assert max(map(len, text.splitlines())) <= 120
    assert all(f"M={m}" in str(found) for m in ms)
    names = "".join(line for line in str(found).splitlines() if set(line) <= set("xy. "))
    assert "y" * 100 in names, "a name is whole, on several lines"


def test_bytes_and_errors_before_and_after_are_one_cell() -> None:
    rounded = [Rounded("gptq", 0.2 + i / 10, 0.1) for i in range(2)]
    layers = [swapped(name=f"h.{i}.fc", rounded=made, nbytes_before=3 << 20) for i, made in enumerate(rounded)]
    text = report(*layers, left(), m=tuple(range(1, 40))).table()
    heads = [head for line in text.splitlines() if line.startswith("layer") for head in re.split(r"\s{2,}", line)[1:]]
    assert len(heads) == len(set(heads))
    assert "6.0 MiB -> 5.0 KiB" in text
    assert "20.00-30.00 -> 10.00" in text
    assert "80 -> 80 B" in text


def test_long_names_stay_whole_and_different() -> None:
    prefix = "text_model." + "a_component_with_a_name." * 3 + "layers"
    layers = [swapped(name=f"{prefix}.{i}.attention.{last}") for i in range(12) for last in ("query", "value")]
    text = "".join(report(*layers, m=tuple(range(1, 20))).table().split())
    for last in ("query", "value"):
        assert "layers.{0..11}.attention." in text
        assert f"{last}[1]" in text


def test_a_notebook_shows_the_same_rows_escaped() -> None:
    shown = report(*STACK, left(name="<b>", reason="<i>&")).__getattribute__("_repr_html_")()
    assert "<td" in shown
    assert "model.layers.{0..11}.fc [1]</td>" in shown
    assert "&lt;b&gt; [2]" in shown
    assert "<li>[2] left alone: &lt;i&gt;&amp;</li>" in shown
    assert "<b>" not in shown
    assert "<p>what to do next:</p>" in shown
    assert "<li>nybble.save(model, &quot;directory&quot;)" in shown


def test_json_is_complete_and_strict() -> None:
    a, b = swapped(sqnr_db=math.inf, tied_to="first", also=("x",)), left()
    both = report(a, b)
    data = json.loads(both.to_json(), parse_constant=lambda text: pytest.fail(f"not strict JSON: {text}"))
    for field in dataclasses.fields(Report):
        assert field.name in data
    for layer, entry in zip((a, b), data["layers"], strict=True):
        assert {field.name for field in dataclasses.fields(LayerReport)} <= entry.keys()
        assert entry["name"] == layer.name
        assert entry["shape"] == list(layer.shape)
        assert entry["swapped"] is layer.swapped
    assert data["layers"][0]["sqnr_db"] == "inf"
    assert data["layers"][0]["speedup"] == {"1": 0.5, "16": 4.0}
    assert data["layers"][0]["speeds"]["16"] == {"ratio": 4.0, "low": 3.6, "high": 4.4, "pairs": 30}
    assert data["layers"][0]["slower_at"] == [1]
    assert data["layers"][0]["mean_speed"]["verdict"] == "faster"
    assert data["layers"][0]["mean_speed"]["pairs"] == 60
    assert data["layers"][1]["mean_speed"] is None
    assert data["layers"][1]["sqnr_db"] is None
    assert data["coverage"] == both.coverage
    assert data["nbytes_before"] == 8528
    assert data["versions"] == {"nybble": "0.1.0"}


def test_numbers_that_are_not_finite_are_text_in_json() -> None:
    tried = (Tried("w8a8", math.inf), Tried("w4a8", None, why="cannot be"))
    rounded = Rounded("rtn", math.nan, math.inf)
    text = report(swapped(tried=tried, rounded=rounded), left(sqnr_db=-math.inf)).to_json()
    data = json.loads(text, parse_constant=lambda text: pytest.fail(f"not strict JSON: {text}"))
    first, second = data["layers"]
    assert [one["error"] for one in first["tried"]] == ["inf", None]
    assert (first["rounded"]["error"], first["rounded"]["error_rtn"]) == ("inf", "nan")
    assert second["sqnr_db"] == "-inf"


def test_schemes_that_a_layer_cannot_have_are_noted() -> None:
    assert "w4a8g128 not taken: 48 inputs" in str(report(left(tried=(Tried("w4a8g128", None, why="48 inputs"),))))
