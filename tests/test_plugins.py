"""Rows of other packages in nybble's tables: what is loaded, when, and what is refused."""

from __future__ import annotations

import os
import subprocess
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
    with pytest.warns(RuntimeWarning, match=r"toy_g 1\.0.*unknown group.*nybble\.kernels") as warned:
        assert rows("nybble.kernels", Target, BUILT_IN) == BUILT_IN
    assert [found.filename for found in warned] == [__file__], "the line that asked, not one of nybble"


# --- toys of a user's package, in a process of its own


def run(site, program):
    """Runs a program in a new process that has the packages of a site folder; fails with its error."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, plugins.VARIABLE: "1"}
    code = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TOY_MODULES = """
    import torch
    from torch import nn
    from nybble.nn import Linear, MatrixWeight, ModuleKind, SparseLinear

    class Dense(nn.Module):
        '''y = x @ kernel + offset, kernel (K, N).'''

        def __init__(self, k, n):
            super().__init__()
            self.kernel, self.offset = nn.Parameter(torch.randn(k, n) / k**0.5), nn.Parameter(torch.randn(n))

        def forward(self, x):
            return x @ self.kernel + self.offset

    class Plain(Dense):
        '''A kind of its own.'''

    class QuantizedDense(Linear):
        '''Another name than nybble's, which checkpoints store.'''

    WEIGHT = MatrixWeight("kernel", "offset", torch.t, lambda matrix, shape: matrix.t().contiguous())
    KINDS = (
        ModuleKind("Dense", "toy_modules.rows.Dense", QuantizedDense, SparseLinear, (WEIGHT,)),
        ModuleKind("Plain", Plain, Linear, weights=(WEIGHT,)),
    )
"""
TOY_PROGRAM = """
    import copy, json, pathlib, sys, tempfile
    import torch, nybble
    from torch import nn
    from nybble.passes.layerwise.errors import relative_error
    from toy_modules.rows import Dense, Plain, QuantizedDense

    torch.manual_seed(0)
    x = torch.randn(32, 64)
    toy = nn.Sequential(Dense(64, 48), nn.ReLU(), Dense(48, 32)).eval()
    twin = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    with torch.no_grad():
        for i in (0, 2):
            twin[i].weight.copy_(toy[i].kernel.t())
            twin[i].bias.copy_(toy[i].offset)
    wanted = toy(x)
    asked = {"calibration": [x, torch.randn(32, 64)], "goal": "memory"}
"""


@pytest.fixture
def toys(site):
    install(site, "toy_modules", TOY_MODULES, "[nybble.modules]\ntoy = toy_modules.rows:KINDS\n")
    return lambda program: run(site, textwrap.dedent(TOY_PROGRAM) + textwrap.dedent(program))


def test_a_layer_of_another_package_is_quantized_counted_and_saved(toys):
    pytest.importorskip("safetensors")
    toys("""
        report = nybble.quantize(toy, "w8a8", goal="memory", m=1)
        assert [type(layer) for layer in (toy[0], toy[2])] == [QuantizedDense] * 2
        assert [(row.kind, row.shape, row.swapped) for row in report.layers] == [
            ("Dense", (48, 64), True), ("Dense", (32, 48), True)
        ]
        assert report.coverage == 100
        assert report.nbytes_before == 4 * (64 * 48 + 48 + 48 * 32 + 32)
        assert relative_error(toy(x), wanted) < 0.02
        nybble.quantize(twin, "w8a8", goal="memory", m=1)
        for mine, theirs in zip(toy.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)
        assert nybble.explain(toy[0]).kernel is not None
        assert nybble.quantize(toy, "w8a8", goal="memory").layers[0].reason == "already quantized"

        with tempfile.TemporaryDirectory() as directory:
            nybble.save(toy, directory)
            index = json.loads((pathlib.Path(directory) / "nybble.json").read_text())
            assert [layer["kind"] for layer in index["layers"]] == ["QuantizedDense"] * 2
            for target in (nn.Sequential(Dense(64, 48), nn.ReLU(), Dense(48, 32)), copy.deepcopy(toy).to("meta")):
                nybble.load(target.eval(), directory)
                assert type(target[0]) is QuantizedDense
                assert torch.equal(target(x), toy(x))
            try:
                nybble.load(twin, directory)
            except nybble.checkpoint.CheckpointError as error:
                assert "0: a QuantizedDense in the checkpoint cannot replace a Linear" in str(error)
            else:
                raise AssertionError("loaded into another kind of layer")
    """)


def test_passes_that_read_data_take_a_layer_of_another_package(toys):
    toys("""
        for arguments in ({"method": "gptq"}, {"method": "awq"}, {"smooth": 0.5}):
            mine, theirs = copy.deepcopy(toy), copy.deepcopy(twin)
            nybble.quantize(mine, "w8a8" if "smooth" in arguments else "w4a16g32", **asked, **arguments)
            nybble.quantize(theirs, "w8a8" if "smooth" in arguments else "w4a16g32", **asked, **arguments)
            assert relative_error(mine(x), wanted) < 0.15
            assert relative_error(mine(x), theirs(x)) < 1e-3, arguments
        pruned = copy.deepcopy(toy)
        report = nybble.sparsify(pruned, "2:4", **asked)
        assert all(type(layer) is nybble.nn.SparseLinear for layer in (pruned[0], pruned[2]))
        assert [row.pruned.kept for row in report.layers] == [0.5, 0.5]
        floats = copy.deepcopy(toy)
        nybble.sparsify(floats, "2:4", scheme=None, **asked)
        assert type(floats[0]) is Dense and floats[0].kernel.shape == (64, 48)
        assert bool(((floats[0].kernel.reshape(16, 4, 48) != 0).sum(1) == 2).all())
        before = relative_error(floats(x), wanted)
        nybble.recover(floats, toy, asked["calibration"] * 4)
        assert type(floats[0]) is Dense and (floats[0].kernel == 0).float().mean() >= 0.5
        assert relative_error(floats(x), wanted) < before
    """)


def test_what_a_layer_of_another_package_cannot_become_is_said(toys):
    toys("""
        class More(Dense):
            pass

        odd = nn.Sequential(Plain(64, 48), More(48, 32))
        plain, more = nybble.sparsify(odd, "2:4", method="magnitude", goal="memory").layers
        assert "nybble has no sparse Plain" in plain.reason, plain.reason
        assert "subclass of Dense" in more.reason, more.reason
        thick = nn.Sequential(Plain(64, 48))
        thick[0].kernel = nn.Parameter(torch.zeros(2, 3, 4))
        (row,) = nybble.quantize(thick, "w8a8", goal="memory").layers
        assert "shape (2, 3, 4), only (N, K)" in row.reason and row.shape == (2, 3, 4)
        plain, more = nybble.quantize(odd, "w8a8", goal="memory").layers
        assert type(odd[0]) is nybble.nn.Linear and plain.swapped and not more.swapped
    """)


KIND_HEAD = "from torch import nn\nfrom nybble.nn import Linear, MatrixWeight, ModuleKind, SparseLinear\n"


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (
            "ModuleKind('x', nn.Linear, Linear)",
            "replaces torch.nn.modules.linear.Linear, which the kind 'Linear' replaces",
        ),
        ("ModuleKind('Linear', nn.Bilinear, Linear)", "the name 'Linear' is taken by nybble itself"),
        (
            "(ModuleKind('x', 'toy.X', Linear), ModuleKind('y', 'toy.X', Linear))",
            "replaces toy.X, which the kind 'x' replaces",
        ),
        (
            "ModuleKind('x', nn.Bilinear, type('Linear', (Linear,), {}))",
            "has the quantized class toy_k.rows.Linear; checkpoints would confuse it with nybble.nn.linear.Linear",
        ),
        ("ModuleKind('x', nn.Bilinear, nn.Linear)", "module=Linear must be a subclass of QuantizedModule"),
        ("ModuleKind('x', nn.Bilinear, SparseLinear)", "module=SparseLinear must be .* with is_sparse = False"),
        ("ModuleKind('x', nn.Bilinear, Linear, Linear)", "sparse_module=Linear must be .* with is_sparse = True"),
        ("ModuleKind('x', nn.Bilinear, Linear, weights=())", "weights must be one MatrixWeight, got 0"),
    ],
)
def test_a_module_kind_that_breaks_a_rule_is_refused(site, row, rule):
    from nybble.nn.kinds import forget_kinds, module_kinds

    install(site, "toy_k", f"{KIND_HEAD}ROW = {row}", "[nybble.modules]\nmine = toy_k.rows:ROW\n")
    forget_kinds()
    try:
        with pytest.raises(PluginError, match=rf"toy_k 1\.0.*{rule}"):
            module_kinds()
    finally:
        forget_kinds()


TOY_FORMATS = """
    import json
    import torch
    from nybble.checkpoint import Format

    def save(model, directory):
        directory.mkdir(exist_ok=True)
        values = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        (directory / "toy.json").write_text(json.dumps(values))

    def load(model, directory):
        values = json.loads((directory / "toy.json").read_text())
        model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})

    FORMATS = (
        Format("toy", "a file toy.json", lambda directory: (directory / "toy.json").exists(), load, save),
        Format("frozen", "a file frozen.json", lambda directory: (directory / "frozen.json").exists(), load),
    )
"""


def test_a_format_of_another_package_saves_and_loads(site):
    pytest.importorskip("safetensors")
    install(site, "toy_formats", TOY_FORMATS, "[nybble.formats]\ntoy = toy_formats.rows:FORMATS\n")
    run(
        site,
        f"""
        import pathlib, re, torch, nybble
        from torch import nn
        from nybble.checkpoint import CheckpointError

        here = pathlib.Path({str(site)!r})

        def refused(kind, rule, call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except kind as error:
                assert re.search(rule, str(error)), error
            else:
                raise AssertionError("not refused: " + rule)

        saved, loaded = nn.Linear(8, 4), nn.Linear(8, 4)
        nybble.save(saved, here / "a", format="toy")
        assert sorted(path.name for path in (here / "a").iterdir()) == ["toy.json"]
        assert nybble.load(loaded, here / "a") is loaded
        assert torch.equal(loaded.weight, saved.weight)

        nybble.save(saved, here / "b")
        nybble.load(loaded, here / "b")
        (here / "b" / "toy.json").write_text("")
        both = "holds checkpoints of 2 formats, must be one .nybble: nybble.json.*; toy: a file toy.json"
        refused(CheckpointError, both, nybble.load, loaded, here / "b")
        (here / "c").mkdir()
        none = "no checkpoint in a format.*nybble: nybble.json.*; toy: a file toy.json; frozen: a file frozen.json"
        refused(CheckpointError, none, nybble.load, loaded, here / "c")
        for name, why in (("frozen", "can be loaded but not saved"), ("gguf", "unknown")):
            rule = f"format='{{name}}': {{why}}; must be one of 'nybble', 'toy'$"
            refused(ValueError, rule, nybble.save, saved, here, format=name)
    """,
    )
