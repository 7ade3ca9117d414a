"""torch.export in a fresh process, and ONNX files in onnxruntime, against the layers themselves."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import nybble
from nybble.nn import Embedding, Linear

pytest.importorskip("safetensors")
from safetensors.torch import save_file

K, N, IDS = 96, 40, 50

LOAD = """
import sys, torch
from safetensors.torch import load_file
{first}
data = load_file(sys.argv[1] + "/data.safetensors")
assert torch.equal(torch.export.load(sys.argv[1] + "/model.pt2").module()(data["x"]), data["expected"])
"""


def fresh_process(folder, first):
    command = [sys.executable, "-c", LOAD.format(first=first), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, x = tmp_path_factory.mktemp("program"), torch.randn(7, K)
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 20)).eval()
    nybble.quantize(model, "w4a8g32", goal="memory")
    program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(program, folder / "model.pt2")
    with torch.no_grad():
        save_file({"x": x, "expected": model(x)}, folder / "data.safetensors")
    return folder


def test_a_saved_program_runs_in_a_fresh_process(saved):
    found = fresh_process(saved, "import nybble")
    assert found.returncode == 0, found.stderr


def test_a_process_without_nybble_is_told_what_to_import(saved):
    found = fresh_process(saved, "assert 'nybble' not in sys.modules")
    assert found.returncode != 0
    assert "failed to resolve torch.ops.nybble.linear.default" in found.stderr
    assert "import the custom op" in found.stderr


# --- ONNX

# Scheme -> what it becomes. The tolerances are relative, in the Frobenius norm: float rounding, or activations that
# onnxruntime rounds to int8 block by block.
FLOAT, ROUNDED = 1e-6, 0.03
LAYERS = {
    "w8a8": ("MatMulInteger", FLOAT),
    "w8a7": ("MatMulInteger", FLOAT),
    "w8a8static": ("MatMulInteger", FLOAT),
    "w8a8asym": ("MatMulNBits", ROUNDED),
    "w8a8g32": ("MatMulNBits", ROUNDED),
    "w4a8": ("MatMulNBits", ROUNDED),
    "w8a16": ("MatMulNBits", FLOAT),
    "w4a16": ("MatMulNBits", FLOAT),
    "w4a16g64asym": ("MatMulNBits", FLOAT),
    "w4a16g32order": ("MatMulNBits", FLOAT),
    "w4nfa16g64": ("MatMul of dequantized codes", FLOAT),
    "w4ka16g32": ("MatMul of dequantized codes", FLOAT),
    "w3a16g32": ("MatMul of dequantized codes", FLOAT),
    "w16a16": ("MatMul of dequantized codes", FLOAT),
}
TABLES = ("w8a16", "w4a16g32asym", "w4nfa16g64")


class Many(nn.Module):
    """A layer of each scheme, on one input, and tables of embeddings; one layer in half precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleDict({name: self.linear(name) for name in LAYERS})
        self.tables = nn.ModuleDict({name: Embedding.from_dense(nn.Embedding(IDS, K), name) for name in TABLES})
        self.halved = self.linear("w4a16g32").half()
        self.conv = nn.Sequential(nn.Conv1d(4, 6, 3))
        nybble.quantize(self.conv, "w8a16", goal="memory")

    @staticmethod
    def linear(scheme):
        dense = nn.Linear(K, N, bias=scheme != "w8a16")
        return Linear.from_dense(dense, scheme, act_range=(-3.0, 4.0) if "static" in scheme else None)

    def forward(self, x, ids):
        found = [layer(x) for layer in (*self.layers.values(),)]
        found += [table(ids) for table in self.tables.values()]
        return (*found, self.halved(x.half()).float(), self.conv(x[:, :4]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    model, path = Many().eval(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    x, ids = torch.randn(2, 5, K), torch.randint(IDS, (2, 3))
    before = dict(model.named_modules())
    report = nybble.export_onnx(
        model,
        (x, ids),
        path,
        dense=True,
        input_names=["x", "ids"],
        dynamic_shapes=({0: torch.export.Dim("batch")}, {0: torch.export.Dim("lists")}),
        verbose=False,
    )
    assert dict(model.named_modules()) == before
    return model, report, ort.InferenceSession(str(path)), path


def test_each_layer_becomes_its_operator(exported):
    onnx = pytest.importorskip("onnx")
    _, report, _, path = exported
    assert {name: report[f"layers.{name}"] for name in LAYERS} == {name: op for name, (op, _) in LAYERS.items()}
    assert report["halved"] == "MatMulNBits"
    assert report["conv.0"] == "dense"
    nodes = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    for op in ("MatMulInteger", "MatMulNBits"):
        assert nodes.count(op) == list(report.values()).count(op) > 0


@torch.no_grad()
def test_onnxruntime_computes_what_the_layers_do(exported):
    model, report, session, _ = exported
    x, ids = torch.randn(3, 5, K), torch.randint(IDS, (4, 3))
    x[0, 0] = 0  # a row without a scale
    wanted = model(x, ids)
    found = [torch.from_numpy(one) for one in session.run(None, {"x": x.numpy(), "ids": ids.numpy()})]
    tolerances = [*(tolerance for _, tolerance in LAYERS.values()), *[0.0] * len(TABLES), 2e-3, FLOAT]
    for name, one, other, tolerance in zip([*report], found, wanted, tolerances, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm(), name
        assert tolerance != ROUNDED or not torch.equal(one, other)


def test_what_has_no_form_is_named():
    pytest.importorskip("onnxscript")
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 6, 3), "lstm": nn.LSTM(8, 16), "fc": nn.Linear(8, 8)})
    nybble.quantize(model, "w8a16", goal="memory")
    with pytest.raises(ValueError, match=r"model: conv \(Conv1d\), lstm \(LSTM\): have no form in ONNX.*dense=True"):
        nybble.export_onnx(model, (), "never.onnx")
    with pytest.raises(ValueError, match=r"model: lstm \(LSTM\): have no form"):
        nybble.export_onnx(model, (), "never.onnx", dense=True)
    with pytest.raises(ValueError, match="has no quantized modules"):
        nybble.export_onnx(nn.Linear(3, 3), (), "never.onnx")
    with pytest.raises(ValueError, match="is a quantized module itself"):
        nybble.export_onnx(model["fc"], (), "never.onnx")


def test_the_model_is_whole_after_an_error(tmp_path):
    pytest.importorskip("onnxscript")
    model = nn.Sequential(Many.linear("w8a8"))
    with pytest.raises(torch.onnx.OnnxExporterError):
        nybble.export_onnx(model, (torch.randn(3, K + 1),), tmp_path / "never.onnx", verbose=False)
    assert type(model[0]) is Linear
    assert model(torch.randn(3, K)).shape == (3, N)


def test_without_onnxscript_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'nybble\[onnx\]'"):
        nybble.export_onnx(nn.Sequential(Many.linear("w8a8")), (), "never.onnx")
