"""nybble.save_pretrained: what is written equals what other libraries wrote, byte for byte, and says what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.foreign import open_foreign
from nybble.foreign.bits import pack_stream, unpack_stream
from nybble.foreign.choose import choose
from nybble.foreign.fit import fit
from nybble.foreign.shards import Shards
from nybble.foreign.tensors import Tensors
from nybble.nn import Embedding, Linear, SparseLinear
from nybble.weights.activations import ActScale
from nybble.weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data" / "foreign"
K_PROJ = "model.layers.1.self_attn.k_proj"


class Tree(nn.Module):
    """A module with one child under a dotted name."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        first, _, rest = name.partition(".")
        self.add_module(first, Tree(rest, child) if rest else child)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


# --- there and back again


@pytest.mark.parametrize(
    ("name", "format", "act_bits"),
    [
        ("ct-w4a16-g128", "compressed-tensors", 16),
        ("ct-w4a16-asym-g32-edge", "compressed-tensors", 16),
        ("ct-w4a8-g128", "compressed-tensors", 8),
        ("ct-w4a16-g64-moe", "compressed-tensors", 16),
        ("ct-w8a8-dynamic", "compressed-tensors", 8),
        ("gptq-w4-g128", "gptq", 16),
        ("gptq-w4-g32-asym-edge", "gptq", 16),
        ("gptq-v2-w4-g32-asym-edge", "gptq-v2", 16),
        ("gptq-w4-g64-gpt2", "gptq", 16),
        ("gptq-w4-g64-moe", "gptq", 16),
        ("gptq-w8-g128", "gptq", 16),
        ("gptq-w4-g128-desc-act", "gptq", 16),
    ],
)
def test_what_was_read_exactly_is_written_again_byte_for_byte(
    name: str, format: str, act_bits: int, tmp_path: Path
) -> None:
    opened = open_foreign(DATA / name)[1]
    ((layer, lazy),) = opened.layers.items()
    weight = lazy.read()
    found = fit(weight, act_bits)
    if found.scheme is None or found.quantized is None:
        pytest.skip(f"no scheme holds it: {found.why}")
    dtype = torch.bfloat16 if format == "compressed-tensors" else torch.float16
    bias = opened.parts[f"{layer}.bias"].read() if f"{layer}.bias" in opened.parts else None
    module = Linear.from_quantized(found.quantized, weight.shape[1], bias, found.scheme, dtype)
    report = nybble.save_pretrained(Tree(layer, module), tmp_path / "out", format=format)
    assert report.layers[0].sqnr_db == float("inf")
    same_tensors(tmp_path / "out", DATA / name)
    same_settings(config_of(tmp_path / "out"), json.loads((DATA / name / "config.json").read_text()))
    assert torch.equal(open_foreign(tmp_path / "out")[1].layers[layer].read().dequantize(), weight.dequantize())


def same_tensors(mine: Path, theirs: Path) -> None:
    found, expected = load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def same_settings(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """What both configurations say is the same, but for the activations, which nybble rounds with a zero point."""
    theirs = theirs.get("quantization_config", theirs)
    for key in ("quant_method", "format", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "method"):
        assert mine.get(key) == theirs.get(key, mine.get(key)), key
    if "config_groups" in theirs:
        ((first,), (second,)) = mine["config_groups"].values(), theirs["config_groups"].values()
        assert first["targets"] == second["targets"]
        for key, value in first["weights"].items():
            assert second["weights"].get(key) == value, key


def test_static_activations_are_written_as_the_library_does(tmp_path: Path) -> None:
    weight = open_foreign(DATA / "ct-w8a8-static-asym")[1].layers[K_PROJ].read()
    assert weight.input_scale is not None
    assert weight.input_zero is not None
    act = ActScale(weight.input_scale.float(), weight.input_zero)
    quantized = QuantizedWeight(weight.codes, weight.scale.float())
    module = Linear.from_quantized(quantized, 256, None, "w8a8static", torch.bfloat16, act)
    nybble.save_pretrained(Tree(K_PROJ, module), tmp_path / "out", format="compressed-tensors")
    same_tensors(tmp_path / "out", DATA / "ct-w8a8-static-asym")
    (group,) = config_of(tmp_path / "out")["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"], inputs["symmetric"]) == ("tensor", False, False)


def test_two_of_four_are_written_as_the_old_library_did(tmp_path: Path) -> None:
    name = "ct-old-sparse24-w8a8"
    weight = open_foreign(DATA / name)[1].layers[K_PROJ].read()
    quantized = QuantizedWeight(weight.codes, weight.scale.float())
    module = SparseLinear.from_quantized(quantized, 256, None, "sp24w8a8", torch.bfloat16)
    report = nybble.save_pretrained(Tree(K_PROJ, module), tmp_path / "sparse", format="compressed-tensors-sparse")
    assert "0.15 and later do not read it" in str(report)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "sparse", DATA / name))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        # The old library kept zeros of its choice where it had lost one of two codes (-128).
        assert (found[key] != tensor).float().mean() < 0.002, key
    config = config_of(tmp_path / "sparse")
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["sparsity_config"]["targets"] == [K_PROJ]
    assert [*config["config_groups"]["group_0"]] == [
        "format",
        "weights",
        "input_activations",
        "output_activations",
        "targets",
    ]
    nybble.save_pretrained(Tree(K_PROJ, module), tmp_path / "plain", format="compressed-tensors")
    for out in ("sparse", "plain"):
        again = open_foreign(tmp_path / out)[1].layers[K_PROJ].read()
        assert torch.equal(again.dequantize(), weight.dequantize())
    assert config_of(tmp_path / "plain")["sparsity_config"] == {}


def test_two_of_four_floats(tmp_path: Path) -> None:
    weight = torch.randn(16, 32).to(torch.bfloat16).reshape(16, 8, 4)
    weight[:, :, 1], weight[:, ::2, 2], weight[0] = 0, 0, 0
    weight[:, 1::2, 3] = 0
    dense = nn.Linear(32, 16, dtype=torch.bfloat16)
    dense.weight.data = weight.reshape(16, 32)
    model = nn.Sequential(SparseLinear.from_dense(dense, "sp24w16a16"), model_of("w4a16g32", 8, 32)[0])
    nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors-sparse")
    opened = open_foreign(tmp_path / "out")[1]
    assert list(opened.layers) == ["1"]
    assert torch.equal(opened.parts["0.weight"].read(), dense.weight.detach())
    assert torch.equal(opened.parts["0.bias"].read(), dense.bias.detach())
    assert config_of(tmp_path / "out")["ignore"] == ["0"]


# --- every scheme


def model_of(scheme: str, n: int = 16, k: int = 64, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    weight, parsed = torch.randn(n, k), Scheme.parse(scheme)
    cls = SparseLinear if parsed.sparsity is not None else Linear
    if parsed.sparsity is not None:
        weight[:, ::2] = 0
        if scheme.startswith("bs"):
            weight[:, : k // 2] = 0
    act = ActScale(torch.tensor([0.25]), torch.tensor([3], dtype=torch.int8)) if parsed.static else None
    quantized = quantize_weight(weight, parsed)
    bias = torch.randn(n).to(dtype)
    return nn.Sequential(cls.from_quantized(quantized, k, bias, parsed, dtype, act), nn.LayerNorm(n, dtype=dtype))


SCHEMES = [
    "w8a16", "w8a8", "w8a7", "w8a8static", "w4a16", "w4a16g32", "w4a16g32asym", "w4a16asym", "w4a8g64", "w4a8g32asym",
    "sp50w8a8", "sp24w4a16g32", "sp24w8a8static", "bs16x4w8a8",
]  # fmt: skip


@pytest.mark.parametrize("format", ["compressed-tensors", "compressed-tensors-sparse", "gptq", "gptq-v2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_the_same_weight(scheme: str, format: str, tmp_path: Path) -> None:
    model = model_of(scheme)
    report = nybble.save_pretrained(model, tmp_path / "out", format=format, round_scales=format.startswith("gptq"))
    opened = open_foreign(tmp_path / "out")[1]
    assert list(opened.layers) == ["0"]
    assert sorted(opened.parts) == ["0.bias", "1.bias", "1.weight"]
    mine, written = model[0].dequantized_weight(), opened.layers["0"].read().dequantize()
    (row,) = report.layers
    if row.sqnr_db == float("inf"):
        assert torch.equal(written, mine)
    else:
        assert format.startswith("gptq")
        assert "w8" in scheme
        noise = (written - mine).square().sum()
        assert row.sqnr_db == pytest.approx(10 * torch.log10(mine.square().sum() / noise).item(), abs=0.01)
        assert row.sqnr_db > 70
    again = choose(opened.layers["0"].read(), 16)
    assert again.why is None
    assert torch.equal(dequantize_weight(again.quantized, again.scheme, mine.shape[1]), written)
    assert torch.equal(opened.parts["0.bias"].read(), model[0].bias)
    assert row.nbytes == opened.layers["0"].nbytes + 64


@pytest.mark.parametrize("scheme", ["w4a16g32order", "w4a16g32asymorder", "w4a8g64order"])
def test_columns_in_activation_order(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parsed, weight = Scheme.parse(scheme), torch.randn(16, 128)
    order = torch.randperm(128, dtype=torch.int32)
    quantized = replace(quantize_weight(weight[:, order.long()], replace(parsed, ordered=False)), order=order)
    layer = Linear.from_quantized(quantized, 128, None, parsed, torch.float32)
    report = nybble.save_pretrained(nn.Sequential(layer), tmp_path / "out", format="gptq")
    read = open_foreign(tmp_path / "out")[1].layers["0"].read()
    assert torch.equal(read.dequantize(), layer.dequantized_weight())
    assert read.groups is not None
    assert config_of(tmp_path / "out")["desc_act"] is True
    assert "columns in activation order with groups: vLLM refuses them" in str(report)


def test_activations_are_told(tmp_path: Path) -> None:
    nybble.save_pretrained(model_of("w8a8"), tmp_path / "dynamic", format="compressed-tensors")
    (group,) = config_of(tmp_path / "dynamic")["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
    assert group["format"] == "int-quantized"
    report = nybble.save_pretrained(model_of("w8a7"), tmp_path / "seven", format="compressed-tensors")
    assert "activations of 7 bits are told as 8 bits" in str(report)
    report = nybble.save_pretrained(model_of("w4a8g32"), tmp_path / "gptq", format="gptq")
    assert "activations of 8 bits are not told" in str(report)


def test_scales_have_the_dtype_of_the_model_where_that_holds_them(tmp_path: Path) -> None:
    report = nybble.save_pretrained(model_of("w8a8", dtype=torch.bfloat16), tmp_path / "a", format="compressed-tensors")
    assert load_file(tmp_path / "a" / "model.safetensors")["0.weight_scale"].dtype == torch.float32
    assert "transformers rounds them to bfloat16" in " ".join(str(report).split())
    model = model_of("w8a8", dtype=torch.bfloat16)
    report = nybble.save_pretrained(model, tmp_path / "b", format="compressed-tensors", round_scales=True)
    assert load_file(tmp_path / "b" / "model.safetensors")["0.weight_scale"].dtype == torch.bfloat16
    assert 45 < report.layers[0].sqnr_db < 60
    nybble.save_pretrained(model_of("w4a16g32"), tmp_path / "c", format="compressed-tensors")
    assert load_file(tmp_path / "c" / "model.safetensors")["0.weight_scale"].dtype == torch.float32


# --- what cannot be held


@pytest.mark.parametrize(
    ("scheme", "n", "k", "format", "rule"),
    [
        ("w8a16", 16, 64, "gptq", r"0: not all of its float32 scales are float16 \(round_scales=True rounds them\)"),
        ("w4a16g32", 12, 64, "gptq", "0: 12 outputs of 4 bits do not fill whole words"),
        ("w4a16", 16, 60, "gptq", "0: 60 inputs of 4 bits do not fill whole words"),
        ("w4a16g32", 16, 72, "gptq", "0: 72 inputs are no multiple of the group size 32"),
        ("w4a16g32", 16, 72, "compressed-tensors", "0: 72 inputs are no multiple of the group size 32"),
        ("w4a16g32order", 16, 64, "compressed-tensors", "0: its columns are in activation order"),
        ("sp24w16a16", 16, 64, "compressed-tensors", "0: its weights are w16: must be codes of 4 or 8 bits"),
        (
            "w4nfa16g32",
            16,
            64,
            "compressed-tensors",
            "0: its weights are w4nf: must be codes of 4 or 8 bits, not of a table",
        ),
        ("w4nfa16g32", 16, 64, "gptq", "0: its weights are w4nf: must be codes of 4 or 8 bits, not of a table"),
    ],
)
def test_a_layer_that_a_format_cannot_hold_is_named(
    scheme: str, n: int, k: int, format: str, rule: str, tmp_path: Path
) -> None:
    model = nn.Sequential(*model_of(scheme, n, k), *model_of("w4a16g64", 16, 64))
    with pytest.raises(ValueError, match=f"{format} cannot hold {rule}.*; dense=True writes them as floats"):
        nybble.save_pretrained(model, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []
    report = nybble.save_pretrained(model, tmp_path / "out", format=format, dense=True)
    opened = open_foreign(tmp_path / "out")[1]
    assert list(opened.layers) == ["2"]
    assert torch.equal(opened.parts["0.weight"].read(), model[0].dequantized_weight())
    assert torch.equal(opened.parts["0.bias"].read(), model[0].bias)
    assert [(row.name, row.dense) for row in report.layers] == [("0", True), ("2", False)]
    assert "1 of 2 layers are written quantized" in str(report)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_float_minimums_are_not_written_as_zero_points(format: str, tmp_path: Path) -> None:
    layer = model_of("w4a16g32asym", 16, 64)[0]
    held = layer.quantized()
    least = replace(held, zero_point=None, minimum=-held.scale)
    made = Linear.from_quantized(least, 64, None, layer.scheme, torch.float32)
    with pytest.raises(ValueError, match="its groups have float minimums"):
        nybble.save_pretrained(nn.Sequential(made), tmp_path / "out", format=format)


def test_embeddings_are_written_dense_and_it_is_said(tmp_path: Path) -> None:
    table = Embedding.from_dense(nn.Embedding(40, 64, dtype=torch.bfloat16), "w8a16")
    model = nn.Sequential(table, model_of("w4a16g32", dtype=torch.bfloat16)[0])
    report = nybble.save_pretrained(model, tmp_path / "out", format="gptq")
    opened = open_foreign(tmp_path / "out")[1]
    assert torch.equal(opened.parts["0.weight"].read(), table.dequantized_weight())
    assert "0: no format quantizes embeddings" in str(report)


def test_other_modules_are_refused_or_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(64, 64), "conv": nn.Conv2d(16, 16, 3), "fc": nn.Linear(64, 64)})
    nybble.quantize(model, "w8a8", goal="memory")
    with pytest.raises(ValueError, match=r"rnn: is an opened LSTM.*conv: is a Conv2d: formats have linear layers only"):
        nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors")
    report = nybble.save_pretrained(model, tmp_path / "out", format="compressed-tensors", dense=True)
    opened = open_foreign(tmp_path / "out")[1]
    dense = model["rnn"].close()
    for name, value in dense.state_dict().items():
        assert torch.equal(opened.parts[f"rnn.{name}"].read(), value)
    assert opened.parts["conv.weight"].read().shape == (16, 16, 3, 3)
    assert list(opened.layers) == ["fc"]
    assert {row.name: row.dense for row in report.layers} == {"rnn": True, "conv": True, "fc": False}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"format": "awq"}, "format='awq': must be one of 'compressed-tensors', 'compressed-tensors-sparse', 'gptq'"),
        ({"format": "gptq", "shard_bytes": 0}, "shard_bytes=0: must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rule):
        nybble.save_pretrained(model_of("w4a16g32"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model=Sequential: has no layer that gptq holds"):
        nybble.save_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path / "out", format="gptq")
    with pytest.raises(ValueError, match=r"0\.weight: cannot be written; it has no values"):
        nybble.save_pretrained(
            nn.Sequential(nn.Linear(4, 4, device="meta")), tmp_path / "out", format="compressed-tensors"
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        nybble.save_pretrained(model_of("w4a16g32"), tmp_path / "full", format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# --- configurations


def pair(first: str, second: str) -> nn.Module:
    """Three projections of one input, of which the last one has another scheme, and a dense layer."""
    torch.manual_seed(0)
    names = {"q_proj": first, "k_proj": first, "v_proj": second}
    layers = {name: Linear.from_dense(nn.Linear(64, 64), scheme) for name, scheme in names.items()}
    return nn.ModuleDict({"attn": nn.ModuleDict({**layers, "o_proj": nn.Linear(64, 64)}), "lm_head": nn.Linear(64, 8)})


def test_layers_left_dense_are_told(tmp_path: Path) -> None:
    model = pair("w4a16g32", "w4a16g32")
    nybble.save_pretrained(model, tmp_path / "ct", format="compressed-tensors")
    config = config_of(tmp_path / "ct")
    assert config["ignore"] == ["attn.o_proj", "lm_head"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    nybble.save_pretrained(model, tmp_path / "gptq", format="gptq")
    config = config_of(tmp_path / "gptq")
    assert config["dynamic"] == {r"-:^attn\.o_proj$": {}}
    assert config["modules_in_block_to_quantize"] == [["attn.q_proj", "attn.k_proj", "attn.v_proj"]]
    assert config["lm_head"] is False


def test_several_schemes_are_groups(tmp_path: Path) -> None:
    model = pair("w4a16g32", "w8a8")
    report = nybble.save_pretrained(model, tmp_path / "ct", format="compressed-tensors")
    config = config_of(tmp_path / "ct")
    assert config["format"] == "mixed-precision"
    assert {tuple(group["targets"]): group["format"] for group in config["config_groups"].values()} == {
        ("attn.q_proj", "attn.k_proj"): "pack-quantized",
        ("attn.v_proj",): "int-quantized",
    }
    told = " ".join(str(report).split())
    assert "2 settings: load them in transformers without dequantize=True" in told
    assert "vLLM refuses it: q_proj, k_proj, v_proj of attn are not quantized alike" in told
    report = nybble.save_pretrained(model, tmp_path / "gptq", format="gptq", round_scales=True)
    config = config_of(tmp_path / "gptq")
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert config["dynamic"][r"+:^attn\.v_proj$"] == {"bits": 8, "group_size": -1, "sym": True, "desc_act": False}
    assert "told as `dynamic`" in str(report)
    for out in ("ct", "gptq"):
        opened = open_foreign(tmp_path / out)[1]
        for name in ("attn.q_proj", "attn.v_proj"):
            mine = model.get_submodule(name).dequantized_weight()
            torch.testing.assert_close(opened.layers[name].read().dequantize(), mine, rtol=1e-3, atol=0)


def test_a_report_is_json_too(tmp_path: Path) -> None:
    report = nybble.save_pretrained(model_of("w8a8"), tmp_path / "out", format="gptq", round_scales=True)
    found = json.loads(report.to_json())
    assert (found["schema"], found["format"]) == ("nybble.export/1", "gptq")
    (row,) = found["layers"]
    assert (row["exact"], row["dense"], row["scheme"]) == (False, False, "w8a8")
    assert row["sqnr_db"] > 70
    assert max(map(len, str(report).splitlines())) <= 120


# --- files


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 43])
def test_streams_are_packed_as_they_are_unpacked(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8).numpy()
    packed = pack_stream(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert (unpack_stream(packed, bits, count) == codes).all()
    whole = [sum(int(code) << (i * bits) for i, code in enumerate(row)) for row in codes]
    assert [int.from_bytes(row.tobytes(), "little") for row in packed] == whole


TENSORS: dict[str, Tensor] = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "halves": torch.arange(6).to(torch.bfloat16).reshape(2, 3).T,
    "numbers": torch.tensor([[1], [2]]),
    "empty": torch.zeros(0, 4),
    "one": torch.tensor(3.0),
    "more": torch.arange(5, dtype=torch.int32),
}


def test_a_file_is_as_safetensors_writes_it(tmp_path: Path) -> None:
    with Shards(tmp_path, 1 << 20) as shards:
        assert sum(shards.add(name, tensor) for name, tensor in TENSORS.items()) == 7 + 12 + 16 + 0 + 4 + 20
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs")
    for entry in Tensors(tmp_path).entries.values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_a_large_checkpoint_has_several_files_and_an_index(tmp_path: Path) -> None:
    model = model_of("w4a16g32", 64, 128)
    nybble.save_pretrained(model, tmp_path / "one", format="gptq")
    nybble.save_pretrained(model, tmp_path / "many", format="gptq", shard_bytes=1000)
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    count = len(names) - 2
    assert count > 2
    assert names[1:-1] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    one, many = Tensors(tmp_path / "one"), Tensors(tmp_path / "many")
    assert one.entries.keys() == many.entries.keys()
    for name in one.entries:
        assert torch.equal(one.read(name), many.read(name))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(one.nbytes([name]) for name in one.entries)
