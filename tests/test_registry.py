"""The table of kernels: what csrc/kernels.def says exists, why a kernel does not run, and that the chosen one is what runs."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import nybble
from nybble import layouts, native
from nybble.dispatch import registry, targets
from nybble.dispatch.registry import all_specs, specs
from nybble.dispatch.selection import select
from nybble.dispatch.spec import Problem
from nybble.kernels.table import KERNELS
from nybble.native.weights import GROUPED
from nybble.weights.scheme import Scheme, families, numbers_of
from nybble.weights.sparsity import NofM

SOURCES = Path(__file__).parents[1] / "csrc"
needs_sources = pytest.mark.skipif(
    not (SOURCES / "kernels.def").is_file(),
    reason="csrc/kernels.def is not here: these tests run without the source tree",
)
LINE = re.compile(
    r"NYBBLE_(?P<op>PREPARE|ATTENTION8?|EXPAND|ROWS|CONV|LINEAR)\((?P<name>\w+), (?:(?P<scheme>(?:sp|bs)?w\d+(?:nf|k)?a\d+), )?(?P<target>\w+)"
    r"(?:, (?P<layout>\w+), (?P<panel>\w+), (?P<block_rows>\d+), (?P<columns>\d+), (?P<decoded>\d+),"
    r" (?P<decode_rows>\d+), (?P<least_rows>\d+))?\)"
)
PANELS = {"F32": torch.float32, "S8": torch.int8, "S16": torch.int16, "U8": torch.uint8, "BF16": torch.bfloat16}
PANELS |= {"U7": torch.uint8, "S8_PAIRS": torch.int8}
PANELS |= {"U8_LINES": torch.uint8, "S8_LINES": torch.int8, "BF16_LINES": torch.bfloat16}
FLOAT_FAMILIES = ("w16a16", "spw16a16")
MASK_OF = {layout.name: layout.mask for layout in layouts.table().values() if layout.mask}
COMPILED = [target for target in targets.names() if target != "torch"]


def scheme_for(spec):
    """The name of a scheme that a kernel serves, with zeros enough for its layout and not for another."""
    zeros = spec.sparsity or ("sp24" if "w16" in spec.scheme else "sp90" if spec.least_zeros else "sp50")
    family = spec.scheme.replace("sp", str(zeros)).replace("bs", "bs32x32")
    if spec.layout in GROUPED:
        return f"{family}g128asym"
    return f"{family}g32" if "w4" in family or "w3" in family else family


CASES = [(spec.name, scheme_for(spec)) for spec in specs()]
ON_CPU = [(spec.name, scheme_for(spec)) for spec in specs() if spec.device != "cuda"]


def table():
    """The lines of kernels.def, as dictionaries."""
    if not (SOURCES / "kernels.def").is_file():
        return []
    lines = [line for line in (SOURCES / "kernels.def").read_text().splitlines() if line.startswith("NYBBLE_")]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return [match.groupdict() for match in matches]


def spec_of(name):
    return next(spec for spec in all_specs() if spec.name == name)


def problem_for(spec, scheme, **changed):
    """A problem that the kernel accepts, apart from what is changed."""
    device = spec.device or "cpu"
    problem = Problem(
        Scheme.parse(scheme),
        m=spec.m_range[0],
        n=16,
        k=64,
        dtype=spec.act_dtypes[0],
        device=device,
        layout=spec.layout,
    )
    return dataclasses.replace(problem, **changed)


# --- kernels.def


@needs_sources
@pytest.mark.parametrize("line", table(), ids=lambda line: line["name"])
def test_each_line_of_the_table_has_its_file_and_its_spec(line):
    source = SOURCES / "cpu" / f"{line['name']}.cpp"
    assert source.is_file()
    assert re.search(rf"\bnybble_{line['name']}\b", source.read_text())
    spec = spec_of(line["name"])
    assert spec.op == line["op"].lower()
    assert spec.target == line["target"]
    assert spec.name.startswith(line["scheme"] or line["op"].lower())
    assert spec.name.split("_")[1] == spec.target
    if spec.op == "linear":
        assert (spec.scheme, spec.layout, spec.block_rows) == (line["scheme"], line["layout"], int(line["block_rows"]))
        assert spec.m_range == (int(line["least_rows"]), None)
        assert native.PANEL_DTYPES[spec.panel] == PANELS[line["panel"]]


@needs_sources
def test_the_table_the_files_and_the_specs_are_the_same_set():
    names = [line["name"] for line in table()]
    assert len(names) == len(set(names)) >= 15
    files = {path.stem for path in (SOURCES / "cpu").glob("*.cpp")}
    assert files == set(names)
    assert [row["name"] for row in native.kernel_table()] == names
    references = {f"{family}_reference" for family in families()}
    triton = {kernel.name for kernel in KERNELS}
    cuda = {row["name"] for row in native.cuda_kernel_table()}
    assert {path.stem for path in (SOURCES / "cuda").glob("*.cu")} == cuda
    assert {spec.name for spec in all_specs()} == {*names, *expanded(), *narrower(), *references, *triton, *cuda}


def expanded():
    """The kernels that serve a mask layout through lines: every dense one, by the name of its spec."""
    return {
        f"sp{line['name']}": line
        for line in table()
        if line["layout"] in MASK_OF and f"sp{line['scheme']}" in families()
    }


def narrower():
    """The dense kernels that also serve activations of 7 bits, where the target has no kernel of its own for them."""
    own = {(line["target"], line["layout"]) for line in table() if line["scheme"] == "w8a7"}
    lines = [line for line in table() if line["scheme"] == "w8a8" and (line["target"], line["layout"]) not in own]
    return {line["name"].replace("w8a8", "w8a7"): line for line in lines}


@needs_sources
@pytest.mark.parametrize(("name", "line"), narrower().items(), ids=list(narrower()))
def test_every_kernel_for_8_bit_activations_also_serves_7(name, line):
    spec, wide = spec_of(name), spec_of(line["name"])
    same = {field.name for field in dataclasses.fields(spec)} - {"name", "scheme", "make"}
    assert spec.scheme == "w8a7"
    assert all(getattr(spec, field) == getattr(wide, field) for field in same)


@needs_sources
@pytest.mark.parametrize(("name", "line"), expanded().items(), ids=list(expanded()))
def test_every_dense_kernel_also_serves_the_mask_layout(name, line):
    spec, dense = spec_of(name), spec_of(line["name"])
    assert (spec.scheme, spec.layout) == (f"sp{dense.scheme}", MASK_OF[dense.layout])
    same = ("op", "target", "act_dtypes", "out_dtypes", "group_sizes", "panel", "block_rows", "exact")
    assert all(getattr(spec, field) == getattr(dense, field) for field in same)


def fastest(family, dtype, best, m):
    """The kernel that serves a family, an activation dtype and m rows where `best` is the fastest target, by the table of
    those that are built: others are for CPUs of another kind."""
    built = {row["name"] for row in native.kernel_table() if row["built"]}
    level = targets.names().index(best)
    served = [f"{family}_reference"]
    lines = [(line["name"], line["scheme"], line) for line in table() if line["op"] == "LINEAR"]
    lines += [(name, f"sp{line['scheme']}", line) for name, line in expanded().items()]
    lines += [(name, "w8a7", line) for name, line in narrower().items()]
    lines = [(name, scheme, line) for name, scheme, line in lines if line["name"] in built]
    for target in targets.names()[: level + 1]:
        here = {name: line for name, scheme, line in lines if (scheme, line["target"]) == (family, target)}
        here = {name: line for name, line in here.items() if int(line["least_rows"]) <= m}
        fits = [name for name, line in here.items() if "BF16" not in line["panel"] or dtype == torch.bfloat16]
        order = dict.fromkeys(GROUPED, -1) | {"gather8": 1}
        served += sorted(fits, key=lambda name: order.get(here[name]["layout"], 0))
    return served[-1]


@pytest.mark.parametrize("target", [target for target in COMPILED if target in ("scalar", "avx2", "avx512bw")])
def test_each_family_has_a_kernel_on_each_tier(target):
    found = {spec.scheme for spec in specs() if spec.target == target}
    assert found == {family for family in families() if "w16" not in family}
    assert [spec.name for spec in all_specs() if (spec.op, spec.target) == ("prepare", target)] == [f"prepare_{target}"]


def test_specs_are_ordered_from_the_slowest_target_to_the_fastest():
    order = [targets.names().index(spec.target) for spec in specs()]
    assert order == sorted(order)
    assert all(spec.op == "linear" for spec in specs())
    assert len({spec.name for spec in all_specs()}) == len(all_specs())


def test_scheme_families_and_registry_agree():
    dense = {Scheme(bits, act).family for bits in (4, 8) for act in (8, 16)}
    assert set(families()) == {
        "bsw8a8",
        "w8a7",
        "w4nfa16",
        "w4ka8",
        "w4ka16",
        "w3a8",
        "w3a16",
        *dense,
        *(f"sp{family}" for family in dense),
        *FLOAT_FAMILIES,
    }
    for spec in specs():
        assert spec.exact == (
            spec.scheme.endswith(("a8", "a7")) and spec.target != "torch" and spec.name != "w4a8_sm80"
        )
        four = (None, 32, 64, 128) if spec.device == "cuda" else (None, 16, 32, 64, 128)
        references = [f"{family}_reference" for family in ("w8a7", "w8a8", "w8a16")]
        grouped = "w4" in spec.scheme or spec.layout in GROUPED or spec.name in references
        fewer = {"w8a7_amx_groups": (128,), "w8a8_amx_groups": (128,), "w8a16_amx_groups": (16, 32, 64, 128)}
        groups = {"w4k": (32,), "w3a": (32, 64, 128)} | fewer
        key = spec.name if spec.name in fewer else spec.scheme[:3]
        assert spec.sizes() == groups.get(key, four if grouped else (None,))


# --- why_not


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=[name for name, _ in CASES])
def test_a_kernel_that_is_built_and_fits_has_no_reason(name, scheme, machine):
    spec = dataclasses.replace(spec_of(name), built=True)  # CUDA's may not be
    machine(spec.target)
    assert spec.why_not(problem_for(spec, scheme)) is None
    assert spec.why_not(problem_for(spec, scheme, layout=None)) is None


@pytest.mark.parametrize(
    ("change_spec", "change_problem", "reason"),
    [
        ({"built": False}, {}, "not built"),
        ({"make": None}, {}, "not built"),
        ({"target": "avx512vnni"}, {}, "no avx512vnni in this test"),
        ({}, {"scheme": Scheme.parse("w8a8")}, "computes w4a16, not w8a8"),
        ({}, {"device": "cuda"}, "runs on cpu, not on cuda"),
        ({"sparsity": NofM(2, 4)}, {}, "is for sp24, not None"),
        ({}, {"layout": "plain"}, "reads layout n16k8, the weight is plain"),
        ({}, {"dtype": torch.float64}, "takes float32, bfloat16, float16, not float64"),
        ({"act_dtypes": (torch.float32,)}, {"dtype": torch.float16}, "takes float32, not float16"),
        ({}, {"out_dtype": torch.int32}, "gives float32, bfloat16, float16, not int32"),
        ({"group_sizes": (None, 128)}, {}, "has no group_size 32"),
    ],
    ids=[
        "built",
        "make",
        "target",
        "scheme",
        "device",
        "sparsity",
        "layout",
        "dtype",
        "dtypes",
        "out_dtype",
        "group_size",
    ],
)
def test_why_not_gives_the_reason_for_each_field(change_spec, change_problem, reason, machine):
    machine("avx2")
    spec = dataclasses.replace(spec_of("w4a16_avx2"), built=True)  # on Arm it is not
    problem = problem_for(spec, "w4a16g32")
    assert spec.why_not(problem) is None
    changed = dataclasses.replace(spec, **change_spec)
    assert changed.why_not(dataclasses.replace(problem, **change_problem)) == reason


def test_int32_outputs_are_for_8_bit_weights_and_codes_alone(machine):
    machine("scalar")
    for spec in specs():
        if spec.target == "scalar":
            reason = spec.why_not(problem_for(spec, scheme_for(spec), out_dtype=torch.int32))
            assert (reason is None) == (spec.scheme.endswith(("w8a8", "w8a7")) and spec.layout not in GROUPED)


@pytest.mark.parametrize(
    ("scheme", "zeros"), [("sp64w8a8", 64), ("sp24w8a8", 50), ("sp65w8a8", 65), ("sp32of128w8a8", 75), ("sp85w8a8", 85)]
)
def test_the_gather_layout_wants_many_zeros(scheme, zeros, machine):
    machine("avx512vbmi")
    for spec in (spec for spec in specs() if spec.layout == "gather8" and spec.target in targets.detect().targets):
        spec = dataclasses.replace(spec, built=True)
        least = 85 if spec.target in ("avx2", "avxvnni") else 65
        assert spec.least_zeros == least / 100
        reason = spec.why_not(problem_for(spec, scheme, layout=None))
        assert (reason is None) == (zeros >= least)
        assert reason in (None, f"packed from {least}% zeros on, {scheme} has {zeros}%")
        assert spec.why_not(problem_for(spec, scheme)) is None, "what is packed already is multiplied"


# --- the choice


@pytest.mark.sampled(every=4)
@needs_sources
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("best", targets.names())
@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("m", [1, 64])
def test_the_fastest_target_is_selected(m, family, best, dtype, machine):
    machine(best)
    zeros = "sp24" if family in FLOAT_FAMILIES else "sp90"
    size = numbers_of(family)[0].sizes[0]  # None where all inputs may share a scale
    name = family.replace("sp", zeros).replace("bs", "bs32x32")
    scheme = Scheme.parse(f"{name}g{size}" if size else name)
    chosen = select(Problem(scheme, m=m, n=16, k=64, dtype=dtype))
    assert chosen.name == fastest(family, dtype, best, m)


@pytest.mark.parametrize(("name", "scheme"), ON_CPU, ids=[name for name, _ in ON_CPU])
def test_the_kernel_that_is_named_is_the_one_that_runs(name, scheme, machine, monkeypatch):
    """No kernel is out of reach: capped to its target, a layer of its family calls it."""
    spec = spec_of(name)
    if spec.target not in targets.detect().targets:
        pytest.skip(f"{spec.target}: {targets.detect().missing[spec.target]}")
    if any(other.name == f"{name}_pairs" for other in specs()):
        pytest.skip("serves masks and convolutions: dense layers are packed for the kernel of pairs")
    machine(spec.target)
    ran = []

    class Plan(native.LinearPlan):
        def __init__(self, names, *shape):
            super().__init__(names, *shape)
            self.names = names

        def __call__(self, *arguments):
            ran.append(self.names)
            super().__call__(*arguments)

    monkeypatch.setattr(native, "LinearPlan", Plan)
    dtype = spec.act_dtypes[0]
    kind = nybble.nn.SparseLinear if scheme.startswith(("sp", "bs")) else nybble.nn.Linear
    dense = nn.Linear(64, 16, dtype=dtype)
    if Scheme.parse(scheme).sparsity == NofM(2, 4):
        dense.weight.data[:, 1::2] = 0
    layer = kind.from_dense(dense, scheme)
    rows = max(3, spec.m_range[0])
    assert nybble.explain(layer, m=rows).kernel == name
    y = layer(torch.randn(rows, 64, dtype=dtype))
    assert torch.isfinite(y).all()
    if spec.target == "torch":
        assert not ran
        return
    (names,) = ran
    ops_of = {row["name"]: row["op"] for row in native.kernel_table()}
    masked, few = spec.layout in MASK_OF.values(), name in ops_of and spec.layout in MASK_OF.values()
    assert names.layout == spec.layout
    assert names.few == (name if few else "")
    if not few:  # a dense kernel, where lines are made for it
        dense = name.removeprefix("sp") if masked else name
        assert names.linear == (narrower()[name]["name"] if name in narrower() else dense)
    assert ops_of[names.prepare] == "prepare"
    assert ops_of.get(names.expand) == ("expand" if masked else None)


# --- nybble.kernels


def test_kernels_is_the_table():
    rows = nybble.kernels()
    assert [row["name"] for row in rows] == [spec.name for spec in all_specs()]
    for row in rows:
        assert list(row) == ["name", "op", "scheme", "target", "layout", "built", "usable", "why_not"]
        assert row["usable"] == (row["why_not"] is None)
        assert row["usable"] == (row["built"] and row["target"] in targets.detect().targets)
        assert row["why_not"] is None or row["why_not"].strip()
    assert any(row["usable"] for row in rows)


def test_kernels_says_why_a_target_is_missing(machine):
    machine("scalar")
    reasons = {row["name"]: row["why_not"] for row in nybble.kernels()}
    assert reasons["w8a8_scalar"] is None
    fast = next(row["target"] for row in native.kernel_table() if row["built"] and row["target"] != "scalar")
    assert reasons[f"w8a8_{fast}"] == reasons[f"prepare_{fast}"] == f"no {fast} in this test"


def test_kernels_that_are_not_built_stay_in_the_table(monkeypatch):
    rows = [{**row, "built": row["target"] != "avx2"} for row in native.kernel_table()]
    monkeypatch.setattr(native, "kernel_table", lambda: rows)
    all_specs.cache_clear()
    try:
        found = {row["name"]: row for row in nybble.kernels()}
        assert (found["w8a8_avx2"]["built"], found["w8a8_avx2"]["why_not"]) == (False, "not built")
        assert select(Problem(Scheme.parse("w8a8"), m=1, n=16, k=64)).target != "avx2"
    finally:
        all_specs.cache_clear()


def test_kernels_is_also_the_package():
    import nybble.kernels as module

    assert module is nybble.kernels is importlib.import_module("nybble.kernels")
    from nybble import kernels

    assert kernels is module
    assert kernels.__name__ == "nybble.kernels"
    assert Path(kernels.__file__).parent.name == "kernels"
    assert kernels() == nybble.kernels() == registry.kernels()
    importlib.reload(module)
    assert nybble.kernels() == registry.kernels()
