"""The package in toy_plugin, as a user would install it: its 2-bit weights are rounded, packed, run, explained and saved.

One process finds out everything; the tests judge what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SITE = Path(__file__).parent / "toy_plugin"
PROGRAM = """
import contextlib, io, json, os, sys, tempfile, torch
from torch import nn
import nybble
from nybble import plugins
from nybble.__main__ import main
from nybble.weights import Scheme

found = {"loaded_by_import": "toy_plugin" in sys.modules}


def refusal(name):
    try:
        return f"accepted {Scheme.parse(name)}"
    except ValueError as error:
        return str(error)


def explained(name):
    layer = nybble.nn.Linear.from_dense(nn.Linear(32, 8), name)
    explanation = nybble.explain(layer)
    return [explanation.kernel, explanation.rejected["w2a16_toy"], layer.layout]


def in_child(function, *arguments, **environment):
    # Before any table is read here: each child reads its own.
    read, write = os.pipe()
    if os.fork() == 0:
        os.environ.update(environment)
        os.write(write, json.dumps(function(*arguments)).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as result:
        return json.loads(result.read())


found["off"] = in_child(refusal, "w2a16g32", NYBBLE_PLUGINS="0")
found["missing"] = in_child(explained, "w2a16g32", NO_TOY="no toy here", NYBBLE_TARGET="")
found["capped"] = in_child(explained, "w2a16g32", NYBBLE_TARGET="scalar")

torch.manual_seed(0)
dense, x = nn.Linear(96, 20), torch.randn(5, 96)
layer = nybble.nn.Linear.from_dense(dense, "w2a16g32asym")
import nybble.testing
from toy_plugin.rows import KERNEL, RAN

RAN.clear()
y = layer(x)
found["ran"] = list(RAN)
found["layout"] = layer.layout
found["bytes"] = layer.packed.numel()
found["off_by"] = float((y - nn.functional.linear(x, layer.dequantized_weight(), dense.bias)).abs().max())
found["rounding"] = float((layer.dequantized_weight() - dense.weight).norm() / dense.weight.norm())
found["explained"] = str(nybble.explain(layer))
found["kernel"] = nybble.explain(layer).kernel
found["kernels"] = [row for row in nybble.kernels() if row["name"] == "w2a16_toy"]
found["state"] = {name: [list(t.shape), str(t.dtype)] for name, t in layer.state_dict().items()}
with contextlib.redirect_stdout(io.StringIO()) as printed:
    main(["kernels"])
found["printed"] = printed.getvalue()

model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 20))
report = nybble.quantize(model, "w2a16g32", calibration=[x], method="gptq", goal="memory", m=1)
found["swapped"] = [layer.swapped for layer in report.layers]
with tempfile.TemporaryDirectory() as folder:
    nybble.save(model, folder)
    again = nybble.load(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 20)), folder)
found["loaded"] = torch.equal(again(x), model(x)) and again[0].layout == "columns"

# Without a kernel of its own: the reference runs it.
others = {}
dense.weight.data[:, ::4] = dense.weight.data[:, 1::4] = 0
for name, kind in (("w2a8", nybble.nn.Linear), ("sp24w2a16", nybble.nn.SparseLinear)):
    other = kind.from_dense(dense, name)
    expected = nn.functional.linear(x, other.dequantized_weight(), dense.bias)
    fresh = kind(96, 20, scheme=name)
    fresh.load_state_dict(other.state_dict())
    error = float((other(x) - expected).norm() / expected.norm())
    others[name] = [nybble.explain(other).kernel, error, torch.equal(fresh(x), other(x))]
found["others"] = others

nybble.testing.check_kernel(KERNEL)
found["grammar"] = refusal("w5a16")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What the program finds with the package on the path."""
    pytest.importorskip("safetensors")
    path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env={**os.environ, "PYTHONPATH": path, "NYBBLE_PLUGINS": "1", "NYBBLE_TARGET": "toy"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_no_plugin_and_they_can_be_turned_off(found):
    assert not found["loaded_by_import"]
    assert found["off"].startswith("scheme='w2a16g32': not a scheme: weight_bits=2: must be 8, 4, 3 or 16")


def test_its_kernel_runs_its_weights_in_its_layout_on_its_target(found):
    assert found["ran"] == [["w2a16g32asym", 5]]
    assert found["layout"] == "columns"
    assert found["bytes"] == 96 * 20 + 128 + 64  # codes, scales and zero points, aligned to 64
    assert found["kernel"] == "w2a16_toy"
    assert found["off_by"] < 1e-5


def test_its_weights_are_rounded_and_stored_as_the_row_says(found):
    assert 0.1 < found["rounding"] < 0.4
    assert found["state"] == {
        "qweight": [[20, 24], "torch.uint8"],
        "scale": [[20, 3], "torch.bfloat16"],
        "zero_point": [[20, 3], "torch.uint8"],
        "bias": [[20], "torch.float32"],
    }


def test_it_is_explained_and_listed(found):
    assert "w2a16_toy" in found["explained"]
    assert "w2a16_reference" in found["explained"]
    (row,) = found["kernels"]
    assert row == {
        "name": "w2a16_toy",
        "op": "linear",
        "scheme": "w2a16",
        "target": "toy",
        "layout": "columns",
        "built": True,
        "usable": True,
        "why_not": None,
    }
    assert "w2a16_toy" in found["printed"]
    assert "must be 8, 4, 3, 16 or 2; use w8a7, w8a8, w8a16, " in found["grammar"]
    assert "w2: g32" in found["grammar"]


def test_passes_and_checkpoints_take_its_scheme(found):
    assert found["swapped"] == [True, True]
    assert found["loaded"]


def test_the_reference_runs_what_it_brings_no_kernel_for(found):
    for name, kernel in (("w2a8", "w2a8_reference"), ("sp24w2a16", "spw2a16_reference")):
        ran, error, same = found["others"][name]
        assert ran == kernel
        assert error < 0.01
        assert same


def test_without_its_target_the_reference_takes_over(found):
    assert found["missing"] == ["w2a16_reference", "no toy here", "plain"]
    assert found["capped"] == ["w2a16_reference", "above NYBBLE_TARGET=scalar", "plain"]
