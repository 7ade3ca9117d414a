"""Rows of quantized tables as chains read them: bound to the weight until that changes, by position read once."""

import pytest
import torch
from torch import nn

from nybble.fusion.tables import Rows
from nybble.nn import Embedding


def table(seed, scheme="w8a16", rows=40):
    torch.manual_seed(seed)
    return Embedding.from_dense(nn.Embedding(rows, 37), scheme)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16g32asym"])
@torch.inference_mode()
def test_rows_are_those_of_the_module(scheme):
    embed = table(0, scheme)
    rows = Rows(embed)
    for begin, end in ((2, 9), (2, 20), (2, 5), (3, 6), (2, 20)):
        assert torch.equal(rows.by_position(begin, end), embed(torch.arange(begin, end)))
    for ids in (torch.tensor([3, 3, 1]), torch.tensor([[3], [1]], dtype=torch.int32), torch.arange(12)[::3]):
        assert torch.equal(rows.by_ids(ids), embed(ids))
    with pytest.raises(IndexError, match=r"40 .*\[0, 40\)"):
        rows.by_ids(torch.tensor([1, 40]))


@pytest.mark.parametrize("count", [40, 9])  # the rows of a small table are read once
def test_rows_of_another_weight_or_dtype(count):
    embed, other, ids = table(0, rows=count), table(1, rows=count), torch.tensor([7, 0])
    rows = Rows(embed)
    for change in (
        lambda: None,
        lambda: embed.load_state_dict(other.state_dict()),
        lambda: embed.to(torch.bfloat16),
        lambda: embed.packed.copy_(packed(2, count)),
        lambda: embed.unpack(),
    ):
        with torch.no_grad():
            change()
            assert torch.equal(rows.by_ids(ids), embed(ids))
            assert torch.equal(rows.by_position(1, 5), embed(torch.arange(1, 5)))


def test_an_id_that_is_no_row_of_a_small_table():
    with pytest.raises(IndexError):
        Rows(table(0, rows=9)).by_ids(torch.tensor([1, 9]))


def packed(seed, rows):
    embed = table(seed, rows=rows)
    embed.pack()
    return embed.packed
