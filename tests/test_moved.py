"""Old names: each is found under its old path, with one warning, or is known to be gone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nybble import Scheme, _moved

OLD = {
    module: names.split()
    for module, _, names in (
        line.partition(": ") for line in (Path(__file__).parent / "data" / "old_names.txt").read_text().splitlines()
    )
}
# Module -> names that went without a successor, because only nybble itself used them.
GONE = {
    "nybble.checkpoint_tensors": {
        "check_content",
        "write_tensors",
    },  # a file is compared while it is read, written by layers
    "nybble.layouts": {"BLOCK_K"},  # the number of inputs in a word, now part of each layout's functions
    "nybble.layouts_gpu": {"ROWS_K", "collect", "fill"},  # now functions of each layout's row
    "nybble.nn.linear": {"send"},
    "nybble.passes.build": {"refuse_left"},
    "nybble.passes.choose.solve": {"hull"},
    "nybble.passes.choose.times": {"BUDGET_S"},
    "nybble.passes.eligible": {"is_conv1d"},  # now a row of the table of module kinds
    "nybble.passes.layerwise.batches": {"whole"},
    "nybble.passes.layerwise.factor": {"made_up", "without_dead"},
    "nybble.passes.layerwise.stages": {"calm"},
    "nybble.passes.layerwise.sweep": {"Fixed"},
    # Layers are timed by nybble.paired; the SQNR is nybble.compiled.rounding.sqnr_db.
    "nybble.passes.measure": {"BUDGET_S", "interleaved", "pays_from", "slower_at", "speedups", "weight_sqnr_db"},
    "nybble.passes.optimize": {"OWN", "OWN_WHERE"},
    "nybble.passes.recovery.work": {"Scene"},
    "nybble.passes.round.scales": {"Taker"},
    "nybble.passes.sensitivity.harm": {"DAMAGES"},
    "nybble.report": {"geometric_mean"},  # now report.speed.mean_speed, with an interval
}
# Prints module -> [texts of its warnings, name -> texts of its warnings, or null where there is no such name].
FIND = """
import importlib, json, sys, warnings

def run(statement, found):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(statement, found)
    return [str(w.message) for w in caught if w.category is DeprecationWarning and "nybble" in str(w.message)]

result = {}
for module, names in json.load(sys.stdin).items():
    result[module] = [run(f"import {module}", {}), {}]
    for name in names:
        try:
            result[module][1][name] = run(f"from {module} import {name}", found := {})
        except ImportError:
            result[module][1][name] = None
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-c", FIND], input=json.dumps(OLD), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_old_module_is_found_with_one_warning(found):
    for module, (warned, _) in found.items():
        moved = module.removeprefix("nybble.") in _moved.MOVED
        assert len(warned) == moved, (module, warned)
        assert not moved or f"{module} has moved to" in warned[0]


def test_each_old_name_is_found_with_one_warning_or_is_known_to_be_gone(found):
    for module, (_, names) in found.items():
        gone = {name for name, texts in names.items() if texts is None}
        assert gone == GONE.get(module, set()), module
        for name, texts in names.items():
            in_table = f"{module}.{name}".removeprefix("nybble.") in _moved.NAMES
            assert len(texts or ()) <= 1, (module, name, texts)
            assert texts or not in_table, f"{module}.{name}: no warning"


def test_every_row_of_the_tables_leads_to_something():
    for old, new in _moved.MOVED.items():
        assert importlib.util.find_spec(f"nybble.{new}") is not None, old
    for row in _moved.NAMES:
        module, _, name = row.rpartition(".")
        with pytest.warns(DeprecationWarning, match="goes with the next release"):
            assert _moved.old_names(f"nybble.{module}")(name) is not None


@pytest.mark.filterwarnings("ignore:.*goes with the next release:DeprecationWarning")
def test_what_was_a_constant_has_the_value_that_it_had():
    from nybble.layouts import GPU, IN_TORCH, MASK_OF
    from nybble.registry import FAMILIES, FLOAT_FAMILIES, LEAST_ZEROS, MASKS, SPARSE_FAMILIES
    from nybble.report import table
    from nybble.rounding import group_codes, group_scale
    from nybble.scheme import GROUP_SIZES
    from nybble.targets import NAMES

    assert GROUP_SIZES == (16, 32, 64, 128)
    assert NAMES[:2] == ("torch", "triton")
    then = {"w8a8", "w8a16", "w4a8", "w4a16"}  # the old name reads today's table, which has more
    assert set(FAMILIES) == {*then, "w8a7", "w4ka8", "w4ka16", "w3a8", "w3a16"}
    assert set(SPARSE_FAMILIES) == {*(f"sp{family}" for family in then), "bsw8a8"}
    assert FLOAT_FAMILIES == ("w16a16", "spw16a16")
    assert MASK_OF == {"n16k4": "mask8", "n16k8": "mask4"}
    assert MASKS == ("mask8", "mask4")
    assert set(GPU) == {"rows8", "frag4", "quads8", "quads4", "quads16"}
    assert set(IN_TORCH) == {"plain", *GPU}
    assert (LEAST_ZEROS["gather8"], LEAST_ZEROS["spw8a8_avx2_gather"]) == (0.65, 0.85)
    assert table([["a", "b"], ["c", "d"]], {0})[0] == "a  b"
    values = torch.tensor([-4.0, 7.0])
    scale, zero = group_scale(values.min(), values.max(), Scheme.parse("w4a16"))
    assert group_codes(values, scale, zero, Scheme.parse("w4a16")).tolist() == [4.0, 15.0]


def test_the_warning_points_to_the_line_that_used_the_name():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        from nybble import activations
        from nybble.layouts import GPU
        from nybble.testing import Stack
    assert activations.__name__ == "nybble.weights.activations"
    assert [(one.filename, one.category) for one in warned] == [(__file__, DeprecationWarning)] * 3, (GPU, Stack)
