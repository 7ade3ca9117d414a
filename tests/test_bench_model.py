"""The whole-model bench on a model small enough to build at once."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from nybble.bench import llama, model, outside
from nybble.passes.quantize import quantize

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

SMALL = {**llama.SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
RESULT = model.ModelResult("one", 2, 10.0, 100.0, 5.0, 9.0, 3.0, 1.0, 7.0, {"mul": 1.0}, {"add": 2.0})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(model, "SHAPE", SMALL)
    return llama.random_llama(torch.bfloat16, SMALL)


def test_the_model_is_the_one_that_is_named() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig(**llama.SHAPE))
    assert sum(parameter.numel() for parameter in whole.parameters()) == pytest.approx(0.79e9, rel=0.01)


def test_random_weights_are_finite_and_spread(small: nn.Module) -> None:
    for name, parameter in small.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.isfinite(small(torch.tensor([[1, 2, 3]])).logits).all()


def test_rotary_frequencies_survive(small: nn.Module) -> None:
    frequencies = small.model.rotary_emb.inv_freq
    assert frequencies[0] == 1
    assert (frequencies[1:] < frequencies[:-1]).all()


def test_steps_agree_with_one_pass_over_all_tokens(small: nn.Module) -> None:
    ids = model._ids(6)
    with torch.inference_mode():
        _, cache = model._forward(small, ids[:, :5])
        logits, _ = model._forward(small, ids[:, 5:], cache)
        expected = small(ids).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.01)


def test_counts_of_timed_steps(small: nn.Module) -> None:
    with torch.inference_mode():
        assert len(model.decode_steps(small, 3)) == 3
        assert len(model.prefill_runs(small, 2)) == 2


def test_stubs_stand_for_every_linear_and_go_away(small: nn.Module) -> None:
    quantize(small, "w4a8g32", goal="memory", untie=True)
    before = dict(small.named_modules())
    with torch.inference_mode(), outside.without_linears(small):
        left = [module for module in small.modules() if hasattr(module, "in_features")]
        assert not [module for module in left if getattr(module, "takes_rows", True)]
        logits, _ = model._forward(small, model._ids(4))
        assert logits.shape == (1, 128)
        assert (logits == 0).all()
    assert dict(small.named_modules()) == before


def test_operations_are_named_with_their_time() -> None:
    x = torch.ones(64, 64)
    found = outside.op_ms(lambda: x @ x, 1)
    assert "aten::mm" in found
    assert all(value >= 0 for value in found.values())


def test_the_best_speed_and_the_worst_memory_of_the_turns_count() -> None:
    other = replace(RESULT, decode_tokens_s=12.0, prefill_tokens_s=90.0, peak_mb=6.0, prefill_outside_ms=6.0)
    assert model._best([RESULT, other]) == replace(
        RESULT, decode_tokens_s=12.0, prefill_tokens_s=100.0, peak_mb=6.0, prefill_outside_ms=6.0
    )


def test_contestants_run_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def apart(measure: object, contestant: str, threads: int) -> model.ModelResult:
        order.append(contestant)
        return replace(RESULT, contestant=contestant, threads=threads)

    monkeypatch.setattr(model, "apart", apart)
    results = list(model.run("nybble w4*", threads=1))
    assert [result.contestant for result in results] == ["nybble w4a8g128", "nybble w4a16g128"]
    assert order == ["nybble w4a8g128", "nybble w4a16g128"] * 2


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="matches none of torch bf16"):
        list(model.run("llama", threads=1))


def test_an_error_in_the_process_of_a_contestant_comes_back() -> None:
    with pytest.raises(KeyError, match="no such contestant"):
        model.apart(model.measure, "no such contestant", 1)


def test_a_process_that_dies_is_named() -> None:
    # What the new process runs must be importable there, and end it: it becomes the command `false`.
    with pytest.raises(ChildProcessError, match="false: its process died"):
        model.apart(os.execvp, "false", ["false"])  # type: ignore[arg-type]


def test_peak_memory_is_reset() -> None:
    model.peak_mb(reset=True)  # of the tests before
    held = torch.ones(64 << 20)
    grown = model.peak_mb(reset=True)
    del held
    assert grown - model.peak_mb(reset=True) < 64
    assert model.peak_mb() < grown - 128
