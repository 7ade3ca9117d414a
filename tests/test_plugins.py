"""Rows of other packages in nybble's tables: what is loaded, when, and what is refused."""

from __future__ import annotations

import sys
import textwrap

import pytest

from nybble import plugins
from nybble.dispatch.targets import Target
from nybble.plugins import PluginError, rows

BUILT_IN = (Target("own"),)


def install(site, name, code, entries):
    """Writes a package as pip would leave it in a site-packages folder. entries: lines of entry_points.txt."""
    package, info = site / name, site / f"{name}-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rows.py").write_text(textwrap.dedent(code))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entries))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages on this process's path, whose plug-ins nybble does not know yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(plugins.VARIABLE, raising=False)

    def forget():
        plugins._entry_points.cache_clear()
        plugins._load.cache_clear()

    forget()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()


def test_rows_come_after_nybbles_own_in_the_order_of_their_names(site):
    code = "from nybble.dispatch.targets import Target\nROW = Target('one')\nPAIR = (Target('two'), Target('three'))"
    install(site, "toy_b", code, "[nybble.kernels]\nz = toy_b.rows:ROW\n")
    install(site, "toy_a", code, "[nybble.kernels]\nb = toy_a.rows:PAIR\n[nybble.layouts]\na = toy_a.rows:ROW\n")
    assert [row.name for row in rows("nybble.kernels", Target, BUILT_IN)] == ["own", "two", "three", "one"]
    assert [row.name for row in rows("nybble.layouts", Target, BUILT_IN)] == ["own", "one"]
    assert rows("nybble.targets", Target, BUILT_IN) == BUILT_IN


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("ROW = 'a string'", "is a str; must be a Target or a tuple of them"),
        ("ROW = (1, 2)", "is a int; must be a Target or a tuple of them"),
        ("from nybble.dispatch.targets import Target\nROW = Target", "is a type; must be a Target or a tuple of them"),
        ("from nybble.dispatch.targets import Target\nROW = Target('own')", "the name 'own' is taken by nybble itself"),
        (
            "from nybble.dispatch.targets import Target\nROW = (Target('x'), Target('x'))",
            "the name 'x' is taken by plug-in toy_c 1.0",
        ),
        ("ROW = 1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "cannot be imported: AttributeError"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused_by_name(site, code, rule):
    install(site, "toy_c", code, "[nybble.kernels]\nmine = toy_c.rows:ROW\n")
    for _ in range(2):  # at every use, not only the first
        with pytest.raises(PluginError) as error:
            rows("nybble.kernels", Target, BUILT_IN)
        assert str(error.value).startswith(
            "plug-in toy_c 1.0, entry point nybble.kernels: mine = toy_c.rows:ROW: " + rule
        )
        assert "NYBBLE_PLUGINS=0" in str(error.value)


def test_a_row_that_is_wrong_by_its_tables_rule_is_refused(site):
    install(
        site,
        "toy_h",
        "from nybble.dispatch.targets import Target\nROW = Target('odd')",
        "[nybble.kernels]\nmine = toy_h.rows:ROW\n",
    )
    with pytest.raises(PluginError, match=r"toy_h 1\.0.*: Target 'odd' is odd"):
        rows("nybble.kernels", Target, BUILT_IN, lambda row: "is odd" if row.name == "odd" else None)


def test_two_plugins_with_one_name_are_refused(site):
    code = "from nybble.dispatch.targets import Target\nROW = Target('same')"
    install(site, "toy_d", code, "[nybble.kernels]\nmine = toy_d.rows:ROW\n")
    install(site, "toy_e", code, "[nybble.kernels]\nmine = toy_e.rows:ROW\n")
    with pytest.raises(PluginError, match=r"toy_e 1\.0.*'same' is taken by plug-in toy_d 1\.0"):
        rows("nybble.kernels", Target)


def test_plugins_can_be_turned_off(site, monkeypatch):
    install(site, "toy_f", "1 / 0", "[nybble.kernels]\nmine = toy_f.rows:ROW\n")
    monkeypatch.setenv(plugins.VARIABLE, "0")
    assert rows("nybble.kernels", Target, BUILT_IN) == BUILT_IN
    plugins._entry_points.cache_clear()
    monkeypatch.setenv(plugins.VARIABLE, "no")
    with pytest.raises(PluginError, match="NYBBLE_PLUGINS='no': must be 0"):
        rows("nybble.kernels", Target, BUILT_IN)


def test_a_misspelt_group_is_said(site):
    install(site, "toy_g", "", "[nybble.kernel]\nmine = toy_g.rows:ROW\n")
    with pytest.warns(RuntimeWarning, match=r"toy_g 1\.0.*unknown group.*nybble\.kernels"):
        assert rows("nybble.kernels", Target, BUILT_IN) == BUILT_IN
