"""What reports are printed with: lines, tables and parts."""

from __future__ import annotations

import pytest

from nybble.text import Items, Shown, Table, break_name, shorten, span, wrap


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("abc", 3, "abc"),
        ("abcdefghij", 10, "abcdefghij"),
        ("abcdefghijk", 10, "abcd...ijk"),
        ("abcdefghijk", 2, "ab"),
        ("", 5, ""),
    ],
)
def test_shorten_cuts_the_middle(text: str, width: int, short: str) -> None:
    assert shorten(text, width) == short


def test_every_width_is_kept() -> None:
    for width in range(1, 40):
        assert len(shorten("x" * 30, width)) == min(width, 30)
        assert all(len(line) <= max(width, 5) for line in wrap("word " * 20 + "w" * 90, "- ", width=max(width, 5)))


def test_wrapped_lines_stand_beside_the_mark() -> None:
    assert wrap("one two three", "  - ", width=10) == ["  - one", "    two", "    three"]
    assert wrap("", "  - ") == ["  -"]


@pytest.mark.parametrize(
    ("values", "form", "text"),
    [([1.0], ".1f", "1.0"), ([2.0, 1.5], ".1f", "1.5-2.0"), ([1.01, 1.04], ".1f", "1.0"), ([-2, 1], ".0f", "-2 to 1")],
)
def test_span(values: list[float], form: str, text: str) -> None:
    assert span(values, form) == text


ROWS = [["name", "a", "b", "c"], ["first", "1", "22", "x" * 10], ["second", "333", "-", "-"]]


def test_a_table_that_fits_is_in_one_piece() -> None:
    assert Table(ROWS, left=(0, 3)).lines() == [
        "name      a   b  c",
        "------  ---  --  ----------",
        "first     1  22  xxxxxxxxxx",
        "second  333   -  -",
    ]


def test_a_wide_table_is_cut_and_repeats_the_first_column() -> None:
    lines = Table(ROWS, cuts=(2,), width=18).lines()
    assert lines == [
        *("name      a", "------  ---", "first     1", "second  333", ""),
        *("name     b", "------  --", "first   22", ""),
        *("name             c", "------  ----------", "first   xxxxxxxxxx"),
    ]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("layers.0.fc", ["layers.0.fc"]),
        ("model.layers.{0..11}.fc [1]", ["model.", "layers.", "{0..11}.", "fc [1]"]),
        ("layers.{0..11,13..15}.fc", ["layers.", "{0..11,13.", ".15}.fc"]),
        ("component_of_20_chars.a", ["component_", "of_20_char", "s.a"]),
        ("a..b.", ["a..b."]),
        ("", [""]),
    ],
)
def test_names_are_broken_after_dots_outside_braces(name: str, lines: list[str]) -> None:
    assert break_name(name, 10 if len(name) != 11 else 11) == lines
    assert "".join(lines) == name


def test_a_long_first_column_is_broken_into_lines() -> None:
    rows = [["name", "a"], ["n" * 40 + "." + "m" * 20, "1" * 30]]
    first, second = Table(rows, width=80).lines()[2:]
    assert first == f"{'n' * 40}.{' ' * 9}{'1' * 30}"
    assert second == "m" * 20


def test_nothing_is_cut_without_a_width() -> None:
    assert max(map(len, Table([["name"] * 50, ["n" * 50] * 50], width=None).lines())) == 50 * 50 + 49 * 2


@pytest.mark.parametrize("columns", [1, 2, 7, 40])
@pytest.mark.parametrize("length", [1, 30, 200])
def test_any_table_fits(columns: int, length: int) -> None:
    rows = [[f"h{i}" for i in range(columns)], ["w" * length] * columns]
    text = Table(rows, cuts=(3,)).lines()
    assert max(map(len, text)) <= 120
    assert all(f"h{i}" in " ".join(text).split() for i in range(columns))


def test_a_line_break_in_a_cell_does_not_break_the_table() -> None:
    assert len(Table([["a"], ["b\nc"]]).lines()) == 3


class Both(Shown):
    def parts(self):
        return ["<one>", "two", Table([["h"], ["<td>"]]), Items("list:", [("[1] ", "<li>"), ("- ", "x")])]


def test_parts_are_printed_below_one_another() -> None:
    assert str(Both()).splitlines() == ["<one>", "two", "", "h", "----", "<td>", "", "list:", "  [1] <li>", "  - x"]


def test_html_is_escaped() -> None:
    shown = Both()._repr_html_()
    assert "<p>&lt;one&gt;</p>" in shown
    assert "&lt;td&gt;</td>" in shown
    assert "<li>[1] &lt;li&gt;</li>" in shown
    assert "<li>x</li>" in shown
