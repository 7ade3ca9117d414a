"""Weights whose codes index a table (NF4 and its kin): the table, rounding, damage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nybble.dispatch import reference
from nybble.dispatch.registry import specs
from nybble.dispatch.spec import FLOATS, Problem
from nybble.nn import Linear
from nybble.testing.oracle import random_weight, run
from nybble.weights.rounding import book_of, check_portable, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme
from nybble.weights.weight_type import weight_types

NF = weight_types()["w4nf"]
SPECS = [spec for spec in specs() if spec.scheme == "w4nfa16" and spec.device != "cuda"]


def usable(spec, scheme: Scheme) -> None:
    problem = Problem(scheme, m=spec.m_range[0], n=1, k=1, dtype=spec.act_dtypes[0], layout=spec.layout)
    if (reason := spec.why_not(problem)) is not None:
        pytest.skip(f"{spec.name}: {reason}")


def test_the_table_is_that_of_nf4() -> None:
    # Each half has quantiles of the normal distribution at equal distances, scaled to 1.
    last = 0.9677083
    ends = torch.cat((torch.linspace(last, 0.5, 9)[:-1], torch.linspace(last, 0.5, 8)[:-1])).double()
    found = torch.special.ndtri(ends)
    table = torch.cat((-found[8:], torch.zeros(1), found[:8])).sort().values / found.max()
    assert torch.allclose(torch.tensor(NF.table).double(), table, atol=2e-6)
    assert NF.table[NF.middle] == 0.0


def test_rounding_takes_the_nearest_value() -> None:
    scheme = Scheme.parse("w4nfa16g32")
    weight = torch.randn(17, 200)
    weight[3, :64] = 0
    quantized = quantize_weight(weight, scheme)
    check_portable(quantized, scheme, 17, 200)
    assert torch.equal(quantized.book, book_of(scheme))
    table = torch.tensor(NF.table)
    for group in range(7):
        part = weight[:, group * 32 : group * 32 + 32]
        assert torch.equal(quantized.scale[:, group], part.abs().amax(-1).to(quantized.scale.dtype))
        units = part / quantized.scale[:, group, None].float().clamp(min=1e-30)
        best = (units[..., None] - table).abs().amin(-1)
        codes = NF.unpack(quantized.qweight, 200)[:, group * 32 : group * 32 + 32]
        assert torch.allclose((units - table[codes.long()]).abs(), best, atol=1e-6)
    assert not dequantize_weight(quantized, scheme, 200)[3, :64].any()
    errors = [
        (dequantize_weight(quantize_weight(weight, parsed, method), parsed, 200) - weight).norm()
        for parsed, method in ((scheme, "rtn"), (scheme, "mse"), (Scheme.parse("w4a16g32"), "rtn"))
    ]
    assert errors[1] <= errors[0] < errors[2]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_that_bfloat16_has_not_are_at_most_rounded_to_it(spec) -> None:
    scheme = Scheme.parse("w4nfa16g64")
    usable(spec, scheme)
    weight, x = torch.randn(40, 512), torch.randn(9, 512).to(spec.act_dtypes[0])
    quantized = quantize_weight(weight, scheme)
    right = reference.linear(x, quantized, None, scheme, torch.float64)
    size = x.double().abs() @ dequantize_weight(quantized, scheme, 512).double().abs().t()
    share = 2.0**-9 if spec.act_dtypes == (torch.bfloat16,) else 2.0**-20
    rounding = right.abs() * (2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-23)
    assert ((run(spec, quantized, scheme, x).double() - right).abs() <= size * share + rounding).all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_same_bits_for_any_number_of_threads(spec) -> None:
    scheme, before = Scheme.parse("w4nfa16g64"), torch.get_num_threads()
    usable(spec, scheme)
    quantized, bias = random_weight(scheme, 333, 520), torch.randn(333)
    for m in (1, 7, 70):
        x, found = torch.randn(m, 520).to(spec.act_dtypes[0]), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(spec, quantized, scheme, x, bias))
        torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_dtypes_leave_the_table() -> None:
    layer = Linear.from_dense(nn.Linear(64, 8), "w4nfa16g32")
    book = layer.book.clone()
    for dtype in FLOATS:
        layer.unpack()
        layer.to(dtype)
        assert torch.equal(layer.book, book)
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert Linear(64, 8, scheme="w4nfa16g32", device="meta").book.is_meta


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -(2.0**21)])
def test_damaged_tables_are_refused_by_name(value: float) -> None:
    layer = Linear.from_dense(nn.Linear(64, 8), "w4nfa16g32")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="book: must be finite, and at most"):
        layer.load_state_dict({**state, "book": state["book"].index_fill(0, torch.tensor([2]), value)})
    with pytest.raises(RuntimeError, match=r"book: \(15,\)"):
        layer.load_state_dict({**state, "book": state["book"][1:]})
