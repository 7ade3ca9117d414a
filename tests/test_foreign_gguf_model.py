"""GGUF files as whole models: the configuration from their fields, tied tables of embeddings, experts, split files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.__main__ import main
from nybble.checkpoint import CheckpointError
from nybble.foreign import open_foreign
from nybble.foreign.gguf_config import config_of
from nybble.foreign.gguf_header import read_header

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

F32, F16, Q4_0 = 0, 1, 2
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
TOKENS = torch.arange(14).reshape(2, 7)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)


def write(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]) -> None:
    """A GGUF file: type, shape and bytes of each tensor by its name."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    out += b"".join(text(key) + field(value) for key, value in fields.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(out + bytes(-len(out) % 32) + data)


def q4_0(rows: Tensor) -> tuple[bytes, Tensor]:
    """Rows of any values as blocks, and what they then are: codes times scales that are powers of 2."""
    blocks = rows.reshape(-1, 32)
    scale = torch.exp2((blocks.abs().amax(1, keepdim=True) / 7).log2().ceil())
    codes = (blocks / scale).round().clamp(-8, 7)
    unsigned = (codes + 8).to(torch.uint8)
    packed = unsigned[:, :16] | (unsigned[:, 16:] << 4)
    raw = np.concatenate([scale.half().numpy().view(np.uint8), packed.numpy()], 1).tobytes()
    return raw, (codes * scale).reshape(rows.shape)


def permuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of a rotary projection."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def fields_of(config: Any, architecture: str) -> dict[str, Any]:
    told = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
    }
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in told.items()}}


def file_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, block, rest = stem.split(".", 3)
        return f"blk.{block}.{NAMES[rest]}.{ending}"
    return f"{NAMES[stem]}.{ending}"


def tensors_of(
    weights: Mapping[str, nn.Parameter], heads: Mapping[str, int]
) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Weights of a model as a file has them, matrices as Q4_0; the model then has these weights."""
    found = {}
    for name, value in weights.items():
        value.data = value.data.float()
        new = file_name(name)
        if value.dim() == 1:
            value.data.normal_(1, 0.1)
            found[new] = (F32, tuple(value.shape), value.detach().numpy().tobytes())
            continue
        count = heads.get(new.split(".")[-2])
        rows = value.data if count is None else permuted(value.data, count)
        raw, _ = q4_0(rows)
        value.data = q4_0(value.data)[1]
        found[new] = (Q4_0, tuple(value.shape), raw)
    return found


def llama(tmp_path: Path, tied: bool = True) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, rope_theta=5000.0, rms_norm_eps=1e-5, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = tensors_of(dict(model.named_parameters()), {"attn_q": 4, "attn_k": 2})
    write(tmp_path / "model.gguf", fields_of(config, "llama"), tensors)
    return tmp_path / "model.gguf", model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("act_bits", [16, 8])
def test_llama_is_the_model_of_its_weights(tied: bool, act_bits: int, tmp_path: Path) -> None:
    path, dense = llama(tmp_path, tied)
    model, report = nybble.load_pretrained(path, act_bits=act_bits)
    assert all(row.exact for row in report.layers)
    assert len(report.layers) == 15 + (not tied)
    for name, layer in model.named_modules():
        if isinstance(layer, (nybble.nn.Linear, nybble.nn.Embedding)):
            assert torch.equal(layer.dequantized_weight(), dense.get_submodule(name).weight), name
    assert isinstance(model.model.embed_tokens, nybble.nn.Embedding)
    assert str(model.lm_head.scheme) == f"w4a{act_bits}g32"
    assert (model.lm_head.weight_id == model.model.embed_tokens.weight_id) is tied
    with torch.no_grad():
        found, expected = model(TOKENS).logits, dense(TOKENS).logits
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-4 if act_bits == 16 else 0.05)


# Blocks of 32 by the number of their type: the bytes before the codes, as float16, and what a table of them becomes.
@pytest.mark.parametrize(
    ("kind", "before", "form"),
    [
        (2, (0.2502,), "f16"),
        (3, (0.2502, -1.5), "f16min"),
        (20, (0.1251,), "f16"),
        (8, (0.25,), "bf16"),
    ],
    ids=["Q4_0", "Q4_1", "IQ4_NL", "Q8_0"],
)
@pytest.mark.parametrize("act_bits", [16, 8])
def test_a_tied_head_shares_tables_of_any_type(
    kind: int, before: tuple[float, ...], form: str, act_bits: int, tmp_path: Path
) -> None:
    path, _ = llama(tmp_path)
    header = read_header(path)
    fields = {key: value for key, value in header.fields.items() if isinstance(value, (int, float, str))}
    tensors = {
        name: (F32 if tensor.type.name == "F32" else Q4_0, tensor.shape, header.file.read(tensor.begin, tensor.end))
        for name, tensor in header.tensors.items()
    }
    rows, columns = tensors["token_embd.weight"][1]
    scales = torch.tensor(before) * torch.exp2(torch.randint(-4, 4, (rows * columns // 32, 1)).float())
    codes = torch.randint(0, 256, (len(scales), 32 if kind == 8 else 16), dtype=torch.uint8)
    raw = np.concatenate([scales.half().numpy().view(np.uint8), codes.numpy()], 1).tobytes()
    write(path, fields, {**tensors, "token_embd.weight": (kind, (rows, columns), raw)})
    expected = open_foreign(path)[1].layers["model.embed_tokens"].read().dequantize()
    model, report = nybble.load_pretrained(path, act_bits=act_bits)
    table, head = model.model.embed_tokens, model.lm_head
    (row,) = [row for row in report.layers if "embed_tokens" in row.name or "lm_head" in row.name]
    assert row.exact is (kind != 20 or act_bits == 16)  # books have no integers
    assert table.weight_id == head.weight_id
    if row.exact:
        assert torch.equal(table(TOKENS), expected[TOKENS])
        assert head.layout.endswith(f"+{form}")
    assert torch.equal(table(TOKENS), head.dequantized_weight()[TOKENS])
    hidden = torch.randn(3, columns)
    close = torch.nn.functional.linear(hidden, head.dequantized_weight())
    assert (head(hidden) - close).norm() < (1e-3 if act_bits == 16 else 0.05) * close.norm()
    nybble.save(model, tmp_path / "own")
    again = nybble.load(transformers.LlamaForCausalLM(model.config), tmp_path / "own").eval()
    assert again.lm_head.weight_id == again.model.embed_tokens.weight_id
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_rows_of_other_architectures_stay_in_order(architecture: str, tmp_path: Path) -> None:
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture]
    config = getattr(transformers, f"{kind}Config")(**SIZES, **HEADS, head_dim=16, rope_theta=5000.0, rms_norm_eps=1e-5)
    dense = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    write(tmp_path / "model.gguf", fields_of(config, architecture), tensors_of(dict(dense.named_parameters()), {}))
    model, _ = nybble.load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_experts_of_all_in_one_tensor(tmp_path: Path) -> None:
    sizes = SIZES | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(
        **sizes, **HEADS, head_dim=16, rope_theta=5000.0, rms_norm_eps=1e-5, norm_topk_prob=True
    )
    dense = transformers.Qwen3MoeForCausalLM(config).eval()
    weights = dict(dense.named_parameters())
    tensors = {}
    for block in range(2):
        held = dense.model.layers[block].mlp.experts
        gate_up, down = held.gate_up_proj, held.down_proj
        (first, new), (second, other) = q4_0(gate_up.data[:, :32]), q4_0(gate_up.data[:, 32:])
        raw, last = q4_0(down.data)
        gate_up.data, down.data = torch.cat((new, other), 1), last
        for stem, data, shape in (
            ("gate", first, (4, 32, 64)),
            ("up", second, (4, 32, 64)),
            ("down", raw, (4, 64, 32)),
        ):
            tensors[f"blk.{block}.ffn_{stem}_exps.weight"] = (Q4_0, shape, data)
    tensors |= tensors_of({name: value for name, value in weights.items() if "experts" not in name}, {})
    for name, value in weights.items():
        if name.endswith("mlp.gate.weight"):  # the router stays dense in files
            tensors[file_name(name)] = (F32, tuple(value.shape), value.detach().numpy().tobytes())
    fields = fields_of(config, "qwen3moe")
    told = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    write(tmp_path / "model.gguf", fields | {f"qwen3moe.{key}": value for key, value in told.items()}, tensors)
    model, report = nybble.load_pretrained(tmp_path)
    assert all(row.exact for row in report.layers)
    assert sum("experts" in row.name for row in report.layers) == 2 * 4 * 2
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(experts.gate_up_proj[3].dequantized_weight(), dense.model.layers[1].mlp.experts.gate_up_proj[3])
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_import_writes_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, dense = llama(tmp_path)
    out = tmp_path / "out"
    assert main(["import", str(path), "--out", str(out)]) == 0
    assert "15 of 15 layers are held exactly" in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.architectures == ["LlamaForCausalLM"]
    with nybble.skeleton():
        again = transformers.AutoModelForCausalLM.from_config(config).eval()
    nybble.load(again, out)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_floats_keep_their_dtype(tmp_path: Path) -> None:
    path, dense = llama(tmp_path)
    config, tensors = dense.config, tensors_of(dict(dense.named_parameters()), {"attn_q": 4, "attn_k": 2})
    table = dense.model.embed_tokens.weight.detach()
    tensors["token_embd.weight"] = (F16, tuple(table.shape), table.half().numpy().tobytes())
    write(path, fields_of(config, "llama"), tensors)
    model, _ = nybble.load_pretrained(path)
    assert model.model.embed_tokens.weight.dtype == torch.float16
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- split files


def split(dense: Any, folder: Path) -> list[Path]:
    tensors = tensors_of(dict(dense.named_parameters()), {"attn_q": 4, "attn_k": 2})
    fields, names = fields_of(dense.config, "llama"), list(tensors)
    folder.mkdir()
    paths = []
    for i, mine in enumerate((names[:5], names[5:9], names[9:])):
        told = {"split.no": i, "split.count": 3, "split.tensors.count": len(names)}
        paths.append(folder / f"tiny-{i + 1:05}-of-00003.gguf")
        write(paths[-1], (fields if i == 0 else {}) | told, {name: tensors[name] for name in mine})
    return paths


def test_files_of_one_model_are_read_together(tmp_path: Path) -> None:
    dense = llama(tmp_path)[1]
    paths = split(dense, tmp_path / "split")
    for given in (tmp_path / "split", paths[0]):
        model, report = nybble.load_pretrained(given)
        assert len(report.layers) == 15
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    paths[1].rename(tmp_path / "gone.gguf")
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: cannot be opened"):
        open_foreign(paths[0])
    (tmp_path / "gone.gguf").rename(paths[1])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"00003.*split\.no and split\.count \(1, 3\): must be \(2, 3\)"):
        open_foreign(paths[0])


# --- fields

FIELDS = {
    "general.architecture": "llama",
    **{f"llama.{key}": 8 for key in ("block_count", "embedding_length", "attention.head_count", "context_length")},
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
}
SHAPES = {"token_embd.weight": (96, 64)}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"general.architecture": "falcon"}, r"'falcon': as a model, only llama, qwen2, qwen3, qwen3moe are read"),
        ({"llama.block_count": None}, r"llama\.block_count None: must be a whole number above 0"),
        ({"llama.block_count": True}, r"llama\.block_count True: must be"),
        ({"llama.embedding_length": -1}, r"llama\.embedding_length -1: must be"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"epsilon nan: must be a number above 0"),
        ({"llama.attention.sliding_window": 512}, r"sliding_window 512: must be 0 or left out"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type 'yarn': must be 'none'"),
        ({"llama.expert_count": 8}, r"expert_count 8: its experts are not read"),
    ],
)
def test_fields_that_are_wrong_or_not_read_are_named(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(CheckpointError, match=rule):
        config_of(FIELDS | change, SHAPES, (), None)


def test_the_scaling_of_llama_3_is_found() -> None:
    settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": "llama3", "factor": 8.0, **settings}
    told = transformers.LlamaConfig(**SIZES, **HEADS, head_dim=64, rope_theta=500000.0, rope_scaling=dict(scaling))
    model = transformers.LlamaModel(told)
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    fields = FIELDS | {"llama.attention.key_length": 64, "llama.rope.freq_base": 500000.0}
    found = config_of(fields, SHAPES, (), plain / model.rotary_emb.inv_freq)
    assert found["rope_scaling"] == scaling
    again = transformers.LlamaConfig.from_dict(json.loads(json.dumps(found)))
    assert torch.equal(transformers.LlamaModel(again).rotary_emb.inv_freq, model.rotary_emb.inv_freq)
    with pytest.raises(CheckpointError, match="not the scaling of Llama 3"):
        config_of(fields, SHAPES, (), torch.linspace(1, 8, 32))
