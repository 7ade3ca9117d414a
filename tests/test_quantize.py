"""nybble.quantize: what is swapped, what stays tied, what is left alone and why."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.nn import Linear

from .small_quantize import mlp, rows, small


class TestSwap:
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8g32", "w4a16g128asym", "w4a16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_nested_layers_become_nybble_layers(self, scheme: str, dtype: torch.dtype) -> None:
        model = mlp(dtype=dtype)
        dense = copy.deepcopy(model).float()
        report = small(model, scheme)
        assert isinstance(model[0], Linear)
        assert isinstance(model[2][0], Linear)
        assert str(model[0].scheme) == scheme
        assert [layer.name for layer in report.swapped] == ["0", "2.0"]
        assert report.coverage == 100.0
        x = torch.randn(5, 40)
        y = model(x.to(dtype)).float()
        assert ((y - dense(x)).norm() / dense(x).norm()).item() < (0.25 if "w4" in scheme else 0.03)

    def test_scheme_object_and_default(self) -> None:
        model = mlp()
        assert nybble.quantize(model, nybble.Scheme(4, 16, 32), goal="memory").scheme == "w4a16g32"
        assert nybble.quantize(mlp(), goal="memory").scheme == "w8a8"

    def test_result_equals_from_dense(self) -> None:
        model = mlp()
        alone = Linear.from_dense(model[0], "w4a16g32", method="mse")
        small(model, "w4a16g32", method="mse")
        for key, tensor in alone.state_dict().items():
            assert torch.equal(tensor, model[0].state_dict()[key]), key

    def test_report_of_a_swapped_layer(self) -> None:
        model = mlp()
        weight = model[0].weight.detach().double()
        report = small(model)
        row = rows(report)["0"]
        hat = model[0].dequantize().weight.detach().double()
        assert row.sqnr_db == pytest.approx(10 * math.log10(weight.square().sum() / (weight - hat).square().sum()))
        assert 30 < row.sqnr_db < 60
        assert (row.kind, row.shape, row.before, row.after) == ("Linear", (24, 40), "float32", "w8a8")
        assert (row.nbytes_before, row.nbytes_after) == (24 * 41 * 4, model[0].nbytes)
        assert row.kernel.split(", ")[0] == nybble.explain(model[0], 1).kernel
        assert (row.reason, row.speedup, row.slower_at) == (None, {}, ())
        assert report.threads == torch.get_num_threads()
        assert "w8a8" in str(report)

    def test_more_bits_and_mse_are_more_accurate(self) -> None:
        def sqnr(scheme: str, method: str) -> float:
            value = rows(small(mlp(), scheme, method=method))["0"].sqnr_db
            assert value is not None
            return value

        assert sqnr("w8a8", "rtn") > sqnr("w4a8g32", "rtn") + 10
        assert sqnr("w4a8g128", "mse") >= sqnr("w4a8g128", "rtn")

    def test_exact_weights_have_infinite_sqnr(self) -> None:
        model = nn.Sequential(nn.Linear(32, 4))
        with torch.no_grad():
            model[0].weight.fill_(0)
        assert rows(small(model))["0"].sqnr_db == math.inf

    def test_training_flag_and_frozen_parameters_are_kept(self) -> None:
        model = mlp()
        model[0].eval()
        model[0].requires_grad_(False)
        bias = model[0].bias
        small(model)
        assert model.training
        assert not model[0].training
        assert model[2][0].training
        assert model[0].bias is bias
        assert not model[0].bias.requires_grad
        assert model[2][0].bias.requires_grad
        assert not any(p.requires_grad for n, p in model.named_parameters() if "bias" not in n)

    def test_layers_without_bias_and_odd_shapes(self) -> None:
        model = nn.Sequential(nn.Linear(71, 33, bias=False))
        assert rows(small(model, "w4a16g32"))["0"].shape == (33, 71)
        assert model(torch.randn(2, 71)).shape == (2, 33)

    def test_module_without_linear_layers(self) -> None:
        report = small(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()))
        assert [(row.name, row.kind, row.reason) for row in report.layers] == [
            ("0", "Conv3d", "not a kind of module that nybble replaces")
        ]
        assert report.coverage == 0.0

    def test_called_in_inference_mode_gradients_still_flow(self) -> None:
        model = mlp()
        with torch.inference_mode():
            small(model)
        x = torch.randn(3, 40, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0

    def test_random_state_threads_and_grad_mode_are_untouched(self) -> None:
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        model = mlp()
        state = torch.get_rng_state()
        nybble.quantize(model, m=(1,))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        assert torch.is_grad_enabled()


class TestShared:
    def test_one_module_at_several_places_becomes_one_module(self) -> None:
        fc = nn.Linear(16, 16)
        model = nn.ModuleDict({"a": fc, "inner": nn.Sequential(fc, nn.Linear(16, 4))})
        report = small(model)
        assert isinstance(model["a"], Linear)
        assert model["a"] is model["inner"][0]
        assert [(row.name, row.also) for row in report.layers] == [("a", ("inner.0",)), ("inner.1", ())]

    def test_shared_parent_is_quantized_once(self) -> None:
        block = nn.Sequential(nn.Linear(16, 16))
        model = nn.ModuleList([block, block])
        report = small(model)
        assert model[0] is model[1]
        assert isinstance(model[1][0], Linear)
        assert [(row.name, row.also) for row in report.layers] == [("0.0", ("1.0",))]

    @pytest.mark.parametrize("by_storage", [False, True])
    def test_two_layers_with_one_weight_stay_tied(self, by_storage: bool) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16))
        model[1].weight = nn.Parameter(model[0].weight.data) if by_storage else model[0].weight
        report = small(model)
        assert model[0] is not model[1]
        assert model[0].weight_id == model[1].weight_id != model[2].weight_id
        assert model[0].packed.data_ptr() == model[1].packed.data_ptr()
        assert model[1].bias is None
        first, second, third = report.layers
        assert (first.tied_to, second.tied_to, third.tied_to) == (None, "0", None)
        assert second.sqnr_db == first.sqnr_db
        assert (second.nbytes_before, second.nbytes_after) == (0, 0)
        assert report.nbytes_before == 4 * (2 * 256 + 2 * 16)
        assert report.weight_bytes == report.weight_bytes_changed == 4 * 2 * 256

    def test_tied_layers_keep_their_own_bias(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        biases = model[0].bias, model[1].bias
        small(model, "w4a8g32")
        assert model[0].bias is biases[0]
        assert model[1].bias is biases[1]
        x = torch.randn(3, 16)
        assert torch.allclose(model[1](x) - biases[1], model[0](x) - biases[0], atol=1e-5)

    def test_weights_that_overlap_in_part_are_left_alone(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
        model[1].weight = nn.Parameter(model[0].weight.data[4:12])
        report = small(model)
        assert "overlaps 1.weight" in str(rows(report)["0"].reason)
        assert "overlaps 0.weight" in str(rows(report)["1"].reason)
        assert report.weight_bytes == 4 * 256
        assert len(small(model, untie=True).swapped) == 2

    def test_shared_bias_stays_shared(self) -> None:
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(32, 8))
        model[1].bias = model[0].bias
        report = small(model)
        assert model[0].bias is model[1].bias
        assert report.nbytes_before == 4 * (16 * 8 + 32 * 8 + 8)

    def test_tied_to_an_excluded_embedding_is_left_alone(self) -> None:
        model = nn.ModuleDict({"head": nn.Linear(16, 50, bias=False), "embed": nn.Embedding(50, 16)})
        model["head"].weight = model["embed"].weight
        head = model["head"]
        report = small(model, exclude="embed")
        assert model["head"] is head
        assert head.weight is model["embed"].weight
        assert "embed.weight" in str(rows(report)["head"].reason)
        assert "untie=True" in str(rows(report)["head"].reason)
        assert report.coverage == 0.0
        assert report.nbytes_before == report.nbytes_after == 4 * 50 * 16

    def test_tied_to_embedding_with_untie_quantizes_a_copy(self) -> None:
        model = nn.ModuleDict({"head": nn.Linear(16, 50, bias=False), "embed": nn.Embedding(50, 16)})
        model["head"].weight = model["embed"].weight
        weight, values = model["embed"].weight, model["embed"].weight.detach().clone()
        report = small(model, untie=True, exclude="embed")
        assert isinstance(model["head"], Linear)
        assert model["embed"].weight is weight
        assert torch.equal(weight, values)
        assert report.coverage == 0.0  # the dense matrix is still there
        assert report.nbytes_before == 4 * 50 * 16
        assert report.nbytes_after == 4 * 50 * 16 + model["head"].nbytes

    def test_weight_that_a_parent_also_holds_is_left_alone(self) -> None:
        model = nn.Sequential(nn.Linear(16, 8))
        model.register_parameter("mirror", model[0].weight)
        assert "mirror" in str(rows(small(model))["0"].reason)

    def test_weight_that_overlaps_another_is_left_alone(self) -> None:
        fused = nn.Parameter(torch.randn(24, 16))
        model = nn.Sequential(nn.Linear(16, 8, bias=False))
        model.register_parameter("fused", fused)
        model[0].weight = nn.Parameter(fused.data[8:16])
        assert "fused" in str(rows(small(model))["0"].reason)

    def test_disjoint_parts_of_one_storage_are_no_tie(self) -> None:
        flat = torch.randn(2, 8, 16)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8))
        model[0].weight, model[1].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
        small(model)
        assert model[0].weight_id != model[1].weight_id

    def test_twin_of_a_layer_that_stays_is_left_alone(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        report = small(model, exclude="0")
        assert "0.weight" in str(rows(report)["1"].reason)
        assert type(model[1]) is nn.Linear


class TestKinds:
    def test_multihead_attention_inside_a_layer_of_torch(self) -> None:
        model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
        x = torch.randn(2, 5, 32)
        with torch.no_grad():
            before = model(x)
            report = small(model)
            after = model(x)
        found = rows(report)
        assert found["0.self_attn.out_proj"].swapped
        assert found["0.self_attn.in_proj"].swapped
        assert isinstance(model[0].linear1, Linear)
        assert ((after - before).norm() / before.norm()).item() < 0.05
        assert not torch.equal(after, before)

    def test_conv1d_by_name(self) -> None:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)

        def init(self: Any) -> None:
            nn.Module.__init__(self)
            self.weight, self.bias = nn.Parameter(torch.randn(24, 10)), nn.Parameter(torch.randn(10))

        namespace = {"__module__": "transformers.pytorch_utils", "__init__": init, "forward": forward}
        conv1d = type("Conv1D", (nn.Module,), namespace)
        child = type("Child", (conv1d,), {})
        model = nn.ModuleList([conv1d(), child(), type("Conv1D", (nn.Module,), {**namespace, "__module__": "x"})()])
        x = torch.randn(2, 3, 24)
        before = model[0](x)
        report = small(model)
        first, second, third = report.layers
        assert isinstance(model[0], Linear)
        assert (first.kind, first.shape) == ("Conv1D", (10, 24))
        assert ((model[0](x) - before).norm() / before.norm()).item() < 0.02
        assert "subclass" in str(second.reason)
        assert third.reason == "not a kind of module that nybble replaces"

    def test_real_gpt2(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
        model = transformers.GPT2LMHeadModel(config).eval()
        ids = torch.arange(10)[None]
        with torch.no_grad():
            before = model(ids).logits
            report = small(model, "w8a16")
            after = model(ids).logits
        found = rows(report)
        assert found["transformer.h.0.attn.c_attn"].shape == (96, 32)
        assert len(report.swapped) == 11
        assert found["transformer.wte"].tied_to == "lm_head"
        assert ((after - before).norm() / before.norm()).item() < 0.05
        assert report.coverage == 100

    def test_already_quantized_layers_are_left_and_count(self) -> None:
        model = mlp()
        small(model, include="0")
        first, codes = model[0], copy.deepcopy(model[0].state_dict())
        report = small(model, "w4a16g32", strict=True)
        assert model[0] is first
        assert all(torch.equal(value, codes[key]) for key, value in model[0].state_dict().items())
        assert rows(report)["0"].reason == "already quantized"
        assert rows(report)["0"].before == "w8a8"
        assert report.coverage == 100.0

    def test_fused_experts_show_in_the_coverage(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16, bias=False))
        model.register_parameter("experts", nn.Parameter(torch.randn(3, 16, 16)))
        report = small(model)
        assert report.coverage == 25.0
        assert rows(report)["experts"].shape == (3, 16, 16)
        assert not rows(report)["experts"].swapped

    def test_materialized_lazy_layer_is_swapped(self) -> None:
        model = nn.Sequential(nn.LazyLinear(8))
        model(torch.randn(2, 16))
        small(model, strict=True)
        assert isinstance(model[0], Linear)

    def test_cycle_of_modules_ends(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        model[0].__dict__["_modules"] = {}
        model.add_module("inner", nn.Sequential(nn.Linear(8, 8)))
        model.inner.add_module("up", model)
        assert [row.name for row in small(model).swapped] == ["0", "inner.0"]
