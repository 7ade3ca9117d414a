"""nybble.skeleton makes models without the values of their parameters, which nybble.load fills."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nybble


class Rotary(nn.Module):
    """A layer with a parameter, a buffer that checkpoints hold, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("angles", torch.arange(16).cos(), persistent=False)
        with torch.no_grad():
            self.linear.weight.normal_().zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) * self.angles


def test_parameters_have_no_values_and_buffers_do() -> None:
    state = torch.get_rng_state()
    with nybble.skeleton():
        model = Rotary()
        given = nn.Parameter(torch.empty(2, device="cpu"))
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    assert {name for name, one in model.named_parameters() if one.is_meta} == {
        f"{layer}.{key}" for layer in ("linear", "norm") for key in ("weight", "bias")
    }
    assert torch.equal(model.angles, torch.arange(16).cos())
    assert torch.equal(model.norm.running_var, torch.ones(16))
    assert not given.is_meta
    assert not torch.empty(1).is_meta, "only inside the context"


def test_outside_tensors_keep_their_setters() -> None:
    with nybble.skeleton():
        real = torch.zeros(3)
        nn.init.constant_(real, 2)
        assert real.tolist() == [2, 2, 2]
        assert real.fill_(3).tolist() == [3, 3, 3]


def test_load_fills_it(tmp_path) -> None:
    pytest.importorskip("safetensors")
    model = nn.Sequential(Rotary(), nn.Linear(16, 4)).eval()
    nybble.quantize(model, "w4a8g32", goal="memory", exclude="1")
    nybble.save(model, tmp_path)
    with nybble.skeleton():
        fresh = nn.Sequential(Rotary(), nn.Linear(16, 4)).eval()
    nybble.load(fresh, tmp_path)
    assert not any(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_load_fills_a_transformers_model(tmp_path) -> None:
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.save(model, tmp_path)
    with nybble.skeleton():
        fresh = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert all(parameter.is_meta for name, parameter in fresh.named_parameters() if "norm" not in name)
    nybble.load(fresh, tmp_path)
    tokens = torch.randint(32, (2, 7))
    with torch.no_grad():
        assert torch.equal(fresh(tokens).logits, model(tokens).logits)
    assert fresh.lm_head.weight_id == fresh.model.embed_tokens.weight_id
