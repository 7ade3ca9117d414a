"""Writes a quantized model as an ONNX file and as an AOTInductor package, and runs both without nybble.

needs: onnxscript onnxruntime safetensors
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import save_file

import nybble

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128)).eval()
nybble.quantize(model, "w8a8", goal="memory")
example, x = torch.randn(4, 128), torch.randn(7, 128)
any_rows = ({0: torch.export.Dim("rows", min=1)},)
with torch.no_grad():
    expected = model(x)

folder = Path(tempfile.mkdtemp())
print(nybble.export_onnx(model, (example,), folder / "model.onnx", input_names=["x"], dynamic_shapes=any_rows))
(y,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"x": x.numpy()})
print(f"ONNX Runtime: at most {(torch.from_numpy(y) - expected).abs().max():.1e} from nybble")
assert torch.allclose(torch.from_numpy(y), expected, rtol=1e-5, atol=1e-6)

print(nybble.aot_package(model, (example,), folder / "package", dynamic_shapes=any_rows))
save_file({"x": x, "expected": expected}, folder / "data.safetensors")
run = """
import sys, torch
from safetensors.torch import load_file
folder = sys.argv[1]
torch.ops.load_library(folder + "/package/libnybble_aot.so")
data = load_file(folder + "/data.safetensors")
expected = data["expected"]
y = torch._inductor.aoti_load_package(folder + "/package/model.pt2")(data["x"])
assert "nybble" not in sys.modules
assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
print(f"AOTInductor: at most {(y - expected).abs().max():.1e} from nybble")
"""
subprocess.run([sys.executable, "-c", run, str(folder)], check=True)  # noqa: S603
