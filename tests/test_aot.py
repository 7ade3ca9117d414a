"""AOTInductor packages: in processes that never import nybble, with Python and without."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nybble
from nybble.dispatch.registry import specs
from nybble.dispatch.written import libraries, plan_text
from nybble.export import aot
from nybble.nn import Embedding, Linear

pytest.importorskip("safetensors")
from safetensors.torch import save_file

K, N = 70, 33


def has_library():
    try:
        libraries()
    except FileNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.skipif(not has_library(), reason="nybble was built without libnybble_aot.so"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++, and there is no g++ on PATH"),
]

RUN = """
import sys
sys.modules["nybble"] = None  # an import fails
import torch
from safetensors.torch import load_file
folder = sys.argv[1]
torch.ops.load_library(folder + "/libnybble_aot.so")
run = torch._inductor.aoti_load_package(folder + "/model.pt2")
data = load_file(folder + "/data.safetensors")
for call in range(2):
    found = run(data[f"{call} x"], data[f"{call} ids"])
    assert len(found) == 5
    for i, one in enumerate(found):
        torch.testing.assert_close(one, data[f"{call} expected {i}"], rtol=1e-5, atol=1e-5)
try:
    torch.ops.nybble_aot.linear(torch.ones(2, 3), *[torch.zeros(4, dtype=torch.uint8)] * 3, 8)
except ValueError as error:
    assert 'plan: must begin with' in str(error), error
else:
    raise AssertionError("a plan of zeros")
assert not any(name.startswith("nybble.") for name in sys.modules)
print("fine")
"""


def as_bytes(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


class Model(nn.Module):
    """Layers with integer and float activations, with and without bias, on inputs of unusual strides, and a table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first = Linear.from_dense(nn.Linear(K, N), "w8a8")
        self.second = Linear.from_dense(nn.Linear(N, K, bias=False), "w4a16g32")
        self.static = Linear.from_dense(nn.Linear(K, N), "w8a8static", act_range=(-4.0, 4.0))
        self.sparse = nn.Sequential(nn.Linear(K, 64))
        nybble.sparsify(self.sparse, "50%", scheme="w8a8", method="magnitude", goal="memory")
        self.narrow = Linear.from_dense(nn.Linear(K, N), "w4a8g32").bfloat16()
        self.table = Embedding.from_dense(nn.Embedding(9, K), "w8a16")

    def forward(self, x, ids):
        y = self.second(torch.relu(self.first(x)))
        turned = self.first(y.transpose(0, 1).contiguous().transpose(0, 1))
        rows = self.table(ids)
        return y, turned, self.static(rows), self.sparse(rows), self.narrow(x.bfloat16()).float()


@pytest.mark.full
def test_a_package_runs_without_nybble(tmp_path):
    model = Model().eval()
    x, ids = torch.randn(3, 5, K), torch.randint(9, (4,))
    dims = ({0: torch.export.Dim("batch", min=1)}, {0: torch.export.Dim("ids", min=1)})
    names = dict(model.named_modules())
    report = nybble.aot_package(model, (x, ids), tmp_path, dynamic_shapes=dims)
    assert report == {
        **dict.fromkeys(("first", "second", "static", "sparse.0", "narrow"), "nybble_aot::linear"),
        "table": "Gather of codes",
    }
    assert dict(model.named_modules()) == names
    data = {}
    with torch.no_grad():
        for call, (batch, count) in enumerate([(2, 3), (17, 40)]):
            x, ids = torch.randn(batch, 5, K), torch.randint(9, (count,))
            data |= {f"{call} x": x, f"{call} ids": ids}
            data |= {f"{call} expected {i}": y.contiguous() for i, y in enumerate(model(x, ids))}
    save_file(data, tmp_path / "data.safetensors")
    found = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "fine"


# Calls the op as a package does, by torch's C interface: no Python, no header of torch.
WITHOUT_PYTHON = """
#include <dlfcn.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>
using Bytes = std::vector<char>;
void* torch_library;
template <class F> F find(const char* name) {
  void* found = dlsym(torch_library, name);
  if (!found) { std::puts(name); std::exit(4); }
  return reinterpret_cast<F>(found);
}
Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
int main(int, char** argv) {
  const std::string folder = argv[2];
  torch_library = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
  if (!torch_library) { std::puts(dlerror()); return 2; }
  void* op = dlopen((folder + "/libnybble_aot.so").c_str(), RTLD_NOW);
  if (!op) { std::puts(dlerror()); return 3; }
  const char* problem = reinterpret_cast<const char* (*)()>(dlsym(op, "nybble_aot_problem"))();
  if (*problem) { std::puts(problem); return 1; }
  const int64_t k = std::atoll(argv[3]), n = std::atoll(argv[4]);
  const auto made = find<int (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                 void**)>("aoti_torch_create_tensor_from_blob");
  const int32_t f32 = find<int32_t (*)()>("aoti_torch_dtype_float32")();
  const int32_t u8 = find<int32_t (*)()>("aoti_torch_dtype_uint8")();
  Bytes held[4];
  uint64_t stack[5];
  const char* names[] = {"x", "packed", "bias", "plan"};
  for (int i = 0; i < 4; i++) {
    held[i] = read(folder + "/" + names[i]);
    const bool floats = i % 2 == 0;
    const int64_t count = static_cast<int64_t>(held[i].size()) / (floats ? 4 : 1);
    const int64_t matrix[] = {count / k, k}, vector[] = {count}, steps[] = {k, 1};
    void* tensor;
    if (made(held[i].data(), i ? 1 : 2, i ? vector : matrix, i ? steps + 1 : steps, 0, floats ? f32 : u8, 0, 0, &tensor))
      return 5;
    stack[i] = reinterpret_cast<uint64_t>(tensor);
  }
  stack[4] = static_cast<uint64_t>(n);
  if (find<int (*)(const char*, const char*, uint64_t*)>("aoti_torch_call_dispatcher")("nybble_aot::linear", "", stack))
    return 6;
  void* y;
  if (find<int (*)(void*, void**)>("aoti_torch_get_data_ptr")(reinterpret_cast<void*>(stack[0]), &y)) return 7;
  const Bytes wanted = read(folder + "/y");
  const char* found = static_cast<const char*>(y);
  std::puts(Bytes(found, found + wanted.size()) == wanted ? "fine" : "other numbers");
}
"""


@torch.no_grad()
def test_the_op_runs_in_a_process_without_python(tmp_path):
    torch.manual_seed(7)
    layer, x = Linear.from_dense(nn.Linear(K, N), "w8a8"), torch.randn(5, K)
    y = layer(x)
    plan = as_bytes(plan_text("w8a8", layer.layout, N, K))
    for name, tensor in {"x": x, "packed": layer.packed, "bias": layer.bias, "plan": plan, "y": y}.items():
        (tmp_path / name).write_bytes(tensor.numpy().tobytes())
    (tmp_path / "main.cpp").write_text(WITHOUT_PYTHON)
    for source, name in zip(libraries(), ("libnybble_aot.so", "libnybble_kernels.so"), strict=True):
        shutil.copyfile(source, tmp_path / name)
    subprocess.run(["g++", "main.cpp", "-o", "main", "-ldl"], cwd=tmp_path, check=True)  # noqa: S607
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    command = [str(tmp_path / "main"), str(torch_library), str(tmp_path), str(K), str(N)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, "fine"), found.stdout + found.stderr


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8g32", "w4a16g64asym", "w8a8g32", "w4ka16g32", "w8a7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_the_op_has_the_bits_of_nybbles(scheme, dtype):
    torch.manual_seed(7)
    aot.load_op()
    layer = Linear.from_dense(nn.Linear(K, N), scheme)
    form = aot._form_of(layer)
    for x in (torch.randn(1, K), torch.randn(K), torch.randn(2, 9, K), torch.randn(70, K), torch.randn(0, K)):
        assert torch.equal(form(x.to(dtype)), layer(x.to(dtype)))
    wide = torch.randn(9, 2 * K, dtype=torch.float32).to(dtype)[:, ::2]
    assert torch.equal(form(wide), layer(wide))


def test_a_plan_lists_every_kernel_that_reads_the_weight_the_fastest_first():
    layer = Linear.from_dense(nn.Linear(K, N), "w8a8")
    layer.pack()
    lines = plan_text("w8a8", layer.layout, N, K).splitlines()
    assert lines[0] == "nybble-plan 1"
    words = [line.split() for line in lines[1:]]
    names = [line[4] for line in words if line[0] == "0"]
    order = [spec.name for spec in reversed(specs())]
    assert names == sorted(names, key=order.index)
    assert names[0] in nybble.explain(layer, m=4096).kernel or names[0] == nybble.explain(layer).kernel
    assert "w8a8_scalar" in names
    assert {line[3] for line in words if line[4].endswith("_scalar")} == {"-"}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": torch.randn(3, K + 1)}, f"x: the last dimension must be {K}"),
        ({"x": torch.randn(3, K).double()}, "x: must be float32, bfloat16 or float16"),
        ({"packed": torch.zeros(8, dtype=torch.uint8)}, "packed: has 8 bytes, needs"),
        ({"packed": torch.zeros(8)}, "packed: must be a contiguous vector of uint8"),
        ({"bias": torch.zeros(N + 1)}, f"bias: must be empty, or a contiguous vector of {N}"),
        ({"out_features": N + 1}, f"out_features={N + 1}: the plan has {N}"),
        ({"plan": as_bytes("nybble-plan 1\n")}, "plan: this CPU has"),
        ({"plan": as_bytes("nybble-plan 1\n0 x\n")}, "plan: cannot read a line"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, match):
    aot.load_op()
    layer = Linear.from_dense(nn.Linear(K, N), "w8a8")
    layer.pack()
    values = {
        "x": torch.randn(3, K),
        "packed": layer.packed,
        "bias": layer.bias.detach(),
        "plan": as_bytes(plan_text("w8a8", layer.layout, N, K)),
        "out_features": N,
    }
    with pytest.raises(ValueError, match=match):
        torch.ops.nybble_aot.linear(*{**values, **changed}.values())


def test_what_has_no_form_is_named(tmp_path):
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 16)})
    nybble.quantize(model, "w8a16", goal="memory")
    with pytest.raises(ValueError, match=r"lstm \(LSTM\): have no form in a package"):
        nybble.aot_package(model, (), tmp_path)
