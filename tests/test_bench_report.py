"""The report: which cell is won, text, page and plot, from lines made up here."""

from __future__ import annotations

import stat
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nybble.bench.report import report
from nybble.bench.report_cells import win_maps
from nybble.bench.report_html import page

HAS_MATPLOTLIB = find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")

LIMITS = {
    "dram_gbps": 44.0,
    "dram_huge_gbps": 50.0,
    "l3_gbps": 200.0,
    "int8_gops": 2000.0,
    "bf16_gflops": 1000.0,
    "fp32_gflops": 500.0,
}
RUN = {
    "kind": "run",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc123",
    "cpu": "A <fast> CPU",
    "threads": [1, 2],
    "versions": {"nybble": "0.1.0", "torch": "2.13.0"},
    "ceilings": {"threads": {"1": LIMITS, "2": LIMITS}},
}
MODEL = {
    "kind": "model",
    "contestant": "nybble w4a8g128",
    "threads": 2,
    "decode_tokens_s": 61.25,
    "prefill_tokens_s": 1012.4,
    "weights_mb": 538.3,
    "peak_mb": 1100.0,
}
SKIP = {"kind": "skip", "contestant": "peer <x>", "reason": "not installed"}


def result(contestant: str, us: float, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "result",
        "contestant": contestant,
        "peer": False,
        "scheme": "w4a8g128",
        "weight_bits": 4,
        "dtype": "bf16",
        "m": 1,
        "n": 4096,
        "k": 4096,
        "threads": 2,
        "cache": "cold",
        "us": us,
        "bytes": 8_650_752,
        "gops": 2 * 4096 * 4096 / us / 1e3,
        "bound": "memory",
        "roofline": 0.9,
        "noisy": False,
        "best_peer": "peer q4",
        "vs_peer": 220 / us,
    }
    return {**row, **changes}


def peer(us: float = 220.0, **changes: Any) -> dict[str, Any]:
    return result("peer q4", us, **{"peer": True, "scheme": None, "vs_peer": 1.0, **changes})


ROWS = [
    RUN,
    SKIP,
    result("slow kernel", 200.0),
    result("fast kernel", 110.0),
    peer(),
    result("fast kernel", 400.0, m=256),
    result("fast kernel", 50.0, m=256, scheme="w4a8", noisy=True),
    result("other kernel", 10.0, scheme="w8a8", n=33, weight_bits=8, best_peer=None, vs_peer=None),
    result("fast kernel", 20.0, threads=1),
    MODEL,
]


def test_the_fastest_kernel_of_a_scheme_stands_for_it() -> None:
    first, second = win_maps(ROWS)
    cell = first.cells[("w4a8g128", 4096, 4096), 1]
    assert (cell.contestant, cell.us, cell.ratio, cell.peer) == ("fast kernel", 110.0, 2.0, "peer q4")
    assert (second.threads, len(second.cells)) == (1, 1)


def test_places_keep_the_order_of_the_run() -> None:
    found = win_maps(ROWS)[0]
    assert found.ms == (1, 256)
    assert found.places == (("w4a8g128", 4096, 4096), ("w4a8", 4096, 4096), ("w8a8", 33, 4096))


def test_the_score_counts_only_cells_with_a_peer() -> None:
    assert win_maps(ROWS)[0].score == (2, 3)


def test_peers_alone_make_no_map() -> None:
    assert win_maps([RUN, peer()]) == []


def test_text() -> None:
    text = report(ROWS)
    lines = text.splitlines()
    assert "A <fast> CPU, 2026-01-02T03:04:05+00:00, commit abc123" in lines
    assert next(line for line in lines if line.startswith("w4a8g128")).split() == [
        "w4a8g128",
        "4096x4096",
        "2.00x",
        "0.55x",
    ]
    assert next(line for line in lines if line.startswith("w4a8 ")).split() == ["w4a8", "4096x4096", "4.40x", "?"]
    assert "no peer" in text
    assert "2 of 3 cells" in text
    assert "not run: peer <x>: not installed" in lines
    assert next(line for line in lines if line.startswith("nybble w4a8g128")).split()[2:] == [
        "2",
        "61.2",
        "1012",
        "538",
        "1100",
    ]


def test_models_alone_are_a_report() -> None:
    assert "61.2" in report([RUN, MODEL])


def test_nothing_to_report_is_said() -> None:
    with pytest.raises(ValueError, match="no results"):
        report([RUN, SKIP])


class _Page(HTMLParser):
    """Collects cells with their attributes; complains of a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[dict[str, str | None]] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append(dict(attrs))
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(rows: list[dict[str, Any]]) -> _Page:
    parser = _Page()
    parser.feed(page(rows))
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_whole_and_needs_nothing_else() -> None:
    parser = _parsed(ROWS)
    assert all(link.startswith("data:") for link in parser.links)
    text = page(ROWS)
    assert "A &lt;fast&gt; CPU" in text
    assert "peer &lt;x&gt;" in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_page_colours_wins_and_losses_by_their_size() -> None:
    cells = [cell for cell in _parsed(ROWS).cells if cell.get("title")]
    by_ratio = {(cell["class"] or "").split()[0] if cell["class"] else "": cell for cell in cells}
    assert {"win", "loss"} <= by_ratio.keys()
    won = next(cell for cell in cells if "110.0 us" in (cell["title"] or ""))
    assert won["class"] == "win"
    assert won["style"] == "--much: 76%"
    assert won["title"] == "fast kernel: 110.0 us, 90% of the memory bound\nbest peer: peer q4, 220.0 us"
    even = _parsed([RUN, result("fast kernel", 220.0)]).cells[0]
    assert (even["class"], even["style"]) == ("win", "--much: 0%")


def test_page_without_matplotlib_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in page(ROWS)
    assert _parsed(ROWS).links == []


def test_plot_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report(ROWS, png=tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


@needs_matplotlib
def test_plot_is_a_png_of_a_panel_for_each_setting(tmp_path: Path) -> None:
    report(ROWS, png=tmp_path / "two.png")
    report([row for row in ROWS if row.get("threads") != 1], png=tmp_path / "one.png")
    widths = []
    for name in ("one", "two"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        widths.append(int.from_bytes(data[16:20], "big"))
    assert widths[1] == 2 * widths[0]


@needs_matplotlib
def test_plot_wants_the_ceilings() -> None:
    from nybble.bench.report_plot import roofline_png

    with pytest.raises(ValueError, match="ceilings"):
        roofline_png([result("fast kernel", 110.0)])


def test_files_are_written_whole_and_readable(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")
    report(ROWS, html=target)
    assert target.read_text(encoding="utf-8").endswith("</html>\n")
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        report(ROWS, html=tmp_path / "missing" / "page.html")
