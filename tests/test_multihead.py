"""nn.MultiheadAttention with quantized projections, against torch's own with the same weights."""

import pytest
import torch
from torch import nn

import nybble
from nybble.nn.multihead import MultiheadAttention


def opened(dense, scheme=None):
    """With layers that are dense but watched, or quantized."""
    new = MultiheadAttention.from_dense(dense)
    for name in new._names:
        layer = new._modules[name]
        if scheme is None:
            layer.register_forward_hook(lambda *_: None)
        else:
            new._modules[name] = nybble.nn.Linear.from_dense(layer, scheme)
    return new


def pairs(found, wanted):
    assert (found[1] is None) == (wanted[1] is None)
    return [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]


BOOL = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
CAUSAL = torch.triu(torch.full((6, 7), -torch.inf), 2)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": BOOL},
    "float padding": {"key_padding_mask": BOOL.float() * -3},
    "mask": {"attn_mask": CAUSAL},
    "bool mask and padding": {"attn_mask": CAUSAL < 0, "key_padding_mask": BOOL},
    "a mask for each head": {"attn_mask": torch.randn(8, 6, 7, generator=torch.Generator().manual_seed(0))},
    "causal": {"attn_mask": CAUSAL, "is_causal": False},
}
MODULES = {
    "plain": {},
    "without bias": {"bias": False},
    "bias and zeros": {"add_bias_kv": True, "add_zero_attn": True},
    "zeros": {"add_zero_attn": True},
    "other sizes": {"kdim": 20, "vdim": 12},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", MODULES)
def test_layers_that_are_called_compute_what_torch_does(options, masks, batch_first):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, 4, batch_first=batch_first, **MODULES[options]).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.4)
    query = torch.randn(2, 6, 16)
    key, value = torch.randn(2, 7, dense.kdim), torch.randn(2, 7, dense.vdim)
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    for more in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        wanted = dense(*given, **MASKS[masks], **more)
        for found, exact in pairs(opened(dense)(*given, **MASKS[masks], **more), wanted):
            torch.testing.assert_close(found, exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_batches_and_of_its_own_tokens(batch_first):
    dense = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    x, keys = torch.randn(6, 16), torch.randn(7, 16)
    for given in ((x, x, x), (x, keys, keys), (x, keys, keys + 1)):
        for found, exact in pairs(opened(dense)(*given), dense(*given)):
            torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-4)
    masked = {"key_padding_mask": torch.tensor([False] * 4 + [True] * 2)}
    for found, exact in pairs(opened(dense)(x, x, x, **masked), dense(x, x, x, **masked)):
        torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-4)


def test_dense_and_unwatched_it_is_torch_itself():
    dense = nn.MultiheadAttention(16, 4, kdim=20).eval()
    given = torch.randn(6, 2, 16), torch.randn(7, 2, 20), torch.randn(7, 2, 16)
    with torch.no_grad():
        for found, exact in pairs(MultiheadAttention.from_dense(dense)(*given), dense(*given)):
            assert torch.equal(found, exact)
    closed = MultiheadAttention.from_dense(dense).close()
    assert type(closed) is nn.MultiheadAttention
    assert closed.state_dict().keys() == dense.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(closed.state_dict().values(), dense.state_dict().values(), strict=True)
    )


def test_gradients_reach_the_dense_weights():
    dense = nn.MultiheadAttention(16, 4)
    new = MultiheadAttention.from_dense(dense)
    x = torch.randn(5, 2, 16)
    for module in (dense, new):
        module.zero_grad()
        module(x, x, x)[0].square().sum().backward()
        found = [parameter.grad.clone() for parameter in module.parameters()]
        if module is dense:
            wanted = found
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_causal_needs_a_mask():
    x = torch.randn(5, 2, 16)
    with pytest.raises(ValueError, match="is_causal=True"):
        opened(nn.MultiheadAttention(16, 4), "w8a8")(x, x, x, is_causal=True)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_transformer_layers(train, batch_first):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": batch_first}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **options), 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, **options), 2)
    x, y = torch.randn(3, 3, 32), torch.randn(3, 3, 32)
    padding = torch.tensor([[False, False, True], [False, False, False], [False, True, True]])
    for model, given, more in ((encoder, (x,), {"src_key_padding_mask": padding}), (decoder, (y, x), {})):
        model.train(train)
        with torch.no_grad():
            wanted = model(*given, **more)
            report = nybble.quantize(model, "w8a8", goal="memory", fuse=False)
            found = model(*given, **more)
        assert report.coverage > 99
        seen = ~padding if batch_first and more else ~padding.t() if more else torch.ones(3, 3, dtype=torch.bool)
        assert (found - wanted)[seen].norm() < 0.05 * wanted[seen].norm()
        assert model(*given, **more).requires_grad is any(p.requires_grad for p in model.parameters())
