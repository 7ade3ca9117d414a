"""Embedding and EmbeddingBag: against the oracle bit for bit, from rows and from the tiles of a Linear."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nybble
from nybble import lookup
from nybble.checkpoint.files import CheckpointError
from nybble.dispatch.reference import EmbeddingReference
from nybble.dispatch.targets import detect
from nybble.native import LOOKUP_LAYOUTS, Lookup
from nybble.nn import Embedding, EmbeddingBag, Linear
from nybble.ops import pack_as
from nybble.weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

SCHEMES = ("w8a16", "w8a16g32", "w8a16g16asym", "w4a16", "w4a16g32", "w4a16g128asym")
# One row, one column, odd columns, groups that do not divide them, and more than the kernel reads at a time.
SHAPES = ((1, 1), (5, 3), (33, 7), (17, 333), (20, 600))
KERNELS = [
    name
    for name in ("rows_scalar", "rows_avx2", "rows_avx512bw", "rows_neon")
    if name.split("_")[1] in detect().targets
]


def table(scheme, n, k, layout, seed=0):
    """A packed weight and its values."""
    torch.manual_seed(seed)
    quantized = quantize_weight(torch.randn(n, k), scheme)
    return pack_as(quantized, layout, scheme, k), dequantize_weight(quantized, scheme, k)


def layouts_of(scheme):
    tiled = ("n16k8", "n16k16n")
    if scheme.weight_bits == 8:
        tiled = ("n16k4", "n16k16") if scheme.group_size is None and scheme.symmetric else ("n16k4g", "n16k16g")
    return [name for name in LOOKUP_LAYOUTS if name in ("plain", *tiled)]


def bags_of(weight, ids, start, weights, mode, left_out):
    """The definition: in float32, in the order of the ids."""
    out = torch.zeros(len(start) - 1, weight.shape[1])
    for bag in range(len(out)):
        rows = []
        for i in range(int(start[bag]), int(start[bag + 1])):
            if int(ids[i]) != left_out:
                rows.append(weight[ids[i]] * (1 if weights is None else weights[i]))
        if rows:
            total = rows[0]
            for row in rows[1:]:
                total = torch.maximum(total, row) if mode == "max" else total + row
            out[bag] = total / len(rows) if mode == "mean" else total
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", SHAPES)
def test_rows(kernel, name, size):
    scheme, (n, k) = Scheme.parse(name), size
    for layout in layouts_of(scheme):
        packed, weight = table(scheme, n, k, layout)
        read = Lookup(kernel, scheme, n, k, layout)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for ids in (torch.randint(n, (11,)), torch.randint(n, (2, 3), dtype=torch.int32), torch.empty(0).long()):
                out = torch.full((*ids.shape, k), 7.0, dtype=dtype)
                read(packed, ids, out)
                assert torch.equal(out, F.embedding(ids, weight).to(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("mode", lookup.MODES)
def test_bags(kernel, name, mode):
    scheme, n, k = Scheme.parse(name), 23, 301
    ids, start = torch.randint(n, (14,)), torch.tensor([0, 0, 4, 5, 5, 13])
    for layout in layouts_of(scheme):
        packed, weight = table(scheme, n, k, layout)
        read = Lookup(kernel, scheme, n, k, layout)
        for weights in (None, torch.randn(14)) if mode == "sum" else (None,):
            for left_out in (-1, int(ids[4]), int(ids[7])):
                wanted = bags_of(weight, ids, start, weights, mode, left_out)
                for dtype, kind in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32)):
                    out = torch.full((5, k), 7.0, dtype=dtype)
                    read.bags(packed, ids.to(kind), start, weights, out, mode, left_out)
                    assert torch.equal(out, wanted.to(dtype))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("w4a16g32", "plain"),
        ("w4a16g32", "n16k8"),
        ("w4a16asym", "n16k8"),
        ("w4a16asym", "n16k16n"),
        ("w8a16", "n16k4"),
        ("w8a16", "n16k16"),
        ("w8a16g32asym", "n16k4g"),
        ("w8a16asym", "n16k4g"),
        ("w8a16g32asym", "n16k16g"),
        ("w4nfa16g32", "plain"),
        ("w4nfa16g32", "n16k8"),
        ("w4nfa16", "n16k8"),
    ],
)
def test_reference_agrees(name, layout):
    scheme = Scheme.parse(name)
    packed, weight = table(scheme, 23, 50, layout)
    read, ids, out = EmbeddingReference(scheme, 23, 50, layout), torch.randint(23, (2, 7)), torch.empty(2, 7, 50)
    read(packed, ids, out)
    assert torch.equal(out, F.embedding(ids, weight))
    start, bags = torch.tensor([0, 3, 3, 14]), torch.empty(3, 50)
    for mode in lookup.MODES:
        read.bags(packed, ids.flatten(), start, None, bags, mode, 4)
        torch.testing.assert_close(bags, bags_of(weight, ids.flatten(), start, None, mode, 4))
    with pytest.raises(IndexError, match=r"23 \(item 1\)"):
        read(packed, torch.tensor([0, 23]), out)


def test_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    layer, bag = Embedding.from_dense(nn.Embedding(500, 384)), EmbeddingBag.from_dense(nn.EmbeddingBag(500, 384))
    ids = torch.randint(500, (16, 100))
    found, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append((layer(ids), bag(ids)))
    torch.set_num_threads(before)
    for rows, bags in found[1:]:
        assert torch.equal(rows, found[0][0])
        assert torch.equal(bags, found[0][1])


@pytest.mark.parametrize("bad", [-1, 500, 2**40, -(2**63)])
@pytest.mark.parametrize("place", [0, 777, 1599])
def test_a_bad_id_is_named_and_never_read(bad, place):
    layer, bag = Embedding.from_dense(nn.Embedding(500, 384)), EmbeddingBag.from_dense(nn.EmbeddingBag(500, 384))
    ids = torch.randint(500, (1600,))
    ids[place] = bad
    for call in (lambda: layer(ids), lambda: bag(ids.view(16, 100))):
        with pytest.raises(IndexError, match=rf"ids: {bad} \(item {place}\) is not in \[0, 500\)"):
            call()


def test_the_first_bad_id_is_named():
    layer = Embedding(5, 300)
    with pytest.raises(IndexError, match=r"9 \(item 3\)"):
        layer(torch.tensor([0, 1, 2, 9, 8] * 4000))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="scheme='w8a8': Embedding has no activations to quantize; use 'w8a16'"):
        Embedding(5, 4, scheme="w8a8")
    with pytest.raises(ValueError, match=r"padding_idx=5: must be in \[-5, 5\)"):
        Embedding(5, 4, 5)
    with pytest.raises(ValueError, match="mode='min'"):
        EmbeddingBag(5, 4, mode="min")
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        Embedding.from_dense(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Embedding, got Linear"):
        Embedding.from_dense(nn.Linear(5, 4))
    bag = EmbeddingBag(5, 4, mode="sum")
    ids = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"offsets\[1\]=7: must be at least 0 and at most the number of ids, 6"):
        bag(ids, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"offsets\[2\]=1: must be at least 3"):
        bag(ids, torch.tensor([0, 3, 1]))
    with pytest.raises(ValueError, match="per_sample_weights: shape"):
        bag(ids, torch.tensor([0]), torch.ones(5))
    with pytest.raises(ValueError, match="only 'sum' takes them"):
        EmbeddingBag(5, 4)(ids, torch.tensor([0]), torch.ones(6))
    with pytest.raises(ValueError, match="has 64 bytes, needs"):
        lookup.embedding(ids, torch.zeros(64, dtype=torch.uint8), "w8a16", "plain", 50, 4, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 3])
def test_gradients_of_the_weights_of_samples(padding, dtype):
    torch.manual_seed(0)
    bag = EmbeddingBag.from_dense(nn.EmbeddingBag(9, 37, mode="sum", padding_idx=padding, include_last_offset=True))
    dense, ids, offsets = bag.dequantize(), torch.randint(9, (14,)), torch.tensor([2, 2, 5, 9, 9, 12])
    weights, into = torch.randn(14).to(dtype), torch.randn(5, 37)
    found, wanted = (weights.clone().requires_grad_() for _ in range(2))
    bag(ids, offsets, found).backward(into)
    with pytest.raises(RuntimeError):  # torch's own begins with the first id
        dense(ids, offsets, wanted.float())
    inner = ids[2:12], offsets - 2
    dense(*inner, wanted[2:12].float()).backward(into)
    assert found.grad.dtype is dtype
    torch.testing.assert_close(found.grad, wanted.grad)
    bag.to(torch.bfloat16)
    (none,) = torch.autograd.grad(bag(ids, offsets[:1], found).sum(), found)
    assert not none.any()


@pytest.mark.parametrize("mode", lookup.MODES)
@pytest.mark.parametrize("last", [False, True])
def test_bag_is_a_drop_in(mode, last):
    torch.manual_seed(0)
    dense = nn.EmbeddingBag(20, 8, mode=mode, include_last_offset=last, padding_idx=-3)
    layer = EmbeddingBag.from_dense(dense)
    assert layer.padding_idx == 17
    rounded = layer.dequantize()
    ids, offsets = torch.randint(20, (9,)), torch.tensor([0, 2, 2, 9])
    torch.testing.assert_close(layer(ids, offsets), rounded(ids, offsets))
    rounded.include_last_offset = False  # in a matrix each row is a bag; with it, torch 2.8 drops the last one
    torch.testing.assert_close(layer(ids.view(3, 3).int()), rounded(ids.view(3, 3)))


def test_ops():
    scheme = Scheme.parse("w4a16g32")
    packed, _ = table(scheme, 9, 40, "n16k8")
    ids, start = torch.randint(9, (2, 3)), torch.tensor([0, 2, 6])
    held = packed, "w4a16g32", "n16k8", 9, 40, torch.float32
    torch.library.opcheck(torch.ops.nybble.embedding.default, (ids, *held))
    torch.library.opcheck(
        torch.ops.nybble.embedding_bag.default, (ids.flatten(), start, torch.rand(6), *held, "sum", 2)
    )


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, n=200, k=64):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(n, k), nn.Linear(k, k), nn.Linear(k, n, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.inner(x))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32", "w4a16g32asym", "w8a8static", "w4nfa16g32"])
def test_tied_head_shares_the_codes(scheme, tmp_path):
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(200, (2, 9))
    batches = [ids] * 4 if "static" in scheme else None
    report = nybble.quantize(model, scheme, goal="memory", calibration=batches)
    embed, head = model.embed, model.head
    assert {row.name: row.tied_to for row in report.layers} == {"embed": "head", "inner": None, "head": None}
    assert str(head.scheme) == scheme
    assert not embed.scheme.act_type.quantized
    assert report.coverage == 100.0
    assert embed.weight_id == head.weight_id
    assert torch.equal(embed(ids), F.embedding(ids, head.dequantize().weight))
    wanted = model(ids)
    for other in (copy.deepcopy(model), _saved(model, tmp_path)):
        assert other.embed.weight_id == other.head.weight_id != head.weight_id
        assert torch.equal(other(ids), wanted)
    before = head.weight_id
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert embed.weight_id == head.weight_id == before
    assert torch.equal(model(ids), wanted)


def _saved(model, directory):
    nybble.save(model, directory / "saved")
    stored = sum(path.stat().st_size for path in (directory / "saved").iterdir())
    codes = model.head.nbytes + model.inner.nbytes
    assert stored < codes + 4096, "the shared codes are stored once"
    with torch.device("meta"):
        fresh = Tied().eval()
    nybble.load(fresh, directory / "saved")
    return fresh


def test_tied_both_ways():
    torch.manual_seed(0)
    model = Tied()
    model.embed, model.head = model.head, model.embed  # the head comes first
    report = nybble.quantize(nn.ModuleDict({"a": model.embed, "b": model.head}), "w8a8", goal="memory")
    assert [row.tied_to for row in report.layers] == [None, "a"]
    linear, rows = Linear(8, 40), Embedding(40, 8)
    rows.tie_to(linear)
    other = Embedding(40, 8)
    other.tie_to(rows)
    assert other.weight_id == linear.weight_id
    with pytest.raises(ValueError, match="does not read; tie that module to this one"):
        Linear(8, 40, scheme="w8a16").tie_to(Embedding(40, 8))
    with pytest.raises(ValueError, match="other: is w8a8"):
        Embedding(40, 8, scheme="w4a16").tie_to(linear)


def test_excluded_embedding_keeps_its_head():
    model = Tied()
    report = nybble.quantize(model, "w8a8", goal="memory", exclude="embed")
    assert type(model.head) is nn.Linear
    assert "shares its weight with embed.weight" in {row.name: row.reason for row in report.layers}["head"]


def test_pruning_leaves_tables():
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32))
    report = nybble.sparsify(model, "2:4", method="magnitude", goal="memory", strict=True)
    assert type(model[0]) is nn.Embedding
    assert report.layers[0].reason == "nybble has no sparse Embedding"


def test_options_that_train_stay_dense():
    model = nn.Sequential(nn.Embedding(16, 32, sparse=True), nn.Embedding(16, 32, scale_grad_by_freq=True))
    report = nybble.quantize(model, "w8a8", goal="memory")
    assert [row.reason.split(",")[0] for row in report.layers] == ["has sparse=True", "has scale_grad_by_freq=True"]


def test_damaged_tie(tmp_path):
    model = Tied()
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.save(model, tmp_path)
    index = tmp_path / "nybble.json"
    index.write_text(index.read_text().replace('"scheme": "w8a16"', '"scheme": "w4a16"'))
    with pytest.raises(CheckpointError, match="scheme differs from that of"):
        nybble.load(Tied(), tmp_path)


def test_dtype_of_the_codes_is_kept():
    layer = Embedding.from_dense(nn.Embedding(8, 4)).to(torch.bfloat16)
    assert layer(torch.tensor([1])).dtype is torch.bfloat16
    assert isinstance(layer.quantized(), QuantizedWeight)
