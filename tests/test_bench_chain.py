"""The figures of chains: both sides compute the same."""

import pytest
import torch

from nybble.bench import chain
from nybble.bench.chain import Decoder, Encoder

ENCODER = Encoder(3, 9, hidden=64, wide=128, heads=4, layers=2)
DECODER = Decoder(batch=2, keys=30, hidden=256, wide=384, heads=8, shared=2, layers=2)


@pytest.mark.parametrize(
    ("fused", "separate"),
    [
        (chain.encoder_chain(ENCODER), chain.encoder_calls(ENCODER)),
        (chain.decoder_chain(DECODER), chain.decoder_calls(DECODER)),
    ],
    ids=["encoder", "decoder"],
)
def test_both_sides_compute_the_same(fused, separate):
    with torch.inference_mode():
        got, right = fused(), separate()
    torch.testing.assert_close(got, right.reshape(got.shape), rtol=0, atol=0.05 * float(right.abs().max()))


def test_figures(monkeypatch):
    monkeypatch.setattr(chain, "encoder_chain", lambda _: lambda: torch.zeros(1))
    monkeypatch.setattr(chain, "encoder_calls", lambda _: lambda: torch.zeros(1))
    monkeypatch.setattr(chain, "decoder_chain", lambda _: lambda: torch.zeros(1))
    monkeypatch.setattr(chain, "decoder_calls", lambda _: lambda: torch.zeros(1))
    names = [figure.name for figure in chain.chain_figures(0.01)]
    assert len(set(names)) == len(names) == 6
