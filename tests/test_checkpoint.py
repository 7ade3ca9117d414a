"""nybble.save and nybble.load: round trips, ties, and models that do not fit."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.checkpoint import CheckpointError
from nybble.checkpoint import files as checkpoint_files
from nybble.nn import Linear

from .small_models import dense, quantized, same_state

pytest.importorskip("safetensors")


class TestRoundTrip:
    @pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8g32", "w4a16g128asym", "w4a16"])
    @pytest.mark.parametrize("skeleton", ["dense", "same", "other scheme", "meta"])
    def test_into_every_kind_of_skeleton(self, tmp_path: Path, scheme: str, skeleton: str) -> None:
        model = quantized(scheme)
        nybble.save(model, tmp_path)
        target: nn.Module = dense(1) if skeleton in ("dense", "meta") else quantized(scheme, 1)
        if skeleton == "other scheme":
            target = quantized("w8a8" if scheme != "w8a8" else "w4a16g32", 1)
        if skeleton == "meta":
            target = target.to("meta")
        assert nybble.load(target.eval(), tmp_path) is target
        assert same_state(model, target)
        x = torch.randn(3, 40)
        assert torch.equal(model(x), target(x))
        assert [str(m) for m in model.modules()] == [str(m) for m in target.modules()]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = dense(dtype=dtype).to(dtype)
        nybble.quantize(model, "w8a16", goal="memory")
        nybble.save(model, tmp_path)
        target = nybble.load(dense(1).to(dtype), tmp_path)
        assert same_state(model, target)
        assert target[0].dtype == dtype
        assert target[0].bias.dtype == dtype

    def test_parameters_keep_their_identity_and_flags(self, tmp_path: Path) -> None:
        nybble.save(quantized(), tmp_path)
        target = dense(1)
        target[0].bias.requires_grad_(False)
        target[2].eval()

        def tensors() -> list[torch.Tensor]:
            return [target[0].bias, target[1].weight, target[1].running_mean, target[3].bias]

        kept = tensors()
        nybble.load(target, tmp_path)
        assert all(a is b for a, b in zip(kept, tensors(), strict=True))
        assert not target[0].bias.requires_grad
        assert target[1].weight.requires_grad
        assert target[0].training
        assert not target[2][0].training

    def test_layers_left_dense_are_saved_too(self, tmp_path: Path) -> None:
        model = dense()
        nybble.quantize(model, include="0", goal="memory")
        nybble.save(model, tmp_path)
        target = nybble.load(dense(1), tmp_path)
        assert isinstance(target[0], Linear)
        assert type(target[2][0]) is nn.Linear
        assert same_state(model, target)

    def test_model_without_quantized_layers(self, tmp_path: Path) -> None:
        nybble.save(dense(), tmp_path)
        assert same_state(dense(), nybble.load(dense(1), tmp_path))

    def test_saving_changes_nothing_in_the_model(self, tmp_path: Path) -> None:
        model = quantized()
        packed = model[0].packed
        nybble.save(model, tmp_path)
        assert model[0].packed is packed

    def test_empty_strided_and_integer_tensors(self, tmp_path: Path) -> None:
        def make(value: float) -> nn.Module:
            model = nn.Module()
            model.register_buffer("none", torch.empty(0, 3))
            model.register_buffer("columns", torch.full((4, 6), value)[:, ::2].t())
            model.register_buffer("flags", torch.tensor([True, value > 0]))
            model.register_buffer("count", torch.tensor(int(value)))
            model.register_buffer("cache", torch.full((2,), value), persistent=False)
            return model

        nybble.save(make(7.0), tmp_path)
        target = nybble.load(make(0.0), tmp_path)
        assert torch.equal(target.columns, torch.full((3, 4), 7.0))
        assert target.flags.tolist() == [True, True]
        assert (target.count.item(), target.count.dtype) == (7, torch.int64)
        assert target.cache.tolist() == [0.0, 0.0]

    def test_conv1d_skeleton(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
        model = transformers.GPT2LMHeadModel(config).eval()
        nybble.quantize(model, goal="memory")
        nybble.save(model, tmp_path)
        target = nybble.load(transformers.GPT2LMHeadModel(config).eval(), tmp_path)
        ids = torch.arange(9)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, target(ids).logits)
        assert target.lm_head.packed is not None
        assert target.lm_head.weight_id == target.transformer.wte.weight_id

    def test_loaded_in_inference_mode_gradients_still_flow(self, tmp_path: Path) -> None:
        nybble.save(quantized(), tmp_path)
        target = dense(1).eval()
        with torch.inference_mode():
            nybble.load(target, tmp_path)
        x = torch.randn(3, 40, requires_grad=True)
        target(x).square().sum().backward()
        assert x.grad is not None
        assert target[3].weight.grad is not None

    def test_where_no_thread_can_be_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:  # as when the interpreter ends
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        nybble.save(quantized(), tmp_path)
        monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.submit", refuse)
        assert same_state(nybble.load(dense(), tmp_path), quantized())
        weights = next(tmp_path.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
        with pytest.raises(CheckpointError, match="sha256"):
            nybble.load(dense(), tmp_path)

    def test_path_as_string_and_new_directory(self, tmp_path: Path) -> None:
        nybble.save(quantized(), str(tmp_path / "a" / "b"))
        assert same_state(quantized(), nybble.load(dense(1), str(tmp_path / "a" / "b")))


class TestTies:
    def tied(self, seed: int = 0) -> nn.ModuleDict:
        torch.manual_seed(seed)
        fc = nn.Linear(16, 16)
        model = nn.ModuleDict(
            {
                "embed": nn.Embedding(32, 16),
                "head": nn.Linear(16, 32, bias=False),
                "a": nn.Linear(16, 16),
                "b": nn.Linear(16, 16),
                "c": fc,
                "d": nn.Sequential(fc),
            }
        )
        model["head"].weight = model["embed"].weight
        model["b"].weight = model["a"].weight
        return model

    @pytest.mark.parametrize("skeleton", ["dense", "untied", "meta"])
    def test_ties_are_restored(self, tmp_path: Path, skeleton: str) -> None:
        model = self.tied()
        nybble.quantize(model, goal="memory")
        nybble.save(model, tmp_path)
        target = self.tied(1)
        if skeleton == "untied":
            target["head"] = nn.Linear(16, 32, bias=False)
            target["b"] = nn.Linear(16, 16)
            target["d"] = nn.Sequential(nn.Linear(16, 16))
        if skeleton == "meta":
            target = target.to("meta")
        nybble.load(target, tmp_path)
        assert same_state(model, target)
        assert target["head"].weight_id == target["embed"].weight_id
        assert target["a"].packed.data_ptr() == target["b"].packed.data_ptr()
        assert target["c"].packed.data_ptr() == target["d"][0].packed.data_ptr()
        assert target["c"].bias is target["d"][0].bias
        assert (target["c"] is target["d"][0]) == (skeleton != "untied")

    def test_shared_tensors_are_stored_once(self, tmp_path: Path) -> None:
        model = self.tied()
        nybble.quantize(model, goal="memory")
        nybble.save(model, tmp_path)
        index = json.loads((tmp_path / "nybble.json").read_text())
        assert index["aliases"] == {
            "embed.qweight": "head.qweight",
            "embed.scale": "head.scale",
            "b.qweight": "a.qweight",
            "b.scale": "a.scale",
            "d.0.qweight": "c.qweight",
            "d.0.scale": "c.scale",
            "d.0.bias": "c.bias",
        }
        assert not index["aliases"].keys() & index["tensors"].keys()
        assert {layer["name"]: layer["tied_to"] for layer in index["layers"]} == {
            "embed": "head",
            "head": None,
            "a": None,
            "b": "a",
            "c": None,
            "d.0": "c",
        }

    def test_overlapping_parameters_are_stored_apart(self, tmp_path: Path) -> None:
        model = nn.Module()
        whole = torch.arange(12.0)
        model.whole, model.part = nn.Parameter(whole), nn.Parameter(whole[2:5])
        nybble.save(model, tmp_path)
        target = nn.Module()
        target.whole, target.part = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(3))
        nybble.load(target, tmp_path)
        assert target.part.tolist() == [2.0, 3.0, 4.0]

    def test_checkpoint_without_the_ties_of_the_model_is_refused(self, tmp_path: Path) -> None:
        model = self.tied()
        model["head"] = nn.Linear(16, 32, bias=False)
        nybble.quantize(model, exclude=["embed", "head"], goal="memory")
        nybble.save(model, tmp_path)
        with pytest.raises(CheckpointError, match=r"head\.weight: is the same tensor as embed\.weight"):
            nybble.load(self.tied(), tmp_path)

    def test_checkpoint_with_two_layers_where_the_model_has_one_is_refused(self, tmp_path: Path) -> None:
        model = self.tied()
        model["d"] = nn.Sequential(nn.Linear(16, 16))
        nybble.quantize(model, goal="memory")
        nybble.save(model, tmp_path)
        with pytest.raises(CheckpointError, match=r"d\.0: is the same module as c in the model"):
            nybble.load(self.tied(), tmp_path)


class TestLoadFailure:
    def test_interrupt_while_applying_leaves_the_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from nybble.model.walk import Place

        nybble.save(quantized(), tmp_path)
        original, calls = Place.put, [0]

        def failing(self: Place, module: nn.Module) -> None:
            calls[0] += 1
            original(self, module)
            if calls[0] == 2:
                raise KeyboardInterrupt

        target = dense(1)
        before, modules = copy.deepcopy(target.state_dict()), list(target.modules())
        parameters = list(target.parameters())
        monkeypatch.setattr(Place, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            nybble.load(target, tmp_path)
        assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())
        assert all(a is b for a, b in zip(modules, target.modules(), strict=True))
        assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda m: m.__setitem__(0, nn.Linear(41, 24)), "0: .*41"),
            (lambda m: m.__setitem__(0, nn.Linear(40, 24, bias=False)), "0: .*bias"),
            (lambda m: m.__setitem__(0, nn.Identity()), "0: .*Identity"),
            (lambda m: m.__setitem__(0, nn.Linear(40, 24, dtype=torch.bfloat16)), "0: .*bfloat16"),
            (lambda m: m[0].register_forward_hook(lambda *_: None), "0: .*forward hooks"),
            (lambda m: m.__setitem__(3, nn.LayerNorm(17)), r"3\.(weight|bias): .*\(16,\).*\(17,\)"),
            (
                lambda m: m.__setitem__(3, nn.LayerNorm(16, dtype=torch.float16)),
                r"3\.(weight|bias): .*float32.*float16",
            ),
            (lambda m: m.append(nn.Linear(3, 3)), r"lacks 4\.weight, 4\.bias"),
            (lambda m: m.__delitem__(3), r"the model lacks 3\.bias, 3\.weight"),
            (lambda m: m.__delitem__(2), r"2\.0: .*no such module"),
            (lambda m: m.append(Linear(8, 8)), "4: is quantized in the model"),
            (lambda m: m.append(m[0]), "4: is the same module as 0 in the model"),
            (
                lambda m: m.register_buffer("cache", torch.empty(2, device="meta"), persistent=False),
                r"cache: is on the meta device",
            ),
        ],
    )
    def test_model_that_does_not_fit(self, tmp_path: Path, change: Any, words: str) -> None:
        nybble.save(quantized(), tmp_path)
        target = dense(1)
        change(target)
        modules, values = list(target.modules()), copy.deepcopy(target.state_dict())
        with pytest.raises(CheckpointError, match=words):
            nybble.load(target, tmp_path)
        assert all(a is b for a, b in zip(modules, target.modules(), strict=True))
        assert all(torch.equal(values[key], value) for key, value in target.state_dict().items())

    def test_quantized_layer_with_a_hook_is_not_replaced(self, tmp_path: Path) -> None:
        nybble.save(quantized(), tmp_path)
        target = quantized(seed=1)
        target[0].register_forward_hook(lambda *_: None)
        before = target[0]
        with pytest.raises(CheckpointError, match=r"0: .*forward hooks"):
            nybble.load(target, tmp_path)
        assert target[0] is before
        assert same_state(target, quantized(seed=1))

    def test_mixed_pair_of_two_checkpoints(self, tmp_path: Path) -> None:
        nybble.save(quantized(seed=0), tmp_path / "a")
        nybble.save(quantized(seed=1), tmp_path / "b")
        one, two = (next((tmp_path / name).glob("*.safetensors")) for name in "ab")
        os.replace(one, two)
        with pytest.raises(CheckpointError, match="damaged tensors: "):
            nybble.load(dense(), tmp_path / "b")

    def test_content_named_file_matches_the_digest(self, tmp_path: Path) -> None:
        nybble.save(quantized(), tmp_path)
        path = next(tmp_path.glob("*.safetensors"))
        assert checkpoint_files.digest(path, {}).file_name == path.name
