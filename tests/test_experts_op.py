"""The op nybble::experts against the layers that it is made of, called one by one: the same bits, but for the sum."""

import pytest
import torch

import nybble
from nybble import rows
from nybble.experts import Experts, Gate, Side, between, experts

SILU = Gate("silu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def layers(count, out_features, in_features, scheme, bias=False, seed=0):
    torch.manual_seed(seed)
    made = [torch.nn.Linear(in_features, out_features, bias=bias) for _ in range(count)]
    found = [nybble.nn.Linear.from_dense(one, scheme) for one in made]
    for one in found:
        one.pack()
    return found


def side(made):
    first = made[0]
    return Side(
        [one.packed for one in made],
        [None if one.bias is None else one.bias.detach() for one in made],
        str(first.scheme),
        first.layout,
        first.out_features,
        first.in_features,
    )


def gated(gate, x):
    """As between, by the kernel that the op has for it: another rounding of exp may change a code of the next layer."""
    if not gate.gated:
        return rows.activate(x, None, gate.act)
    first, up = (x[..., ::2], x[..., 1::2]) if gate.interleaved else x.chunk(2, -1)
    if gate.limit:
        first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit) + gate.other_offset
    return rows.activate(first.contiguous(), up.contiguous(), gate.act)


@torch.no_grad()
def expected(x, index, weight, ups, downs, gate):
    """Each token's experts by their layers; the sum in float32, in order."""
    out = torch.zeros(len(x), downs[0].out_features)
    for expert in range(len(ups)):
        token, place = torch.where(index == expert)
        if len(token):
            y = downs[expert](gated(gate, ups[expert](x[token])))
            for row, t, j in zip(y, token.tolist(), place.tolist(), strict=True):
                out[t] += weight[t, j].float() * row.float()
    return out


def routing(tokens, count, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(tokens)])
    return index, torch.rand(tokens, top_k, generator=generator)


def close(found, wanted):
    assert found.shape == wanted.shape
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[found.dtype]
    assert (found.float() - wanted).norm() <= bound * wanted.norm() + 1e-6


SHAPES = [  # experts, hidden, inner, tokens, top_k
    (8, 64, 96, 33, 2),
    (4, 70, 37, 19, 1),  # odd
    (3, 256, 128, 1, 3),  # one token
    (5, 32, 16, 2, 5),  # every expert
    (1, 48, 48, 7, 1),  # one expert
    (32, 128, 64, 130, 4),
]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32", "w4a8", "w4a16g32", "w8a16", "w8a7", "sp50w8a8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_experts(shape, scheme):
    count, hidden, inner, tokens, top_k = shape
    kind = nybble.nn.SparseLinear if scheme.startswith("sp") else nybble.nn.Linear
    torch.manual_seed(1)
    ups, downs = (
        [kind.from_dense(_thinned(torch.nn.Linear(k, n), scheme), scheme) for _ in range(count)]
        for n, k in ((2 * inner, hidden), (hidden, inner))
    )
    for one in (*ups, *downs):
        one.pack()
    index, weight = routing(tokens, count, top_k)
    x = torch.randn(tokens, hidden)
    close(experts(x, index, weight, side(ups), side(downs), SILU), expected(x, index, weight, ups, downs, SILU))


def _thinned(dense, scheme):
    if scheme.startswith("sp"):
        weight = dense.weight.detach()
        dense.weight.data = weight * (weight.abs() > weight.abs().median())
    return dense


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "gate",
    [
        Gate("silu"),
        Gate("gelu", interleaved=True),
        Gate("quick_gelu", interleaved=True, limit=1.5, other_offset=1.0),
        Gate("quick_gelu", limit=1.5),
        Gate("relu", gated=False),
        Gate(""),
    ],
    ids=str,
)
def test_gates(gate, dtype):
    if gate.act:
        sample = (torch.randn(9, 80) * 4).to(dtype)
        torch.testing.assert_close(between(gate, sample), gated(gate, sample), rtol=5e-2, atol=1e-3)
    wide = 2 if gate.gated else 1
    ups, downs = layers(6, wide * 40, 64, "w8a8", bias=True), layers(6, 64, 40, "w8a8", bias=True, seed=1)
    index, weight = routing(23, 6, 2)
    x = (torch.randn(23, 64) * 4).to(dtype)
    weight = weight.to(dtype)
    close(experts(x, index, weight, side(ups), side(downs), gate), expected(x, index, weight, ups, downs, gate))


@pytest.mark.parametrize("scheme", ["w4a8g32", "w4a16g32"])
def test_any_number_of_threads_gives_the_same_bits(scheme):
    ups, downs = layers(8, 512, 256, scheme), layers(8, 256, 256, scheme, seed=1)
    for tokens in (1, 3, 200):
        index, weight = routing(tokens, 8, 2)
        x, found = torch.randn(tokens, 256), []
        before = torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(experts(x, index, weight, side(ups), side(downs), SILU))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_all_tokens_to_one_expert_and_none_to_others():
    ups, downs = layers(4, 128, 64, "w4a8g32"), layers(4, 64, 64, "w4a8g32", seed=1)
    x, weight = torch.randn(90, 64), torch.rand(90, 1)
    index = torch.full((90, 1), 2)
    close(experts(x, index, weight, side(ups), side(downs), SILU), expected(x, index, weight, ups, downs, SILU))


def test_batches_do_not_change_a_bit():
    ups, downs = layers(4, 64, 32, "w8a8"), layers(4, 32, 32, "w8a8", seed=1)
    index, weight = routing(2500, 4, 2)  # more pairs than a batch has
    x = torch.randn(2500, 32)
    layer = Experts(side(ups), side(downs), SILU)
    whole = layer(x, index, weight)
    parts = torch.cat([layer(x[i : i + 700], index[i : i + 700], weight[i : i + 700]) for i in range(0, 2500, 700)])
    assert torch.equal(whole, parts)


def test_the_index_after_the_last_stands_for_no_expert():
    ups, downs = layers(4, 64, 32, "w8a8"), layers(4, 32, 32, "w8a8", seed=1)
    x, weight = torch.randn(3, 32), torch.rand(3, 2)
    index = torch.tensor([[0, 4], [4, 4], [1, 2]])
    found = experts(x, index, weight, side(ups), side(downs), SILU)
    close(found, expected(x, index, weight, ups, downs, SILU))
    assert not found[1].any()


def test_empty_and_strided_inputs():
    ups, downs = layers(4, 64, 32, "w8a8"), layers(4, 32, 32, "w8a8", seed=1)
    layer = Experts(side(ups), side(downs), SILU)
    assert layer(torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2)).shape == (0, 32)
    index, weight = routing(6, 4, 2)
    x = torch.randn(32, 6)
    wide = torch.randn(6, 80)
    for given in (x.t(), wide[:, 3:35], torch.randn(1, 32).expand(6, 32)):
        close(layer(given, index.int(), weight.double()), expected(given, index, weight, ups, downs, SILU))
    shuffled = index.t().contiguous().t()
    assert torch.equal(layer(x.t(), shuffled, weight), layer(x.t(), index, weight))


def test_nan_stays_in_its_token():
    ups, downs = layers(4, 64, 32, "w8a8"), layers(4, 32, 32, "w8a8", seed=1)
    index, weight = routing(6, 4, 2)
    x = torch.randn(6, 32)
    x[2, 5] = float("nan")
    found = experts(x, index, weight, side(ups), side(downs), SILU)
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype):
    ups, downs = layers(3, 64, 32, "w8a8", bias=True), layers(3, 32, 32, "w4a8g32", seed=1)
    index, weight = routing(5, 3, 2)
    arguments = (torch.randn(5, 32).to(dtype), index, weight, *side(ups), *side(downs), *SILU)
    assert set(torch.library.opcheck(torch.ops.nybble.experts.default, arguments).values()) == {"SUCCESS"}


def test_gradients_are_refused():
    ups, downs = layers(3, 64, 32, "w8a8"), layers(3, 32, 32, "w8a8", seed=1)
    index, weight = routing(5, 3, 2)
    out = experts(torch.randn(5, 32, requires_grad=True), index, weight, side(ups), side(downs), SILU)
    with pytest.raises(NotImplementedError, match="one by one"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(5, 31)}, r"x: \(5, 31\) torch.float32 on cpu, must be \(T, 32\)"),
        ({"x": torch.randn(5, 32).double()}, r"x: \(5, 32\) torch.float64"),
        ({"index": torch.zeros(5, 2)}, r"index: \(5, 2\) torch.float32 on cpu, must be \(5, top_k\) integers"),
        ({"index": torch.zeros(4, 2, dtype=torch.long)}, r"index: \(4, 2\)"),
        ({"index": torch.full((5, 2), 4)}, r"index: has the expert 4, must be in \[0, 3\]"),
        ({"index": torch.full((5, 2), -1)}, r"index: has the expert -1"),
        ({"weight": torch.zeros(5, 1)}, r"weight: \(5, 1\) torch.float32 on cpu, must be \(5, 2\)"),
        ({"gate": Gate("sine")}, 'act="sine": must be one of'),
        ({"gate": Gate("silu", gated=False)}, "up: has 64 outputs, must have 32"),
        ({"gate": Gate("silu", limit=-1.0)}, "limit, other_offset: must be finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,  # no random numbers in names
)
def test_bad_arguments_are_named(changed, message):
    ups, downs = layers(3, 64, 32, "w8a8"), layers(3, 32, 32, "w8a8", seed=1)
    index, weight = routing(5, 3, 2)
    given = {"x": torch.randn(5, 32), "index": index, "weight": weight, "gate": SILU, **changed}
    with pytest.raises(ValueError, match=message):
        experts(given["x"], given["index"], given["weight"], side(ups), side(downs), given["gate"])


def test_short_packed_weights_and_static_activations_are_refused():
    ups, downs = layers(3, 64, 32, "w8a8"), layers(3, 32, 32, "w8a8", seed=1)
    index, weight = routing(5, 3, 2)
    up = side(ups)
    cut = up._replace(packed=[*up.packed[:2], up.packed[2][:-64].clone()])
    with pytest.raises(ValueError, match="packed: has"):
        experts(torch.randn(5, 32), index, weight, cut, side(downs), SILU)
    with pytest.raises(ValueError, match="static activations"):
        experts(torch.randn(5, 32), index, weight, up._replace(scheme="w8a8static"), side(downs), SILU)
