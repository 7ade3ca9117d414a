"""Checks of transformers' tensor parallelism, one process for each rank; tests/test_parallel.py runs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers.distributed import DistributedConfig

import nybble

sys.path.insert(0, str(Path(__file__).parent))
import gptq_llama
import ranks

TOKENS = torch.arange(3, 12)[None]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}


def saved(folder: Path, name: str, **more: Any) -> Path:
    """A Llama with biases, written by the first rank."""
    directory = folder / name
    if dist.get_rank() == 0 and not directory.exists():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **HEADS, **more))
        for key, one in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(one)
        model.save_pretrained(directory)
    dist.barrier()
    return directory


def load(directory: Path, parallel: bool | dict[str, str], config: Any = None) -> Any:
    """The model, on all ranks or whole."""
    more: dict[str, Any] = {} if config is None else {"quantization_config": config}
    if parallel:
        more["distributed_config"] = DistributedConfig(
            tp_plan="auto" if parallel is True else parallel, tp_size=dist.get_world_size()
        )
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **more)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def close(found: Tensor, wanted: Tensor, limit: float = 5e-6) -> None:
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error <= limit, f"relative error {error:.3g}, at most {limit:.3g}"


def cut(model: Any) -> set[str]:
    return {name for name, one in model.named_modules() if getattr(one, "sharding", None) is not None}


def same(directory: Path, config: Any, limit: float = 5e-6) -> Any:
    """A model loaded on all ranks, which gives the logits of one rank."""
    whole, model = load(directory, False, config), load(directory, True, config)
    close(logits(model), logits(whole), limit)
    found = {str(one.scheme) for one in model.modules() if isinstance(one, nybble.nn.Linear)}
    assert found == {str(one.scheme) for one in whole.modules() if isinstance(one, nybble.nn.Linear)}
    return model


def dense_checkpoints_load_rounded_and_cut(folder: Path) -> None:
    directory = saved(folder, "llama", tie_word_embeddings=False)
    for scheme, limit in (("w4a16g32", 5e-6), ("w8a8", 0.05)):
        model = same(directory, nybble.HfConfig(scheme), limit)
        assert len(cut(model)) == 15
        wanted = load(directory, False, nybble.HfConfig(scheme)).generate(TOKENS, max_new_tokens=3, do_sample=False)
        if "a16" in scheme:
            assert torch.equal(model.generate(TOKENS, max_new_tokens=3, do_sample=False), wanted)
    with pytest.raises(ValueError, match="is cut"):
        model.save_pretrained(folder / "never")


def layers_that_stay_dense_are_cut_too(folder: Path) -> None:
    directory = saved(folder, "llama", tie_word_embeddings=False)
    config = nybble.HfConfig("w8a16", exclude=["*.0.self_attn.q_proj", "lm_head"], per_layer={"*.1.mlp.*": "w4a16g32"})
    model = same(directory, config)
    assert len(cut(model)) == 13
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape == (128 // dist.get_world_size(), 128)


def heads_that_share_codes(folder: Path) -> None:
    model = same(saved(folder, "tied", tie_word_embeddings=True), nybble.HfConfig("w8a16"))
    assert isinstance(model.model.embed_tokens, nybble.nn.Embedding)
    assert "lm_head" in cut(model)


def checkpoints_of_nybble(folder: Path) -> None:
    """Saved by save_pretrained, a fused model among them."""
    for i, more in enumerate(({"scheme": "w4a8g32static"}, {"scheme": "w4a16g32", "method": "mse"})):
        directory = saved(folder, "llama", tie_word_embeddings=False)
        if dist.get_rank() == 0:
            model = load(directory, False)
            calibration = [TOKENS] if "static" in more["scheme"] else None
            with nybble.parallel.calibrate_alone():
                nybble.quantize(model, **more, goal="memory", calibration=calibration, fuse=False)
            nybble.fuse(model, [TOKENS], goal="always")
            model.save_pretrained(folder / f"own{i}")
        dist.barrier()
        assert len(cut(same(folder / f"own{i}", None, 5e-6 if i else 0.02))) == 15


def checkpoints_of_others(folder: Path) -> None:
    if dist.get_rank() == 0:
        gptq_llama.write(folder / "gptq", 256, 512, 1)
    dist.barrier()
    assert len(cut(same(folder / "gptq", nybble.HfConfig(), 0.01))) >= 7


def plans_of_the_caller(folder: Path) -> None:
    directory = saved(folder, "llama", tie_word_embeddings=False)
    plan = {
        "model.layers.*.mlp.down_proj": "rowwise_split_input",
        "model.layers.*.mlp.up_proj": "colwise_gather_output",
    }
    plan["model.layers.*.mlp.gate_proj"] = "colwise_gather_output"
    model = load(directory, plan, nybble.HfConfig("w8a16"))
    close(logits(model), logits(load(directory, False, nybble.HfConfig("w8a16"))))
    for more, config, parts in (
        ({"model.layers.*.mlp.gate_proj": "packed_colwise"}, "w8a16", ("packed_colwise", "Linear", "must be one of")),
        (
            True,
            "w4a16g128",
            ("tp_plan['model.layers.0.self_attn.o_proj']='rowwise'", "in_features=128", "group_size=128"),
        ),
    ):
        with pytest.raises((ValueError, NotImplementedError)) as told:
            load(directory, more, nybble.HfConfig(config))
        assert all(part in str(told.value) for part in parts), told.value


CHECKS = {
    one.__name__: one
    for one in (
        dense_checkpoints_load_rounded_and_cut,
        layers_that_stay_dense_are_cut_too,
        heads_that_share_codes,
        checkpoints_of_nybble,
        checkpoints_of_others,
        plans_of_the_caller,
    )
}

if __name__ == "__main__":
    ranks.main(CHECKS)
