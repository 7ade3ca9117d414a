"""What CudaPlan hands to a CUDA kernel, with an extension that only takes notes."""

from __future__ import annotations

import ctypes
import dataclasses
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nybble import layouts
from nybble.dispatch import native_cuda, registry, selection, selfcheck, targets
from nybble.native import DTYPES
from nybble.testing.oracle import random_weight
from nybble.weights.scheme import Scheme

# As in _cuda.pyi, where each address is followed by the bytes there.
NAMES = ("x", "x_dtype", "m", "ldx", "packed", "bias", "bias_dtype", "y", "y_dtype", "scratch", "stream")
MEMORY = {"x", "packed", "bias", "y", "scratch"}


class Notes:
    """Stands for _cuda.Plan."""

    made: ClassVar[list[Notes]] = []

    def __init__(self, **shape):
        self.shape, self.calls = shape, []
        Notes.made.append(self)

    def scratch(self, m):
        return 32 * m

    def run(self, *arguments):
        each = iter(arguments)
        made = {name: (next(each), next(each)) if name in MEMORY else next(each) for name in NAMES}
        assert next(each, None) is None
        self.calls.append(made)


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    monkeypatch.setattr(native_cuda, "_extension", lambda: SimpleNamespace(Plan=Notes))
    monkeypatch.setattr(native_cuda, "stream_of", lambda device: 77)
    monkeypatch.setattr(Notes, "made", [])


def call(name: str, layout: str, n: int, k: int, x: torch.Tensor, bias: torch.Tensor | None = None):
    scheme = Scheme.parse(name)
    packed = layouts.pack(random_weight(scheme, n, k), layout, scheme, k)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    native_cuda.CudaPlan("a kernel", layout, scheme, n, k)(x, packed, bias, out)
    (plan,) = Notes.made
    (made,) = plan.calls
    return plan.shape, made, packed, out


@pytest.mark.parametrize(("name", "shift"), [("w4a16", 31), ("w4a16g32asym", 5), ("w4a16g64", 6), ("w4a8g128asym", 7)])
def test_the_sections_and_the_groups(name: str, shift: int) -> None:
    shape, made, packed, out = call(name, "frag4", 70, 200, torch.randn(3, 200, dtype=torch.bfloat16))
    scheme = Scheme.parse(name)
    assert (shape["n"], shape["k"], shape["n_padded"]) == (70, 200, 128)
    assert shape["k_padded"] == layouts.padded_in_features("frag4", scheme, 200)
    assert shape["group_shift"] == shift
    views = layouts.views(packed, "frag4", scheme, 70, 200)
    places = dict(zip(("codes", "scale", "zero_point", "weight_sum"), shape["offsets"], strict=False))
    for part, view in views.items():
        assert places[part] == view.data_ptr() - packed.data_ptr()
    assert (places["zero_point"] == -1) == scheme.symmetric
    assert shape["offsets"][-1] == packed.numel()
    assert made["packed"] == (packed.data_ptr(), packed.numel())
    assert made["y"] == (out.data_ptr(), out.nbytes)
    assert (made["m"], made["stream"], made["scratch"][1]) == (3, 77, 96)


def test_eight_bits_have_scales_and_sums_of_rows() -> None:
    shape, *_ = call("w8a16", "rows8", 5, 200, torch.randn(1, 200, dtype=torch.float16))
    assert (shape["n_padded"], shape["k_padded"], shape["group_shift"]) == (64, 256, 31)
    assert shape["offsets"] == [0, 64 * 256, -1, 64 * 256 + 256, -1, 64 * 256 + 512]


@pytest.mark.parametrize(
    ("name", "layout"), [("sp24w8a16", "quads8"), ("sp24w16a16", "quads16"), ("sp24w4a16g64", "quads4")]
)
def test_two_of_four_have_places_and_no_sums(name: str, layout: str) -> None:
    shape, made, packed, _ = call(name, layout, 5, 200, torch.randn(1, 200, dtype=torch.float16))
    scheme = Scheme.parse(name)
    assert (shape["n_padded"], shape["k_padded"]) == (64, 256)
    views = layouts.views(packed, layout, scheme, 5, 200)
    places = dict(zip(("codes", "scale", "zero_point", "sums", "places"), shape["offsets"], strict=False))
    assert {part: at for part, at in places.items() if at != -1} == {
        part: view.data_ptr() - packed.data_ptr() for part, view in views.items()
    }
    assert made["packed"] == (packed.data_ptr(), packed.numel())


def test_aligned_rows_are_not_copied() -> None:
    x = torch.randn(4, 264, dtype=torch.bfloat16)[:, :200]
    _, made, *_ = call("w4a16", "frag4", 8, 200, x)
    assert made["x"][0] == x.data_ptr()
    assert (made["ldx"], made["x_dtype"]) == (264, DTYPES[torch.bfloat16])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 201, dtype=torch.bfloat16),
        torch.randn(3, 210, dtype=torch.float16)[:, :201],
        torch.randn(700, dtype=torch.bfloat16)[1:604].view(3, 201),
        torch.randn(1, 210, dtype=torch.bfloat16)[:, 3:204],
        torch.randn(3, 201),
    ],
    ids=["odd", "stride", "offset", "one", "float32"],
)
def test_rows_of_16_bits_reach_the_kernel_aligned(x: torch.Tensor, monkeypatch) -> None:
    _, made, *_ = call("w4a16", "frag4", 8, 201, x)
    address, nbytes = made["x"]
    assert address % 16 == 0
    assert made["ldx"] % 8 == 0
    assert made["ldx"] >= 201
    assert nbytes >= 2 * ((made["m"] - 1) * made["ldx"] + 201)
    assert made["x_dtype"] == DTYPES[torch.bfloat16 if x.dtype is torch.float32 else x.dtype]
    assert made["y_dtype"] == DTYPES[x.dtype]


def test_integer_activations_are_rounded_from_any_float() -> None:
    x, bias = torch.randn(2, 3, 77), torch.randn(8, dtype=torch.float16)
    _, made, *_ = call("w4a8", "frag4", 8, 77, x, bias)
    assert made["x"] == (x.data_ptr(), x.nbytes)
    assert (made["m"], made["ldx"], made["x_dtype"]) == (6, 77, DTYPES[torch.float32])
    assert made["bias"] == (bias.data_ptr(), bias.nbytes)
    assert made["bias_dtype"] == DTYPES[torch.float16]


def test_a_weight_on_another_device_is_refused() -> None:
    plan = native_cuda.CudaPlan("a kernel", "frag4", Scheme.parse("w4a16"), 8, 64)
    x, packed = torch.randn(1, 64), SimpleNamespace(get_device=lambda: 1, device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match="packed: on cuda:1, x is on cpu"):
        plan(x, packed, None, x.new_empty(1, 8))
    assert not Notes.made


def test_a_packed_weight_amid_a_buffer_reaches_the_kernel_aligned() -> None:
    """One of vectors at odd addresses would be an error that the CUDA context does not survive."""
    scheme = Scheme.parse("w4a16g64")
    packed = layouts.pack(random_weight(scheme, 70, 200), "frag4", scheme, 200)
    flat = torch.cat([torch.zeros(8, dtype=torch.uint8), packed])
    assert flat.data_ptr() % 16 == 0
    plan, x = native_cuda.CudaPlan("a kernel", "frag4", scheme, 70, 200), torch.randn(1, 200).half()
    read: list[torch.Tensor] = []

    def note(*arguments: int) -> None:
        address, size = arguments[5:7]
        assert address % 16 == 0
        read.append(torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).clone())

    plan._bind(-1)
    plan._bound[-1] = plan._bound[-1]._replace(run=note)
    with pytest.warns(
        RuntimeWarning, match=r"packed: its address 0x[0-9a-f]+8 is not a multiple of 16, so every call copies it"
    ):
        plan(x, flat[8:], None, x.new_empty(1, 70))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(x, packed, None, x.new_empty(1, 70))
    assert torch.equal(read[0], packed)
    assert torch.equal(read[1], packed)


# --- what a call costs beside the launch


def test_a_call_allocates_the_scratch_that_the_kernel_wants_and_nothing_else(monkeypatch) -> None:
    x, scheme = torch.randn(4, 256, dtype=torch.bfloat16), Scheme.parse("w4a16")
    packed = layouts.pack(random_weight(scheme, 64, 256), "frag4", scheme, 256)
    plan, out = native_cuda.CudaPlan("a kernel", "frag4", scheme, 64, 256), x.new_empty(4, 64)
    with Allocations() as made:
        plan(x, packed, None, out)
    assert made.ops == ["aten.new_empty.default"]
    monkeypatch.setattr(Notes, "scratch", lambda self, m: 0)
    plan = native_cuda.CudaPlan("a kernel", "frag4", scheme, 64, 256)
    with Allocations() as made:
        plan(x, packed, None, out)
    assert made.ops == []
    assert Notes.made[-1].calls[0]["scratch"] == (0, 0)


class Allocations(TorchDispatchMode):
    """Notes every torch op."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_captured_call_launches_on_the_captures_stream_and_waits_for_nothing(monkeypatch) -> None:
    scheme, x = Scheme.parse("w4a8"), torch.randn(4, 256)
    packed = layouts.pack(random_weight(scheme, 64, 256), "frag4", scheme, 256)
    plan, out = native_cuda.CudaPlan("a kernel", "frag4", scheme, 64, 256), x.new_empty(4, 64)
    plan(x, packed, None, out)
    monkeypatch.setattr(native_cuda, "stream_of", lambda device: 99)  # that of torch.cuda.graph
    with Allocations() as made:
        plan(x, packed, None, out)
    assert [call["stream"] for call in Notes.made[-1].calls] == [77, 99]
    assert made.ops == ["aten.new_empty.default"], "the scratch, of the graph's own pool, and no copy to the host"


def test_a_first_call_that_is_captured_compares_nothing_and_waits_for_nothing(monkeypatch) -> None:
    """From the choice of the kernel to its launch; the call after the capture compares it."""
    capturing, compared = [True], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(targets, "detect", lambda: targets.Machine("", (), targets.names(), {}, None))
    built = tuple(dataclasses.replace(spec, built=True) for spec in registry.specs())
    monkeypatch.setattr(selection, "specs", lambda: built)
    monkeypatch.setattr(selfcheck, "_compared", set())
    monkeypatch.setattr(selfcheck, "disagreement", lambda spec, device: compared.append(spec.name))
    monkeypatch.setattr(native_cuda, "stream_of", lambda device: 99 if capturing[0] else 77)
    scheme, x = Scheme.parse("w4a16"), torch.randn(4, 256, dtype=torch.bfloat16)
    packed = layouts.pack(random_weight(scheme, 64, 256), "frag4", scheme, 256)
    out = x.new_empty(4, 64)
    selection.plan_for.cache_clear()
    plan = selection.plan_for("w4a16", "frag4", 64, 256, torch.bfloat16, "cuda")
    with Allocations() as made:
        plan(x, packed, None, out)
        plan(x, packed, None, out)
    assert set(made.ops) == {"aten.new_empty.default"}
    assert compared == []
    capturing[0] = False
    plan(x, packed, None, out)
    plan(x, packed, None, out)
    assert compared == ["w4a16_sm80_gemv"]
    (bound,) = Notes.made
    assert [call["stream"] for call in bound.calls] == [99, 99, 77, 77]
    selection.plan_for.cache_clear()


def test_without_torchs_short_way_the_public_stream_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=10 + device))
    assert native_cuda._public_stream(3) == 13
