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
from nybble.dispatch import registry, selection, targets
from nybble.dispatch.registry import all_specs, specs
from nybble.dispatch.selection import NoKernelError, explain, select
from nybble.dispatch.spec import Problem
from nybble.kernels.table import KERNELS
from nybble.weights.scheme import Scheme, families
from nybble.weights.sparsity import NofM

SOURCES = Path(__file__).parents[1] / "csrc"
needs_sources = pytest.mark.skipif(
    not (SOURCES / "kernels.def").is_file(),
    reason="csrc/kernels.def is not here: these tests run without the source tree",
)
LINE = re.compile(
    r"NYBBLE_(?P<op>PREPARE|EXPAND|LINEAR)\((?P<name>\w+), (?:(?P<scheme>(?:sp|bs)?w\d+a\d+), )?(?P<target>\w+)"
    r"(?:, (?P<layout>\w+), (?P<panel>\w+), (?P<block_rows>\d+))?\)"
)
PANELS = {"F32": torch.float32, "S8": torch.int8, "S16": torch.int16, "U8": torch.uint8, "BF16": torch.bfloat16}
PANELS["U8_LINES"] = torch.uint8
FLOAT_FAMILIES = ("w16a16", "spw16a16")
MASK_OF = {layout.name: layout.mask for layout in layouts.table().values() if layout.mask}
COMPILED = [target for target in targets.names() if target != "torch"]


def scheme_for(spec):
    """The name of a scheme that a kernel serves, with zeros enough for its layout and not for another."""
    zeros = spec.sparsity or ("sp24" if "w16" in spec.scheme else "sp90" if spec.least_zeros else "sp50")
    family = spec.scheme.replace("sp", str(zeros)).replace("bs", "bs32x32")
    return f"{family}g32" if "w4" in family else family


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
        Scheme.parse(scheme), m=spec.m_range[0], n=16, k=64, dtype=spec.act_dtypes[0], device=device, layout=spec.layout
    )
    return dataclasses.replace(problem, **changed)


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine another one: machine("avx2") has no faster target."""

    def become(best):
        usable = targets.names()[: targets.names().index(best) + 1]
        missing = {name: f"no {name} in this test" for name in targets.names() if name not in usable}
        other = targets.Machine("a CPU", (), usable, missing, None)
        monkeypatch.setattr(targets, "detect", lambda: other)
        selection.plan_for.cache_clear()

    yield become
    monkeypatch.undo()
    selection.plan_for.cache_clear()


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
    assert {spec.name for spec in all_specs()} == {*names, *expanded(), *references, *triton, *cuda}


def expanded():
    """The kernels that serve a mask layout through lines: every dense one, by the name of its spec."""
    return {f"sp{line['name']}": line for line in table() if line["layout"] in MASK_OF}


@needs_sources
@pytest.mark.parametrize(("name", "line"), expanded().items(), ids=list(expanded()))
def test_every_dense_kernel_also_serves_the_mask_layout(name, line):
    spec, dense = spec_of(name), spec_of(line["name"])
    assert (spec.scheme, spec.layout) == (f"sp{dense.scheme}", MASK_OF[dense.layout])
    same = ("op", "target", "act_dtypes", "out_dtypes", "group_sizes", "panel", "block_rows", "exact")
    assert all(getattr(spec, field) == getattr(dense, field) for field in same)


def fastest(family, dtype, best):
    """The kernel that serves a family and an activation dtype where `best` is the fastest target, by the table."""
    level = targets.names().index(best)
    served = [f"{family}_reference"]
    lines = [(line["name"], line["scheme"], line) for line in table() if line["op"] == "LINEAR"]
    lines += [(name, f"sp{line['scheme']}", line) for name, line in expanded().items()]
    for target in targets.names()[: level + 1]:
        here = {name: line for name, scheme, line in lines if (scheme, line["target"]) == (family, target)}
        fits = [name for name, line in here.items() if line["panel"] != "BF16" or dtype == torch.bfloat16]
        served += sorted(fits, key=lambda name: here[name]["layout"] == "gather8")
    return served[-1]


@pytest.mark.parametrize("target", [target for target in COMPILED if target in ("scalar", "avx2", "avx512vnni")])
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
    assert set(families()) == {"bsw8a8", *dense, *(f"sp{family}" for family in dense), *FLOAT_FAMILIES}
    for spec in specs():
        assert spec.exact == (spec.scheme.endswith("a8") and spec.target != "torch" and spec.name != "w4a8_sm80")
        assert spec.sizes() == ((None, 32, 64, 128) if "w4" in spec.scheme else (None,))


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
        ({}, {"dtype": torch.float64}, "takes float32, bfloat16, float16, not torch.float64"),
        ({"act_dtypes": (torch.float32,)}, {"dtype": torch.float16}, "takes float32, not torch.float16"),
        ({}, {"out_dtype": torch.int32}, "gives float32, bfloat16, float16, not torch.int32"),
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
    spec = spec_of("w4a16_avx2")
    problem = problem_for(spec, "w4a16g32")
    assert spec.why_not(problem) is None
    changed = dataclasses.replace(spec, **change_spec)
    assert changed.why_not(dataclasses.replace(problem, **change_problem)) == reason


def test_int32_outputs_are_for_w8a8_alone(machine):
    machine("scalar")
    for spec in specs():
        if spec.target == "scalar":
            reason = spec.why_not(problem_for(spec, scheme_for(spec), out_dtype=torch.int32))
            assert (reason is None) == spec.scheme.endswith("w8a8")


@pytest.mark.parametrize(
    ("scheme", "zeros"), [("sp64w8a8", 64), ("sp24w8a8", 50), ("sp65w8a8", 65), ("sp32of128w8a8", 75), ("sp85w8a8", 85)]
)
def test_the_gather_layout_wants_many_zeros(scheme, zeros, machine):
    machine("avx512vbmi")
    for spec in (spec for spec in specs() if spec.layout == "gather8" and spec.target in targets.detect().targets):
        least = 85 if spec.target in ("avx2", "avxvnni") else 65
        assert spec.least_zeros == least / 100
        reason = spec.why_not(problem_for(spec, scheme, layout=None))
        assert (reason is None) == (zeros >= least)
        assert reason in (None, f"packed from {least}% zeros on, {scheme} has {zeros}%")
        assert spec.why_not(problem_for(spec, scheme)) is None, "what is packed already is multiplied"


# --- select and explain


@needs_sources
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("best", targets.names())
@pytest.mark.parametrize("family", families())
def test_the_fastest_target_is_selected(family, best, dtype, machine):
    machine(best)
    zeros = "sp24" if family in FLOAT_FAMILIES else "sp90"
    scheme = Scheme.parse(family.replace("sp", zeros).replace("bs", "bs32x32"))
    chosen = select(Problem(scheme, m=1, n=16, k=64, dtype=dtype))
    assert chosen.name == fastest(family, dtype, best)


def test_explain_has_a_reason_for_every_kernel(machine):
    machine("avx2")
    explanation = explain(Problem(Scheme.parse("w8a8"), m=3, n=16, k=64))
    assert explanation.kernel == "w8a8_avx2"
    assert {explanation.kernel, *explanation.rejected} == {spec.name for spec in specs()}
    assert explanation.kernel not in explanation.rejected
    assert explanation.rejected["w8a8_scalar"] == "w8a8_avx2 is faster"
    assert explanation.rejected["w8a8_avx512vnni"] == "no avx512vnni in this test"
    assert explanation.rejected["w4a16_avx2"] == "computes w4a16, not w8a8"
    assert explanation.others == {spec.name for spec in specs() if spec.scheme != "w8a8"}


def test_explain_prints_the_kernels_of_the_own_family_by_reason(machine):
    machine("avx2")
    explanation = explain(Problem(Scheme.parse("w8a8"), m=3, n=16, k=64))
    title, *lines = str(explanation).splitlines()
    assert title == "w8a8 m=3 n=16 k=64 float32 on cpu"
    assert lines[0] == "  runs  w8a8_avx2, which rounds activations to int8 with a scale per token"
    assert (
        lines[-1]
        == f"  {len(explanation.others)} kernels of other schemes left out: explain(..., verbose=True) shows them"
    )
    assert "w8a8_avx2 is faster: w8a8_scalar, w8a8_reference" in str(explanation)
    assert "no avx512vnni in this test: w8a8_avx512vnni" in str(explanation)
    assert [line[:8] for line in lines[1:-1]] == ["  not   "] + ["        "] * (len(lines) - 3)
    assert len(lines) <= 12
    own = {name: reason for name, reason in explanation.rejected.items() if name not in explanation.others}
    words = " ".join(str(explanation).split())
    assert all(name in words and reason in words for name, reason in own.items())
    assert not any(name in words.replace(",", " ").split() for name in explanation.others)


def test_a_verbose_explanation_prints_every_kernel(machine):
    machine("avx2")
    layer = nybble.nn.Linear.from_dense(nn.Linear(64, 16), "w8a8")
    short, long = nybble.explain(layer), nybble.explain(layer, verbose=True)
    assert (short.kernel, short.rejected) == (long.kernel, long.rejected)
    words = " ".join(str(long).split())
    assert all(name in words and reason in words for name, reason in long.rejected.items())
    assert "left out" not in words
    assert len(str(short).splitlines()) < len(str(long).splitlines())


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("family", families())
def test_explanations_fit_a_terminal(family, verbose):
    zeros = "sp24" if family in FLOAT_FAMILIES else "sp90"
    scheme = Scheme.parse(family.replace("sp", zeros).replace("bs", "bs32x32"))
    explanation = dataclasses.replace(explain(Problem(scheme, m=1, n=16, k=64)), verbose=verbose)
    assert max(map(len, str(explanation).splitlines())) <= 120


def test_an_explanation_in_a_notebook_is_escaped(machine):
    machine("avx2")
    explanation = explain(Problem(Scheme.parse("w8a8"), m=3, n=16, k=64))
    explanation.rejected["w8a8_scalar"] = "<script>alert(1)</script>"
    shown = explanation._repr_html_()
    assert "<li>runs w8a8_avx2, which rounds activations" in shown
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown


@pytest.mark.parametrize(
    ("scheme", "note"),
    [
        ("w8a8static", "rounds activations to int8 with the static scale of the layer"),
        ("w4a16", "takes activations as they are, in float32"),
    ],
)
def test_explain_says_what_becomes_of_the_activations(scheme, note):
    assert f", which {note}" in str(explain(Problem(Scheme.parse(scheme), m=3, n=16, k=64)))


def test_select_refuses_with_every_reason_of_the_family_and_what_to_do(machine):
    machine("avx2")
    problem = Problem(Scheme.parse("w8a8"), m=1, n=16, k=64, dtype=torch.float64)
    assert explain(problem).kernel is None
    with pytest.raises(NoKernelError) as error:
        select(problem)
    message = " ".join(str(error.value).split())
    for spec in specs():
        own = spec.scheme == "w8a8"
        assert (spec.name in message.replace(":", " ").replace(",", " ").split()) == own
        assert not own or spec.why_not(problem) in message
    assert message.endswith("to do: convert the activations from float64 to float32, bfloat16, float16")
    with pytest.raises(NoKernelError, match=r"to do: layer\.unpack\(\)"):
        select(dataclasses.replace(problem, dtype=torch.float32, layout="n99k9"))


@pytest.mark.parametrize("m", [1, 64])
def test_explain_of_a_layer(m):
    layer = nybble.nn.Linear.from_dense(nn.Linear(64, 16), "w4a8g32")
    explanation = nybble.explain(layer, m=m)
    assert isinstance(explanation, nybble.Explanation)
    assert (explanation.problem.m, explanation.problem.n, explanation.problem.k) == (m, 16, 64)
    assert explanation.problem.layout == layer.layout
    assert explanation.kernel in repr(layer)
    with pytest.raises(TypeError, match=r"layer=Linear: must be a nybble"):
        nybble.explain(nn.Linear(64, 16))


@pytest.mark.parametrize(("name", "scheme"), ON_CPU, ids=[name for name, _ in ON_CPU])
def test_the_kernel_that_is_named_is_the_one_that_runs(name, scheme, machine, monkeypatch):
    """No kernel is out of reach: capped to its target, a layer of its family calls it."""
    spec = spec_of(name)
    if spec.target not in targets.detect().targets:
        pytest.skip(f"{spec.target}: {targets.detect().missing[spec.target]}")
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
    assert nybble.explain(layer).kernel == name
    y = layer(torch.randn(3, 64, dtype=dtype))
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
        assert names.linear == (name.removeprefix("sp") if masked else name)
    assert ops_of[names.prepare] == "prepare"
    assert ops_of.get(names.expand) == ("expand" if masked else None)


# --- the number of rows


def cuda_kernels(monkeypatch, built):
    """Says of each CUDA kernel whether it was built."""
    rows = [{**row, "built": built(row)} for row in native.cuda_kernel_table()]
    monkeypatch.setattr(native, "cuda_kernel_table", lambda: rows)


@pytest.fixture
def gpu(machine, monkeypatch):
    """Makes this machine one with a GPU, and with the CUDA kernels."""
    cuda_kernels(monkeypatch, built=lambda row: True)
    machine("sm80")
    all_specs.cache_clear()
    yield
    all_specs.cache_clear()


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [
        (
            "w4a16g128",
            {
                0: "w4a16_sm80_gemv",
                8: "w4a16_sm80_gemv",
                9: "w4a16_sm80",
                192: "w4a16_sm80",
                193: "w4a16_triton_matmul",
            },
        ),
        ("w8a16", {1: "w8a16_sm80_gemv", 9: "w8a16_sm80", 64: "w8a16_sm80", 1000: "w8a16_triton_matmul"}),
        ("w4a8", {1: "w4a8_sm80", 64: "w4a8_sm80", 65: "w4a8_triton"}),
        ("w8a8", {1: "w8a8_sm80", 64: "w8a8_sm80", 65: "w8a8_triton"}),
    ],
)
def test_the_number_of_rows_chooses_on_a_gpu(scheme, kernels, gpu, monkeypatch):
    problem = Problem(Scheme.parse(scheme), m=1, n=16, k=64, dtype=torch.bfloat16, device="cuda")
    ran = []

    def naming(name):
        return lambda *shape: lambda *tensors: ran.append(name)

    made = tuple(dataclasses.replace(spec, make=naming(spec.name)) for spec in specs())
    monkeypatch.setattr(selection, "specs", lambda: made)
    selection.plan_for.cache_clear()
    layout = select(problem).layout
    plan = selection.plan_for(scheme, layout, 16, 64, torch.bfloat16, "cuda")
    for m, name in kernels.items():
        assert select(dataclasses.replace(problem, m=m, layout=layout)).name == name
        plan(torch.empty(m, 64), None, None, None)
        assert ran.pop() == name


def test_a_range_of_rows_is_chosen_for_once(gpu, monkeypatch):
    made = tuple(dataclasses.replace(spec, make=lambda *shape: lambda *tensors: None) for spec in specs())
    monkeypatch.setattr(selection, "specs", lambda: made)
    monkeypatch.setattr(selection, "_MOST_COUNTS", 3)
    selection.plan_for.cache_clear()
    plan = selection.plan_for("w4a16", "frag4", 16, 64, torch.bfloat16, "cuda")
    plan(torch.empty(1, 64), None, None, None)
    asked = []
    monkeypatch.setattr(selection, "_select", lambda problem: asked.append(problem.m) or (made[0], True))
    for m in (0, 1, 2, 3, 4, 5, 6, 7, 8):
        plan(torch.empty(m, 64), None, None, None)
        assert len(plan._plans) <= 3
    assert asked == []
    plan(torch.empty(9, 64), None, None, None)
    assert asked == [9]


def test_cuda_kernels_that_are_not_built_stay_in_the_table(gpu, monkeypatch):
    cuda_kernels(monkeypatch, built=lambda row: False)
    all_specs.cache_clear()
    problem = Problem(Scheme.parse("w4a16"), m=1, n=16, k=64, device="cuda")
    assert {spec.why_not(problem) for spec in specs() if (spec.target, spec.scheme) == ("sm80", "w4a16")} == {
        "not built"
    }
    assert {row["why_not"] for row in nybble.kernels() if row["target"] == "sm80"} == {"not built"}
    assert select(problem).name == "w4a16_triton"


def test_one_cuda_kernel_may_be_left_out_alone(gpu, monkeypatch):
    cuda_kernels(monkeypatch, built=lambda row: row["name"] != "w4a16_sm80_gemv")
    all_specs.cache_clear()
    problem = Problem(Scheme.parse("w4a16"), m=1, n=16, k=64, device="cuda")
    assert spec_of("w4a16_sm80_gemv").why_not(problem) == "not built"
    assert select(problem).name == "w4a16_sm80"


def test_why_not_names_the_rows_and_explain_the_rounding(gpu):
    problem = Problem(Scheme.parse("w4a16"), m=193, n=16, k=64, device="cuda")
    assert spec_of("w4a16_sm80").why_not(problem) == "is for 1 to 192 tokens, not 193"
    text = str(explain(dataclasses.replace(problem, m=2)))
    assert "runs  w4a16_sm80_gemv, which rounds float32 activations to bfloat16" in text
    text = str(explain(dataclasses.replace(problem, scheme=Scheme.parse("w8a8"))))
    assert "runs  w8a8_triton, which rounds activations to int8 with a scale per token" in text
    assert "compiled when it is first called, which takes about a second" in " ".join(text.split())


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
    assert reasons["w8a8_avx2"] == reasons["prepare_avx2"] == "no avx2 in this test"


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
