"""What is chosen for a problem, and how the choice is explained; on a GPU, for each number of rows."""

import dataclasses

import pytest
import torch
from torch import nn

import nybble
from nybble import native
from nybble.dispatch import selection
from nybble.dispatch.registry import all_specs, specs
from nybble.dispatch.selection import NoKernelError, explain, select
from nybble.dispatch.spec import Problem
from nybble.weights.scheme import Scheme, families, numbers_of


def why_not(name, problem):
    return next(spec for spec in specs() if spec.name == name).why_not(problem)


# --- explain


@pytest.mark.usefixtures("x86_kernels")
def test_explain_has_a_reason_for_every_kernel(machine):
    machine("avx2")
    explanation = explain(Problem(Scheme.parse("w8a8"), m=3, n=16, k=64))
    assert explanation.kernel == "w8a8_avx2"
    assert {explanation.kernel, *explanation.rejected} == {spec.name for spec in specs()}
    assert explanation.kernel not in explanation.rejected
    assert explanation.rejected["w8a8_scalar"] == "slower than w8a8_avx2"
    assert explanation.rejected["w8a8_avx512vnni"] == "no avx512vnni in this test"
    assert explanation.rejected["w4a16_avx2"] == "computes w4a16, not w8a8"
    assert explanation.others == {spec.name for spec in specs() if spec.scheme != "w8a8"}


@pytest.mark.usefixtures("x86_kernels")
def test_explain_prints_the_kernels_of_the_own_family_by_reason(machine):
    machine("avx2")
    explanation = explain(Problem(Scheme.parse("w8a8"), m=3, n=16, k=64))
    title, *lines = str(explanation).splitlines()
    assert title == "w8a8 m=3 n=16 k=64 float32 on cpu"
    assert lines[0] == "  runs: w8a8_avx2, which rounds activations to int8 with a scale per token"
    assert lines[1:3] == ["", "does not run:"]
    assert lines[-1] == f"  {len(explanation.others)} kernels of other schemes: explain(..., verbose=True) shows them"
    assert "  w8a8_avx2_groups, w8a8_scalar, w8a8_scalar_groups, w8a8_reference: slower than w8a8_avx2" in lines
    assert "  w8a8_avx512vnni, w8a8_avx512vnni_groups: no avx512vnni in this test" in lines
    assert all(line.startswith("  ") for line in lines[3:])
    assert len(lines) <= 13
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
    assert "other schemes" not in words
    assert len(str(short).splitlines()) < len(str(long).splitlines())


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("family", families())
def test_explanations_fit_a_terminal(family, verbose):
    zeros = "sp24" if "w16" in family else "sp90"
    size = numbers_of(family)[0].sizes[0]
    name = family.replace("sp", zeros).replace("bs", "bs32x32")
    scheme = Scheme.parse(f"{name}g{size}" if size else name)
    explanation = dataclasses.replace(explain(Problem(scheme, m=1, n=16, k=64)), verbose=verbose)
    assert max(map(len, str(explanation).splitlines())) <= 120


@pytest.mark.usefixtures("x86_kernels")
def test_an_explanation_in_a_notebook_is_escaped(machine):
    machine("avx2")
    explanation = explain(Problem(Scheme.parse("w8a8"), m=3, n=16, k=64))
    explanation.rejected["w8a8_scalar"] = "<script>alert(1)</script>"
    shown = explanation._repr_html_()
    assert "<li>runs: w8a8_avx2, which rounds activations" in shown
    assert "<p>does not run:</p>\n<ul>\n<li>" in shown
    assert "<li>w8a8_avx2_groups, w8a8_scalar_groups, w8a8_reference: slower than w8a8_avx2</li>" in shown
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
    assert "takes float32, bfloat16, float16, not float64" in message
    assert "torch." not in message
    with pytest.raises(NoKernelError, match=r"to do: layer\.unpack\(\)"):
        select(dataclasses.replace(problem, dtype=torch.float32, layout="n99k9"))


@pytest.mark.parametrize("m", [1, 64])
def test_explain_of_a_layer(m):
    layer = nybble.nn.Linear.from_dense(nn.Linear(64, 16), "w4a8g32")
    explanation = nybble.explain(layer, m=m)
    assert isinstance(explanation, nybble.Explanation)
    assert (explanation.problem.m, explanation.problem.n, explanation.problem.k) == (m, 16, 64)
    assert explanation.problem.layout == layer.layout
    if m == 1:  # AMX takes over at more rows
        assert explanation.kernel in repr(layer)
    with pytest.raises(TypeError, match=r"layer=Linear: must be a nybble"):
        nybble.explain(nn.Linear(64, 16))


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
    assert why_not("w4a16_sm80_gemv", problem) == "not built"
    assert select(problem).name == "w4a16_sm80"


def test_why_not_names_the_rows_and_explain_the_rounding(gpu):
    problem = Problem(Scheme.parse("w4a16"), m=193, n=16, k=64, device="cuda")
    assert why_not("w4a16_sm80", problem) == "is for 1 to 192 rows, not 193"
    text = str(explain(dataclasses.replace(problem, m=2)))
    assert "runs: w4a16_sm80_gemv, which rounds float32 activations to bfloat16" in text
    text = str(explain(dataclasses.replace(problem, scheme=Scheme.parse("w8a8"))))
    assert "runs: w8a8_triton, which rounds activations to int8 with a scale per token" in text
    assert "compiled when it is first called, which takes about a second" in " ".join(text.split())
