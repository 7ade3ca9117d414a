"""No kernel reads or writes beside a buffer: each one in turn lies flush with a page that faults."""

from __future__ import annotations

import pytest
import torch

from nybble import layouts, native
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import KernelSpec, Problem
from nybble.native import KernelNames
from nybble.testing.guard import CANARY, guarded
from nybble.testing.oracle import expected_output, pack_for, random_weight, schemes_of, served_by
from nybble.weights.rounding import QuantizedWeight, portable_spec
from nybble.weights.scheme import Scheme

CASES = [
    pytest.param(spec, scheme, id=f"{spec.name}-{scheme}")
    for spec in specs()
    if spec.device == "cpu"
    for scheme in served_by(spec)
    if scheme.group_size in (None, 32)
]
SHAPES = [(1, 1, 1), (1, 33, 70), (7, 17, 129), (13, 31, 64), (2, 16, 4), (12, 32, 96)]


@pytest.mark.sampled(every=6, full=3)
@pytest.mark.parametrize("flush", ["left", "right"])
@pytest.mark.parametrize(
    ("spec", "scheme", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for case in CASES
        for dtype in case.values[0].act_dtypes
    ],
)
def test_kernels_stay_inside_their_buffers(spec: KernelSpec, scheme: Scheme, dtype: torch.dtype, flush: str) -> None:
    reason = spec.why_not(Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=dtype, layout=spec.layout))
    if reason is not None:
        pytest.skip(f"{spec.name}: {reason}")
    assert spec.make is not None
    for m, n, k in SHAPES:
        quantized = random_weight(scheme, n, k)
        plain = pack_for(spec, quantized, scheme, k)
        with (
            guarded((m, k), dtype, flush) as x,
            guarded((plain.numel(),), torch.uint8, flush) as packed,
            guarded((n,), dtype, flush) as bias,
            guarded((m, n), dtype, flush) as out,
        ):
            x.tensor.copy_(torch.randn(m, k))
            packed.tensor.copy_(plain)
            bias.tensor.copy_(torch.randn(n))
            inputs = [x.tensor.clone(), packed.tensor.clone(), bias.tensor.clone()]
            spec.make(scheme, n, k)(x.tensor, packed.tensor, bias.tensor, out.tensor)
            expected, bound = expected_output(spec, scheme, x.tensor, quantized, bias.tensor)
            assert ((out.tensor.double() - expected).abs() <= bound).all(), (m, n, k)
            assert all(buffer.intact() for buffer in (x, packed, bias, out)), (m, n, k)
            assert all(torch.equal(a, b) for a, b in zip(inputs, (x.tensor, packed.tensor, bias.tensor), strict=True))


@pytest.mark.parametrize("flush", ["left", "right"])
@pytest.mark.parametrize("scheme", [s for family in ("w8a8", "w4a8") for s in schemes_of(family)], ids=str)
def test_packing_stays_inside_its_buffers(scheme: Scheme, flush: str) -> None:
    for n, k in ((1, 1), (17, 129), (33, 70), (16, 128)):
        quantized = random_weight(scheme, n, k)
        layout = (
            ("n16k4g" if scheme.group_size or not scheme.symmetric else "n16k4") if "w8" in str(scheme) else "n16k8"
        )
        size = layouts.packed_nbytes(layout, scheme, n, k)
        spec = portable_spec(scheme, n, k)
        with guarded((size,), torch.uint8, flush) as packed, guarded(*spec["qweight"], flush) as qweight:
            qweight.tensor.copy_(quantized.qweight)
            shape = native.weight_shape(scheme, n, k)
            scale, zero = native.memory(quantized.scale), native.memory(quantized.zero_point)
            native._C.pack(
                shape, native.memory(qweight.tensor), scale, zero, *[(0, 0)] * 4, (packed.tensor.data_ptr(), size), 2
            )
            assert torch.equal(packed.tensor, layouts.pack(quantized, layout, scheme, k))
            assert torch.equal(native.unpack(packed.tensor, scheme, n, k, layout).qweight, quantized.qweight)
            assert packed.intact()
            assert qweight.intact()


def test_guards_notice_a_stray_write() -> None:
    with guarded((3,), torch.float32, "right") as memory:
        memory.canaries[-1] = CANARY ^ 1
        assert not memory.intact()


@pytest.mark.parametrize("name", ["x", "packed", "bias", "y"])
def test_a_buffer_that_is_too_small_is_refused(name: str) -> None:
    scheme, m, n, k = Scheme.parse("w8a8"), 2, 33, 70
    packed = native.pack(random_weight(scheme, n, k), scheme, k, "n16k4")
    tensors = {"x": torch.randn(m, k), "packed": packed, "bias": torch.randn(n), "y": torch.zeros(m, n)}
    memory = {key: native.memory(tensor) for key, tensor in tensors.items()}
    f32 = native.DTYPES[torch.float32]
    plan = native._C.LinearPlan("w8a8_scalar", "prepare_scalar", "", "", native.weight_shape(scheme, n, k), False, 255)

    def go() -> None:
        plan.run(memory["x"], f32, m, k, memory["packed"], memory["bias"], f32, memory["y"], f32, 1)

    go()
    assert tensors["y"].any()
    address, nbytes = memory[name]
    memory[name] = (address, nbytes - 1)
    with pytest.raises(ValueError, match=rf"{name}: has {nbytes - 1} bytes, needs {nbytes}"):
        go()


def test_wrong_names_and_shapes_are_refused() -> None:
    scheme = Scheme.parse("w4a8g32")
    with pytest.raises(ValueError, match=r'kernel="nonsense"'):
        native.LinearPlan(KernelNames("nonsense", "prepare_scalar", "n16k8"), scheme, 4, 32)
    with pytest.raises(ValueError, match="out_features=0"):
        native.LinearPlan(KernelNames("w4a8_scalar", "prepare_scalar", "n16k8"), scheme, 0, 32)
    plan = native.LinearPlan(KernelNames("w8a8_scalar", "prepare_scalar", "n16k8"), scheme, 4, 32)
    packed = native.pack(random_weight(scheme, 4, 32), scheme, 32, "n16k8")
    with pytest.raises(ValueError, match="does not support 4-bit weights"):
        plan(torch.zeros(1, 32), packed, None, torch.zeros(1, 4))
    short = QuantizedWeight(torch.zeros(2, 2, dtype=torch.uint8), torch.ones(4, 1, dtype=torch.bfloat16))
    shape = native.weight_shape(scheme, 4, 32)
    memory = [native.memory(tensor) for tensor in (short.qweight, short.scale, *[None] * 5, packed)]
    with pytest.raises(ValueError, match="qweight"):
        native._C.pack(shape, *memory, 1)
