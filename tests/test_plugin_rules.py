"""What nybble's tables ask of the rows of other packages: kernels, targets, layouts and types of weights."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from nybble import layouts, plugins
from nybble.dispatch import KernelSpec, Target, targets
from nybble.dispatch.registry import all_specs
from nybble.layouts import Layout
from nybble.plugins import PluginError
from nybble.weights import WeightType
from nybble.weights.scheme import families
from nybble.weights.weight_type import FloatType, weight_types

TABLES = {"kernels": all_specs, "targets": targets.table, "layouts": layouts.table, "schemes": weight_types}


def forget_tables():
    for cached in (*TABLES.values(), families, targets.names, targets.find, targets.detect, plugins._load):
        cached.cache_clear()


@pytest.fixture
def plug_in(monkeypatch):
    """plug_in(group, value) makes the value a plug-in's entry point; the tables are read anew."""

    def install(group, value):
        monkeypatch.setitem(sys.modules, "toy_rows", SimpleNamespace(ROW=value))
        entry = EntryPoint("mine", "toy_rows:ROW", f"nybble.{group}")
        monkeypatch.setattr(plugins, "_entry_points", lambda: {entry.group: [entry]})
        forget_tables()

    yield install
    monkeypatch.undo()
    forget_tables()


def make(*shape):
    """Stands for the functions of a row, which are not called."""


def kernel(name="mine", scheme="w8a8", target="avx2", layout="n16k4", make=make, **differs):
    return KernelSpec(name, scheme, target, layout, make, **differs)


def bits(number, highest=7, middle=4, largest_step=7, **differs):
    return WeightType(number, 0, highest, middle, largest_step, torch.uint8, **differs)


@pytest.mark.parametrize(
    ("group", "row", "rule"),
    [
        ("kernels", kernel(name="w8a8_avx2"), "the name 'w8a8_avx2' is taken by nybble itself"),
        ("kernels", kernel(target="mmx"), "KernelSpec 'mine' has target='mmx': must be one of torch, triton, "),
        ("kernels", kernel(layout="rows"), "KernelSpec 'mine' has layout='rows': must be one of plain, n16k4, "),
        ("kernels", kernel(scheme="w9a8"), "KernelSpec 'mine' has scheme='w9a8': must be one of w8a7, w8a8, spw8a8, "),
        ("kernels", kernel(op="prepare"), "KernelSpec 'mine' has op='prepare': must be one of linear"),
        ("kernels", kernel(make=None), "KernelSpec 'mine' has make=None: must be callable"),
        ("targets", Target("avx2"), "the name 'avx2' is taken by nybble itself"),
        ("targets", Target("mine", above="mmx"), "Target 'mine' has above='mmx': must be one of torch, triton, "),
        ("layouts", Layout("n16k4", own_pack=make, own_unpack=make), "the name 'n16k4' is taken by nybble itself"),
        ("layouts", Layout("mine", sections=make), "Layout 'mine' needs all of sections, fill and collect, or none"),
        ("schemes", bits(4), "the name 'w4' is taken by nybble itself"),
        ("schemes", bits(5, middle=8), "WeightType 'w5' has middle=8: must be between lowest=0 and highest=7"),
        (
            "schemes",
            bits(5, per_byte=4),
            "WeightType 'w5' has per_byte=4: needs stored=torch.uint8 and codes of 2 bits",
        ),
        ("schemes", bits(5, per_byte=3), "WeightType 'w5' has per_byte=3: must be 1, 2, 4 or 8"),
        ("schemes", bits(5, largest_step=0), "WeightType 'w5' has largest_step=0: must be at least 1 with quantized"),
        ("schemes", bits(5, act_bits=(4,)), "WeightType 'w5' has act_bits=(4,): must be one or more of 7, 8, 16"),
        ("schemes", bits(5, middle=0), "WeightType 'w5' has middle=0: must be between lowest=0 and highest=7"),
        ("schemes", FloatType(5, 0, 0, 0, 0, torch.int8), "WeightType 'w5' needs stored=a float dtype"),
        ("schemes", FloatType(5, 0, 0, 0, 0, torch.half), "WeightType 'w5' has act_bits=(8, 16): must be (16,)"),
        ("schemes", bits(100), "WeightType 'w100' has bits=100: must be in [1, 99]"),
        ("schemes", kernel(), "is a KernelSpec; must be a WeightType or a tuple of them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_breaks_a_rule_of_its_table_is_refused(group, row, rule, plug_in):
    plug_in(group, row)
    with pytest.raises(PluginError) as error:
        TABLES[group]()
    assert f"entry point nybble.{group}: mine = toy_rows:ROW: {rule}" in str(error.value)


def test_a_row_that_keeps_the_rules_is_taken(plug_in):
    for group, row in (
        ("kernels", kernel()),
        ("targets", Target("mine", above="sm90")),
        ("layouts", Layout("mine", own_pack=make, own_unpack=make)),
        ("schemes", bits(5)),
        ("schemes", FloatType(5, 0, 0, 0, 0, torch.half, act_bits=(16,))),
        ("schemes", bits(2, highest=3, middle=2, largest_step=3, per_byte=4)),
    ):
        plug_in(group, row)
        found = TABLES[group]()
        assert row in (found.values() if isinstance(found, dict) else found)


def test_a_target_stands_where_it_says(plug_in):
    plug_in("targets", (Target("low", above="sm90"), Target("next", above="sm90"), Target("top")))
    names = targets.names()
    assert names[names.index("sm90") : names.index("scalar") + 1] == ("sm90", "low", "next", "scalar")
    assert names[-2:] == ("neonbf16", "top")
    assert "top" in targets.detect().targets


def test_a_kernel_of_the_fastest_target_is_preferred(plug_in):
    plug_in("kernels", kernel(target="torch", device=None))
    order = [spec.name for spec in all_specs()]
    assert order.index("mine") < order.index("w8a8_scalar")
    assert order.index("mine") > order.index("w8a8_reference")
