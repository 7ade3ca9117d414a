"""Hadamard rotation: matrices that are orthogonal, a function that stays, and outliers that are spread."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import nybble
from nybble.commands.quantize import _config
from nybble.model.walk import Edits
from nybble.passes.rotate.hadamard import ORDERS, base, base_of, transform
from nybble.passes.rotate.llama import find
from nybble.passes.rotate.rotate import rotated, turn


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def llama(**kwargs: Any) -> LlamaForCausalLM:
    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        **kwargs,
    }
    model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def ids() -> Tensor:
    return torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


@pytest.mark.parametrize("order", ORDERS)
def test_every_table_is_a_hadamard_matrix(order: int) -> None:
    h = base(order)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_the_orders_that_models_need_are_there() -> None:
    assert {12, 20, 28, 36, 44, 60, 76, 108, 140} <= set(ORDERS)
    assert all(base_of(n) is not None for n in (384, 576, 768, 896, 1024, 2048, 3072, 4096, 5120))
    assert base_of(3 * 7 * 16) is None


@pytest.mark.parametrize("n", [1, 8, 64, 12, 48, 20, 224, 152, 384])
def test_the_fast_transform_is_the_dense_one(n: int) -> None:
    h = transform(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, 5, n, dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ h, rtol=0, atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, n**-0.5), rtol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}, {"hidden_size": 48}])  # fmt: skip
def test_the_function_stays(kwargs: dict[str, Any]) -> None:
    model = llama(**kwargs).double()
    for block in model.model.layers:  # transformers' own norms compute in float32
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(block, name, exact_norm(getattr(block, name)))
    model.model.norm = exact_norm(model.model.norm)
    before, state, edits = logits(model), copy.deepcopy(model.state_dict()), Edits()
    turn(model, find(model), 3, edits)
    assert ((logits(model) - before).norm() / before.norm()).item() <= 1e-12
    assert not torch.equal(model.model.embed_tokens.weight, state["model.embed_tokens.weight"])
    assert (model.model.norm.weight == 1).all()
    edits.undo()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is model.config.tie_word_embeddings


def exact_norm(norm: Any) -> nn.RMSNorm:
    new = nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
    new.weight = norm.weight
    return new


def test_outliers_of_four_bit_activations_are_spread() -> None:
    x = torch.randn(512, 384, dtype=torch.float64)
    x[:, [3, 100, 277]] *= 50
    weight = torch.randn(64, 384, dtype=torch.float64)
    errors = []
    for rows, read in ((x, weight), (transform(x), transform(weight))):
        step = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / 15
        errors.append((((rows / step).round() * step - rows) @ read.T).norm().item())
    assert errors[1] <= 0.6 * errors[0]
    spread = transform(x)
    kurtosis = (spread - spread.mean(0)).pow(4).mean() / spread.var().square()
    assert kurtosis < 6 < x.pow(4).mean() / x.var().square()


def planted() -> LlamaForCausalLM:
    """Three channels of what flows stand out by 50."""
    model = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [3, 50, 99]] *= 50
        for norm in [m for name, m in model.named_modules() if name.endswith("norm")]:
            norm.weight.fill_(1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_are_spread_and_the_quantized_model_loses_less(dtype: torch.dtype) -> None:
    model = planted().to(dtype)
    turned, wanted = copy.deepcopy(model), logits(model).float()
    found = nybble.rotate(turned, "w8a8", calibration=[{"input_ids": ids()}], seeds=3)
    assert found.seed is not None, found
    assert found.moved is not None
    assert found.moved <= (1e-3 if dtype == torch.float32 else 0.05)
    assert found.error is not None
    assert found.error_before is not None
    assert found.error <= 0.8 * found.error_before
    assert turned.lm_head.weight is not turned.model.embed_tokens.weight
    assert not turned.config.tie_word_embeddings
    if dtype == torch.bfloat16:  # whose own rounding is as large as that of the codes
        return
    errors = []
    for one in (model, turned):
        nybble.quantize(one, "w8a8", goal="memory", exclude="lm_head")
        errors.append((logits(one).float() - wanted).norm().item())
    assert errors[1] < 0.9 * errors[0]


class TestLadder:
    def test_an_output_that_moves_brings_the_model_back(self) -> None:
        model = planted()
        hidden = model.model.layers[1]
        hidden.register_forward_hook(lambda _, __, output: output.relu())
        state = copy.deepcopy(model.state_dict())
        found = nybble.rotate(model, "w4a8g32", calibration=[ids()], seeds=1)
        assert found.seed is None
        assert "the model's output changes by" in str(found.reason)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings

    def test_no_gain_leaves_the_model_alone(self) -> None:
        model = llama()
        state = copy.deepcopy(model.state_dict())
        found = nybble.rotate(model, "w8a16", calibration=[ids()], seeds=1)
        if found.seed is None:
            assert found.reason == "no rotation lowers the rounding error of the layers"
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        else:
            assert found.error < found.error_before

    def test_a_width_without_a_matrix_is_skipped(self) -> None:
        model = llama(hidden_size=84, num_attention_heads=6, num_key_value_heads=6)
        found = nybble.rotate(model, calibration=[ids()])
        assert (found.seed, found.reason) == (None, "no Hadamard matrix of order 84 is implemented")

    @pytest.mark.parametrize(
        ("name", "kind", "rule"),
        [
            ("up_proj", nn.Identity, "mlp.up_proj is torch.nn.modules.linear.Identity, must be exactly"),
            (
                "down_proj",
                lambda: nybble.nn.Linear(96, 64),
                "mlp.down_proj is nybble.nn.linear.Linear, must be exactly torch.nn.Linear",
            ),
        ],
    )
    def test_what_is_not_in_llama_form_is_named(self, name: str, kind: Any, rule: str) -> None:
        model = llama()
        setattr(model.model.layers[1].mlp, name, kind())
        with pytest.raises(ValueError, match=f"not in Llama form: {rule}"):
            nybble.rotate(model, calibration=[ids()])
        with pytest.raises(ValueError, match="not in Llama form: has no model"):
            nybble.rotate(nn.Sequential(nn.Linear(4, 4)), calibration=[torch.randn(2, 4)])

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="seeds=0: must be an int of at least 1"):
            nybble.rotate(llama(), calibration=[ids()], seeds=0)
        with pytest.raises(ValueError, match="calibration: has no batches"):
            nybble.rotate(llama(), calibration=[])


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "pad_token_id": 0,
}


class TestOnePlus:
    """Norms that multiply by 1 + their weight."""

    def gemma(self) -> GemmaForCausalLM:
        model = GemmaForCausalLM(GemmaConfig(**SMALL)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(-0.5, 1)
            model.model.embed_tokens.weight[:, [3, 50]] *= 50
        return model

    def test_the_function_stays(self) -> None:
        model = self.gemma()
        before, parts = logits(model), find(model)
        assert all(read.one_plus for read in parts.readers)
        turn(model, parts, 1, Edits())
        assert (model.model.norm.weight == 0).all()
        # The norms themselves compute in float32.
        assert ((logits(model) - before).norm() / before.norm()).item() <= 1e-5

    def test_outliers_are_spread(self) -> None:
        found = nybble.rotate(self.gemma(), "w8a8", calibration=[{"input_ids": ids()}], seeds=2)
        assert found.seed is not None, found
        assert found.error < 0.8 * found.error_before

    def test_those_of_llama_multiply_by_their_weight(self) -> None:
        assert not any(read.one_plus for read in find(llama()).readers)

    def test_blocks_with_norms_of_what_they_add_are_refused(self) -> None:
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL)).eval()
        words = "further norms: pre_feedforward_layernorm, post_feedforward_layernorm"
        with pytest.raises(ValueError, match=f"not in Llama form: its blocks have {words}"):
            nybble.rotate(model, calibration=[{"input_ids": ids()}])

    def test_a_norm_that_multiplies_by_something_else_is_refused(self) -> None:
        class Twice(nn.RMSNorm):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + x

        model = llama()
        model.model.norm = Twice(64)
        with pytest.raises(ValueError, match=r"norm is Twice, which multiplies neither by its weight nor by 1 \+"):
            nybble.rotate(model, calibration=[ids()])


class TestStage:
    """rotate among the passes of a recipe."""

    BATCHES = ({"input_ids": ids()}, {"input_ids": ids().flip(0)})

    def recipe(self, *more: nybble.recipe.Stage) -> nybble.Recipe:
        return nybble.Recipe([nybble.recipe.Stage("rotate", {"scheme": "w8a8", "seeds": 2}), *more])

    def test_what_follows_sees_the_rotated_model(self, tmp_path: Any) -> None:
        recipe = self.recipe(nybble.recipe.Stage("quantize", {"scheme": "w8a8", "goal": "memory"}))
        recipe.save(tmp_path / "r.json")
        assert nybble.Recipe.load(tmp_path / "r.json") == recipe
        model, by_hand = planted(), planted()
        by_hand.load_state_dict(model.state_dict())
        done = nybble.optimize(model, recipe, calibration=self.BATCHES)
        found = nybble.rotate(by_hand, "w8a8", calibration=self.BATCHES, seeds=2)
        nybble.quantize(by_hand, "w8a8", goal="memory")
        assert torch.equal(logits(model), logits(by_hand))
        assert not model.config.tie_word_embeddings
        reports = json.loads(done.to_json())["reports"]
        assert reports[0]["seed"] == found.seed
        assert f"rotated with seed {found.seed}" in str(done)

    def test_a_failure_later_leaves_the_model_as_it_was(self) -> None:
        model = planted()
        state = copy.deepcopy(model.state_dict())
        recipe = self.recipe(nybble.recipe.Stage("quantize", {"scheme": "w8a8", "include": "nothing"}))
        with pytest.raises(ValueError, match="matches no Linear layer"):
            nybble.optimize(model, recipe, calibration=self.BATCHES)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_recover_compares_with_the_rotated_dense_model(self) -> None:
        model = planted()
        dense = copy.deepcopy(model)
        recipe = self.recipe(
            nybble.recipe.Stage("quantize", {"scheme": "w4a8g32", "goal": "memory"}),
            nybble.recipe.Stage("recover", {"epochs": 1, "end_to_end_epochs": 0, "learning_rate": 0.01}),
        )
        done = nybble.optimize(model, recipe, calibration=self.BATCHES)
        blocks = [stage for stage in done.reports[-1].stages if stage.name.startswith("model.layers")]
        # Against the unrotated blocks' outputs the error would be about that of unrelated ones, 2.
        assert blocks
        assert all(stage.before < 0.5 for stage in blocks), blocks
        assert ((logits(model) - logits(dense)).norm() / logits(dense).norm()).item() < 0.5

    def test_without_data_it_says_so(self) -> None:
        with pytest.raises(ValueError, match="calibration=None: needs at least one batch"):
            nybble.optimize(llama(), self.recipe())

    def test_a_model_that_is_not_rotated_goes_on(self) -> None:
        model = llama(hidden_size=84, num_attention_heads=6, num_key_value_heads=6)
        done = nybble.optimize(model, self.recipe(), calibration=self.BATCHES)
        assert "not rotated: no Hadamard matrix of order 84" in str(done)
        assert model.config.tie_word_embeddings

    def test_a_copy_by_the_same_seed(self) -> None:
        model = llama()
        copied = rotated(model, 1)
        assert torch.allclose(logits(copied), logits(model), atol=1e-5)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert copied.model.embed_tokens.weight is not model.model.embed_tokens.weight

    def test_the_configuration_written_says_that_the_head_is_its_own(self, tmp_path: Any) -> None:
        model = llama()
        model.save_pretrained(tmp_path)
        old = json.loads((tmp_path / "config.json").read_text())
        assert _config(tmp_path, model) == old
        model.config.tie_word_embeddings = False
        assert _config(tmp_path, model) == {**old, "tie_word_embeddings": False}
