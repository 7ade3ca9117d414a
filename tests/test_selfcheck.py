"""A kernel that is wrong on this machine is found out, said and left out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nybble import selfcheck, targets
from nybble.registry import DISTRUSTED, KernelSpec, Problem, specs
from nybble.scheme import Scheme

DENSE = ("w8a8", "w8a16", "w4a8", "w4a16")


def spec_on_cpu(family: str) -> KernelSpec:
    """The reference, as if it read a layout that is packed in torch."""
    return next(spec for spec in specs() if spec.name == f"{family}_reference")


@pytest.mark.parametrize("family", DENSE)
def test_a_right_kernel_is_trusted(family: str) -> None:
    assert selfcheck.disagreement(spec_on_cpu(family), "cpu") is None


@pytest.mark.parametrize("wrong_m", [1, 65])
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
    assert reason.startswith(f"its outputs for {wrong_m} tokens are off by")


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


def test_what_disagrees_is_said_and_left_out(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "disagreement", lambda spec, device: "it is wrong" if "gemv" in spec.name else None)
    built = tuple(dataclasses.replace(spec, built=True) for spec in specs() if spec.target == "sm80")
    monkeypatch.setattr(selfcheck, "specs", lambda: built)
    selfcheck.check_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning) as caught:
            selfcheck.check_once()
        assert "nybble: w4a16_sm80_gemv is not used on this GPU: it is wrong" in [str(one.message) for one in caught]
        assert set(DISTRUSTED) == {spec.name for spec in built if "gemv" in spec.name} > {"w8a16_sm80_gemv"}
        monkeypatch.setattr(targets, "detect", lambda: targets.Machine("", (), targets.NAMES, {}, None))
        spec = next(spec for spec in built if spec.name == "w4a16_sm80_gemv")

        problem = Problem(Scheme.parse("w4a16"), m=1, n=8, k=8, dtype=torch.bfloat16, device="cuda")
        assert spec.why_not(problem) == "it is wrong"
    finally:
        DISTRUSTED.clear()
        selfcheck.check_once.cache_clear()
