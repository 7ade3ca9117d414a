"""Whole ONNX models: MatMulNBits weights put into a model that the user has. Needs onnx."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nybble
from nybble.__main__ import main
from nybble.checkpoint import CheckpointError
from nybble.foreign import open_foreign
from nybble.foreign.choose import choose

onnx = pytest.importorskip("onnx")


class Block(nn.Module):
    """Layers in the ways that exporters name them: in a ModuleList, in a Sequential, and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)])
        self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU())
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(self.net(x)))
        return out


# Module -> the path of its node, as torch's exporter writes it.
NODES = {
    "layers.0": "/layers.0/MatMul",
    "layers.1": "/layers.1/MatMul",
    "net.0": "/net/net.0/MatMul",
    "head": "/head/MatMul",
}


def write(path: Path, stems: Mapping[str, str], nodes: Mapping[str, str], bits: int = 4) -> dict[str, Tensor]:
    """A model with the layers of Block: ``stems`` name their weights. Returns the weights, and biases of ``head``."""
    made, initializers, weights = [], [], {}
    for i, (name, stem) in enumerate(stems.items()):
        n, k = (dict(Block().named_modules())[name].weight).shape
        blocks = k // 32
        codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(i))
        scale = torch.rand(n, blocks, generator=torch.Generator().manual_seed(i)) + 0.01
        pairs = codes.view(n, k // 2, 2)
        packed = (pairs[..., 0] | pairs[..., 1] << 4) if bits == 4 else codes
        names = {"B": f"{stem}_Q{bits}", "scales": f"{stem}_scales"}
        arrays = {"B": packed.to(torch.uint8).view(n, blocks, -1), "scales": scale}
        if name == "head":
            names["bias"], arrays["bias"] = f"{stem}_bias", torch.arange(n) / 8
            weights["head.bias"] = arrays["bias"]
        initializers += [onnx.numpy_helper.from_array(arrays[part].numpy(), names[part]) for part in names]
        inputs = [f"x{i}", names["B"], names["scales"], "", "", names.get("bias", "")]
        told = {"N": n, "K": k, "bits": bits, "block_size": 32}
        made.append(
            onnx.helper.make_node(
                "MatMulNBits", inputs, [f"y{i}"], name=f"{nodes[name]}_Q{bits}", domain="com.microsoft", **told
            )
        )
        weights[name] = ((codes - (1 << bits - 1)).view(n, blocks, 32) * scale[..., None]).view(n, k)
    graph = onnx.helper.make_graph(made, "graph", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), path)
    return weights


BY_WEIGHT = {name: f"{name}.weight" for name in NODES}
NUMBERED = {name: f"onnx::MatMul_{i}" for i, name in enumerate(NODES)}


def check(model: nn.Module, before: nn.Module, weights: dict[str, Tensor]) -> None:
    """The layers have the weights, and everything else is as before."""
    for name in NODES:
        layer = model.get_submodule(name)
        assert isinstance(layer, nybble.nn.Linear)
        assert torch.equal(layer.dequantized_weight(), weights[name])
    assert torch.equal(model.get_parameter("head.bias"), weights["head.bias"])
    for name in ("net.0.bias", "norm.weight", "norm.bias"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name)), name


@pytest.mark.parametrize("stems", [BY_WEIGHT, NUMBERED], ids=["named by weight", "named by node"])
def test_layers_go_into_a_given_model(stems: dict[str, str], tmp_path: Path) -> None:
    weights = write(tmp_path / "model.onnx", stems, NODES)
    torch.manual_seed(0)
    model, before = Block(), Block()
    before.load_state_dict(model.state_dict())
    loaded, report = nybble.load_pretrained(tmp_path / "model.onnx", model=model)
    assert loaded is model
    assert {row.name for row in report.layers} == NODES.keys()
    assert all(row.exact for row in report.layers)
    check(model, before, weights)
    for name in NODES:
        before.get_submodule(name).weight.data = weights[name]
    before.head.bias.data = weights["head.bias"]
    x = torch.randn(3, 64)
    expected = before(x)
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_names_that_differ_are_told(tmp_path: Path) -> None:
    others = {name: f"part{i}.weight" for i, name in enumerate(NODES)}
    weights = write(tmp_path / "model.onnx", others, NODES)
    model, before = Block(), Block()
    before.load_state_dict(model.state_dict())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="part0: the model has no such module"):
        nybble.load_pretrained(tmp_path / "model.onnx", model=model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    names = {f"part{i}": name for i, name in enumerate(NODES)}
    with pytest.raises(ValueError, match="names: 'other': must be a layer of the checkpoint, such as part0"):
        nybble.load_pretrained(tmp_path / "model.onnx", model=model, names={"other": "head"})
    with pytest.raises(ValueError, match="must give each layer of the checkpoint a name of its own"):
        nybble.load_pretrained(tmp_path / "model.onnx", model=model, names={"part0": "part1"})
    nybble.load_pretrained(tmp_path / "model.onnx", model=model, names=names)
    check(model, before, weights)


def test_what_the_file_does_not_have_needs_values(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", BY_WEIGHT, NODES)
    with torch.device("meta"):
        model = Block()
    with pytest.raises(CheckpointError, match=r"net\.0\.bias: is missing in the checkpoint"):
        nybble.load_pretrained(tmp_path / "model.onnx", model=model)


def test_without_a_model_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", BY_WEIGHT, NODES)
    with pytest.raises(CheckpointError, match="load_pretrained needs model="):
        nybble.load_pretrained(tmp_path / "model.onnx")


@pytest.mark.parametrize("bits", [4, 8])
def test_inspect_tells_the_layers(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "model.onnx", NUMBERED, NODES, bits)
    assert main(["inspect", str(tmp_path / "model.onnx"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "onnx"
    assert {row["name"]: tuple(row["shape"]) for row in told["layers"]}["head"] == (16, 96)
    assert bits == 8 or told["exact"] == len(NODES)
    assert told["other"] == {"tensors": 1, "nbytes": 64}


def outside(path: Path) -> Path:
    """The same model with its tensors in another file."""
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


def test_tensors_may_be_in_another_file(tmp_path: Path) -> None:
    weights = write(tmp_path / "model.onnx", BY_WEIGHT, NODES)
    whole = {name: row.nbytes for name, row in open_foreign(tmp_path / "model.onnx")[1].layers.items()}
    path = outside(tmp_path / "model.onnx")
    assert path.stat().st_size < 4000
    opened = open_foreign(path)[1]
    assert {name: row.nbytes for name, row in opened.layers.items()} == whole
    assert [file.path.name for file in opened.files] == ["model.data"]
    model, before = Block(), Block()
    before.load_state_dict(model.state_dict())
    nybble.load_pretrained(path, model=model)
    check(model, before, weights)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("location", "../model.data", r"location '\.\./model\.data': must be the name of a file beside the graph"),
        ("location", "..", "must be the name of a file beside"),
        ("location", "", "must be the name of a file beside"),
        ("location", "other.data", r"other\.data: cannot be opened"),
        ("offset", "-1", r"offset '-1': must be a number of bytes"),
        ("offset", "1e3", "must be a number of bytes"),
        ("offset", "99999999", r"beyond the \d+ bytes of model\.data"),
        ("length", "99999999", r"beyond the \d+ bytes of model\.data"),
        ("length", "9" * 30, "must be a number of bytes"),
        ("length", "8", r"length: 8 bytes, must be \d+"),
        ("mode", "x", r"external_data: 'mode': must be one of location"),
    ],
)
def test_wrong_places_in_another_file_are_named(key: str, value: str, rule: str, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", BY_WEIGHT, NODES)
    path = outside(tmp_path / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    entries = {entry.key: entry for entry in tensor.external_data}
    if key in entries:
        entries[key].value = value
    else:
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=rule):
        open_foreign(path)[1].layers["layers.0"].read()


@pytest.mark.parametrize("flat", [False, True])
def test_zero_points_may_be_floats(flat: bool, tmp_path: Path) -> None:
    weights = write(tmp_path / "model.onnx", BY_WEIGHT, NODES)
    model = onnx.load(tmp_path / "model.onnx")
    zeros = torch.rand(64, 2) * 4 + 6
    stored = zeros.flatten() if flat else zeros
    model.graph.initializer.append(onnx.numpy_helper.from_array(stored.numpy(), "zeros"))
    model.graph.node[0].input[3] = "zeros"
    onnx.save(model, tmp_path / "model.onnx")
    read = open_foreign(tmp_path / "model.onnx")[1].layers["layers.0"].read()
    scale = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) + 0.01  # as write has made it
    codes = (weights["layers.0"].view(64, 2, 32) / scale[..., None]).round() + 8
    assert torch.equal(read.dequantize(), ((codes - zeros[..., None]) * scale[..., None]).view(64, 64))
    chosen = choose(read, 16)
    assert chosen.why == "the library rounds twice in float32, so that last bits differ"
    assert chosen.sqnr_db > 120


def test_a_file_that_protobuf_cannot_hold_is_refused_unread(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, (1 << 31) + 1)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match=r"model\.onnx: 2147483649 bytes: must be at most 2147483648"):
        nybble.load_pretrained(path, model=nn.Sequential(nn.Linear(32, 8)))
