"""A kernel that is wrong on this machine is found out, said and left out."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

import nybble
from nybble import plugins
from nybble.dispatch import selection, selfcheck, targets
from nybble.dispatch.registry import all_specs, specs
from nybble.dispatch.spec import DISTRUSTED, KernelSpec, Problem
from nybble.testing import schemes_of
from nybble.weights.scheme import Scheme

DENSE = ("w8a8", "w8a16", "w4a8", "w4a16")
GPU = [spec for spec in specs() if spec.device == "cuda"]


def spec_on_cpu(family: str) -> KernelSpec:
    """The reference, as if it read a layout that is packed in torch."""
    return next(spec for spec in specs() if spec.name == f"{family}_reference")


@pytest.mark.parametrize("family", DENSE)
def test_a_right_kernel_is_trusted(family: str) -> None:
    assert selfcheck.disagreement(spec_on_cpu(family), "cpu") is None


@pytest.mark.parametrize("wrong_m", [1, 17, 192])
def test_wrong_outputs_are_found(wrong_m: int) -> None:
    right = spec_on_cpu("w4a16")

    def make(*shape):
        plan = right.make(*shape)

        def call(x, packed, bias, out):
            plan(x, packed, bias, out)
            if len(x) == wrong_m:
                out[-1, -1] += out.abs().max()

        return call

    reason = selfcheck.disagreement(dataclasses.replace(right, make=make), "cpu")
    assert reason is not None
    assert reason.startswith(f"its bfloat16 outputs for {wrong_m} rows and (72, 1096) weights of w4a16g16asym are off")


def test_a_second_launch_that_is_wrong_is_found() -> None:
    right = spec_on_cpu("w4a16")

    def make(*shape):
        plan, calls = right.make(*shape), []

        def call(x, packed, bias, out):
            plan(x, packed, bias, out)
            calls.append(out)
            if len(calls) == 2:
                out[-1, -1] += out.abs().max()

        return call

    reason = selfcheck.disagreement(dataclasses.replace(right, make=make, target="triton"), "cpu")
    assert reason is not None
    assert "are off by" in reason


def test_outputs_that_are_not_written_are_found() -> None:
    spec = dataclasses.replace(spec_on_cpu("w8a16"), make=lambda *shape: lambda *tensors: None)
    assert "off by nan" in (selfcheck.disagreement(spec, "cpu") or "")


def test_a_refusal_is_a_reason() -> None:
    def make(*shape):
        def call(*tensors):
            raise RuntimeError("w4a16_sm80: no kernel image\nand more")

        return call

    spec = dataclasses.replace(spec_on_cpu("w4a16"), make=make)
    assert selfcheck.disagreement(spec, "cpu") == "w4a16_sm80: no kernel image"


@pytest.mark.parametrize(("field", "value"), [("dtype", torch.float16), ("symmetric", True), ("n", 320), ("k", 2600)])
def test_each_type_scheme_and_shape_is_tried(field: str, value: object) -> None:
    """A kernel that is wrong for one of them alone is found."""
    right = spec_on_cpu("w4a16")

    def make(scheme, n, k):
        plan = right.make(scheme, n, k)

        def call(x, packed, bias, out):
            plan(x, packed, bias, out)
            if {"dtype": x.dtype, "symmetric": scheme.symmetric, "n": n, "k": k}[field] == value:
                out.zero_()

        return call

    assert selfcheck.disagreement(dataclasses.replace(right, make=make), "cpu") is not None


def test_one_shape_fills_a_cluster_of_8_and_several_blocks() -> None:
    """As csrc/cuda/maps.h cuts them: splits of 8 blocks of 64 inputs at least, blocks of 256 outputs."""
    assert any(k // 64 // 8 >= 8 and n > 256 for n, k in selfcheck._SHAPES)
    assert any(3 <= k // 64 // 8 < 8 and k % 64 for n, k in selfcheck._SHAPES)


@pytest.mark.parametrize(("target", "found"), [("sm90", True), ("sm80", False)])
def test_the_wide_weight_is_tried_on_kernels_for_wgmma_alone(target: str, found: bool) -> None:
    """A kernel that is wrong for no other weight is found."""
    right = spec_on_cpu("w8a16")

    def make(scheme, n, k):
        plan = right.make(scheme, n, k)

        def call(x, packed, bias, out):
            plan(x, packed, bias, out)
            if (n, k) == selfcheck._WIDE:
                out.zero_()

        return call

    spec = dataclasses.replace(right, make=make, target=target, m_range=(1, 1))
    reason = selfcheck.disagreement(spec, "cpu")
    assert (reason is not None) == found
    assert reason is None or re.search(r"\(8456, 392\) weights of w8a16\w* are off by 1", reason)


def test_the_wide_weight_takes_wide_tiles_and_several_in_turn() -> None:
    """As csrc/cuda/w8a8_sm90.cu chooses on an H100 or H200, whose 132 multiprocessors hold 66 pairs of blocks at once:
    a wide tile (256 outputs) costs 4 for narrow ones' (128 outputs) 3, and the tiles beyond 66 wait for their turn."""
    spec = next(spec for spec in GPU if spec.name == "w8a8_sm90")
    m = max(selfcheck._row_counts(spec))

    def turns(n: int, outputs: int) -> int:
        return -(-(-(-m // 256) * -(-n // outputs)) // 66)

    assert turns(selfcheck._WIDE[0], 256) > 1
    assert turns(selfcheck._WIDE[0], 256) * 4 <= turns(selfcheck._WIDE[0], 128) * 3
    assert all(turns(n, 256) * 4 > turns(n, 128) * 3 for n, _ in selfcheck._SHAPES), "the others take narrow tiles"


@pytest.mark.parametrize("spec", GPU, ids=lambda spec: spec.name)
def test_every_gpu_kernel_has_schemes_and_tokens_that_it_accepts(spec: KernelSpec, monkeypatch) -> None:
    monkeypatch.setattr(targets, "detect", lambda: targets.Machine("", (), targets.names(), {}, None))
    spec = dataclasses.replace(spec, built=True)
    for scheme in selfcheck.schemes(spec):
        for m in selfcheck._row_counts(spec):
            for dtype in set(selfcheck._DTYPES) & set(spec.act_dtypes):
                problem = Problem(scheme, m, n=72, k=1096, dtype=dtype, device="cuda", layout=spec.layout)
                assert spec.why_not(problem) is None


@pytest.mark.parametrize(
    ("m_range", "rows"),
    [
        ((1, 8), [1, 8]),
        ((1, 64), [1, 9, 17, 33, 64]),
        ((1, None), [1, 9, 17, 33, 192]),
        ((65, None), [65, 194]),
        ((512, None), [512, 641]),
        ((256, 300), [256, 300]),
    ],
)
def test_the_fewest_and_the_most_rows_are_tried(m_range, rows) -> None:
    spec = dataclasses.replace(next(spec for spec in GPU if spec.target == "sm80"), m_range=m_range)
    assert selfcheck._row_counts(spec) == rows


@pytest.mark.parametrize("family", ["w8a8", "bsw8a8"])
def test_triton_kernels_are_compared(family: str, threads) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")
    threads(1)
    spec = next(spec for spec in GPU if (spec.scheme, spec.target) == (family, "triton"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert selfcheck.disagreement(spec, device) is None


# --- what check does with the result


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes this machine one with a GPU; found[name] is what a comparison gives, an error that it raises."""
    found: dict[str, str | Exception | None] = {}
    compared: list[str] = []

    def disagreement(spec: KernelSpec, device: str) -> str | None:
        compared.append(spec.name)
        result = found.get(spec.name)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(targets, "detect", lambda: targets.Machine("", (), targets.names(), {}, None))
    built = tuple(dataclasses.replace(spec, built=True) for spec in specs())
    monkeypatch.setattr(selection, "specs", lambda: built)
    monkeypatch.setattr(selfcheck, "disagreement", disagreement)
    monkeypatch.setattr(selfcheck, "_compared", set())
    monkeypatch.setattr(selfcheck, "_not_before", {})
    selection.plan_for.cache_clear()
    yield SimpleNamespace(found=found, compared=compared)
    DISTRUSTED.clear()
    selection.plan_for.cache_clear()


W4A16 = Problem(Scheme.parse("w4a16"), m=1, n=8, k=8, dtype=torch.bfloat16, device="cuda")


def test_a_kernel_is_compared_once_and_alone(on_gpu) -> None:
    for _ in range(3):
        assert selection.select(W4A16).name == "w4a16_sm80_gemv"
    assert on_gpu.compared == ["w4a16_sm80_gemv"]


def test_what_disagrees_is_said_and_left_out(on_gpu) -> None:
    on_gpu.found["w4a16_sm80_gemv"] = "it is wrong"
    with pytest.warns(RuntimeWarning, match="w4a16_sm80_gemv is not used: it is wrong"):
        assert selection.select(W4A16).name == "w4a16_sm80"
    assert set(DISTRUSTED) == {"w4a16_sm80_gemv"}
    explained = selection.explain(W4A16)
    assert (explained.kernel, explained.rejected["w4a16_sm80_gemv"]) == ("w4a16_sm80", "it is wrong")
    assert on_gpu.compared == ["w4a16_sm80_gemv", "w4a16_sm80"]


def test_a_triton_kernel_that_cannot_run_leaves_the_reference(on_gpu) -> None:
    on_gpu.found["w8a8_triton"] = "ptxas: cp.async requires sm_80"
    problem = dataclasses.replace(W4A16, scheme=Scheme.parse("w8a8"))
    while "triton" in (chosen := selection.explain(problem).kernel or "") or "sm" in chosen:
        on_gpu.found[chosen] = "no"
        with pytest.warns(RuntimeWarning, match="is not used"):
            selection.select(problem)
    assert selection.select(problem).name == "w8a8_reference"


def test_explaining_runs_nothing(on_gpu) -> None:
    text = " ".join(str(selection.explain(W4A16)).split())
    assert "runs: w4a16_sm80_gemv, which" in text
    assert "compared with the reference before it is first used here" in text
    assert on_gpu.compared == []
    selection.select(W4A16)
    assert "compared" not in str(selection.explain(W4A16))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_memory_that_is_full_says_nothing_about_a_kernel(on_gpu, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(selfcheck, "monotonic", clock)
    on_gpu.found["w4a16_sm80_gemv"] = selfcheck.CheckLaterError("CUDA out of memory")
    ran, plan = plan_that_notes(monkeypatch)
    with pytest.warns(RuntimeWarning, match="used before it was compared with the reference.*CUDA out of memory"):
        plan(torch.empty(1, 8), None, None, None)
    assert not DISTRUSTED
    plan(torch.empty(1, 8), None, None, None)  # at once: not tried again, and not said again
    assert on_gpu.compared == ["w4a16_sm80_gemv"]
    clock.now += 60
    on_gpu.found["w4a16_sm80_gemv"] = "it is wrong"
    with pytest.warns(RuntimeWarning, match="is not used"):
        plan(torch.empty(1, 8), None, None, None)
    assert ran == ["w4a16_sm80_gemv", "w4a16_sm80_gemv", "w4a16_sm80"]


@pytest.fixture
def plug_in(monkeypatch):
    """plug_in(spec) makes a kernel the one that a plug-in adds, after all others."""

    def install(spec: KernelSpec) -> None:
        entry = EntryPoint("mine", "toy_rows:ROW", "nybble.kernels")
        monkeypatch.setitem(sys.modules, "toy_rows", SimpleNamespace(ROW=spec))
        monkeypatch.setattr(plugins, "_entry_points", lambda: {entry.group: [entry]})
        forget()

    def forget() -> None:
        for cached in (all_specs, plugins._load, selection.plan_for):
            cached.cache_clear()

    monkeypatch.setattr(selfcheck, "_compared", set())
    yield install
    monkeypatch.undo()
    DISTRUSTED.clear()
    forget()


def toy(family: str, calls: list[int], spoil=lambda out: None) -> KernelSpec:
    """A kernel for the fastest target of a CPU that computes as the reference; spoil changes its output."""
    right = spec_on_cpu(family)

    def make(*shape):
        plan = right.make(*shape)

        def call(x, packed, bias, out):
            calls.append(x.numel())
            plan(x, packed, bias, out)
            spoil(out)

        return call

    return dataclasses.replace(right, name="toy", target=targets.detect().targets[-1], device="cpu", make=make)


@pytest.mark.parametrize("family", ["w8a16", "w4a8", "spw8a8", "spw4a16", "spw16a16", "bsw8a8"])
def test_a_kernel_of_a_plugin_is_compared_once_on_the_cpu(family: str, plug_in) -> None:
    calls: list[int] = []
    plug_in(toy(family, calls))
    problem = Problem(schemes_of(family)[0], m=1, n=8, k=8)
    assert (selection.explain(problem).kernel, calls) == ("toy", [])
    assert "compared with the reference before it is first used" in " ".join(str(selection.explain(problem)).split())
    assert selection.select(problem).name == "toy"
    compared = len(calls)
    assert compared > 10
    assert selection.select(problem).name == "toy"
    assert len(calls) == compared
    assert "compared" not in str(selection.explain(problem))


@pytest.mark.parametrize("device", ["cpu", None])
def test_a_wrong_kernel_of_a_plugin_is_left_out(device: str | None, plug_in) -> None:
    plug_in(dataclasses.replace(toy("w8a16", [], torch.Tensor.zero_), device=device))
    dense, x = torch.nn.Linear(40, 24), torch.randn(3, 40)
    with pytest.warns(RuntimeWarning, match="toy is not used: its bfloat16 outputs for 1 rows .* are off by 1 of"):
        layer = nybble.nn.Linear.from_dense(dense, "w8a16")
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.dequantized_weight(), dense.bias))
    explained = nybble.explain(layer)
    assert explained.kernel != "toy"
    assert "are off by 1" in explained.rejected["toy"]


def test_a_kernel_of_nybble_for_a_cpu_is_not_compared(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "_compared", set())
    assert not [spec.name for spec in specs() if spec.device != "cuda" and selfcheck.pending(spec)]


def plan_that_notes(monkeypatch):
    """A plan whose kernels only take down their names."""
    ran: list[str] = []

    def naming(name: str):
        return lambda *shape: lambda *tensors: ran.append(name)

    made = tuple(dataclasses.replace(spec, make=naming(spec.name)) for spec in selection.specs())
    monkeypatch.setattr(selection, "specs", lambda: made)
    return ran, selection.plan_for("w4a16", "frag4", 8, 8, torch.bfloat16, "cuda")


def test_nothing_is_compared_while_a_graph_is_captured(on_gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu.found["w4a16_sm80_gemv"] = "it is wrong"
    ran, plan = plan_that_notes(monkeypatch)
    plan(torch.empty(1, 8), None, None, None)
    assert (ran, on_gpu.compared) == (["w4a16_sm80_gemv"], [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(RuntimeWarning, match="is not used"):
        plan(torch.empty(1, 8), None, None, None)
    assert ran == ["w4a16_sm80_gemv", "w4a16_sm80"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("w4a16_sm80: out of memory"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ],
    ids=["torch", "extension", "capture"],
)
def test_what_passes_is_no_disagreement(error: Exception) -> None:
    def make(*shape):
        raise error

    with pytest.raises(selfcheck.CheckLaterError, match=re.escape(str(error))):
        selfcheck.disagreement(dataclasses.replace(spec_on_cpu("w4a16"), make=make), "cpu")


def test_the_default_device_and_dtype_of_the_caller_do_not_matter(monkeypatch) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert selfcheck.disagreement(spec_on_cpu("w8a16"), "cpu") is None
    finally:
        torch.set_default_dtype(before)
