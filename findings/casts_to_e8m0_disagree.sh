#!/usr/bin/env bash
# torch 2.13.0, ml_dtypes 0.6.0 (what JAX and NumPy use) and onnx 1.23.2 (its reference evaluator), float32 cast to E8M0, the type
# of scales of MX formats (mxfp4, mxfp8): a byte e that stands for 2^(e - 127), with no sign, no zero and no infinity.
#
# Expected: one byte for one number, at least where the number is a power of two; NaN for what has no byte, such as a negative one.
# Seen:
#   - torch and onnx drop the sign: -4 becomes 4. ml_dtypes gives NaN.
#   - 0 becomes 2^-127 by torch and onnx, NaN by ml_dtypes.
#   - Cast of onnx rounds up unless round_mode says otherwise: 1.25 becomes 2, by the others 1. (The specification of MX rounds down:
#     1.75 becomes 1 there, 2 by all three as they stand.)
#   - So onnx moves a number that E8M0 holds: 2^-127, the least, becomes 2^-126. It is subnormal as a float32, whose bits of the fraction
#     are taken for something to round up.
#   - Above the largest byte onnx gives 2^127, torch and ml_dtypes NaN.
# Why it matters: the three meet when a model with MX weights goes from one to another, and a scale that is off by one byte doubles
# 32 weights. Nothing raises; sign and zero show a fault upstream, which two of three hide.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, reference

assert torch.__version__.startswith("2.13.0")
assert (ml_dtypes.__version__, onnx.__version__) == ("0.6.0", "1.23.2")
numbers = {"4": 4.0, "-4": -4.0, "0": 0.0, "1.25": 1.25, "1.75": 1.75, "2^-127": 2.0**-127, "1.75 x 2^127": 1.75 * 2.0**127, "NaN": np.nan}
x = np.array(list(numbers.values()), np.float32)


def by_onnx(**mode):
    there = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E8M0, **mode)
    back = helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in "xz"]
    model = helper.make_model(helper.make_graph([there, back], "casts", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 24)])
    onnx.checker.check_model(model)
    return reference.ReferenceEvaluator(model).run(None, {"x": x})[0]


nan, least, most = np.nan, 2.0**-127, 2.0**127
seen = {
    "torch": (torch.from_numpy(x).to(torch.float8_e8m0fnu).float().numpy(), [4, 4, least, 1, 2, least, nan, nan]),
    "ml_dtypes": (x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), [4, nan, nan, 1, 2, least, nan, nan]),
    "onnx": (by_onnx(), [4, 4, least, 2, 2, 2 * least, most, nan]),
    "onnx, round_mode nearest": (by_onnx(round_mode="nearest"), [4, 4, least, 1, 2, least, most, nan]),
    "onnx, round_mode down": (by_onnx(round_mode="down"), [4, 4, least, 1, 1, least, most, nan]),
}
print(f"{'':26}" + "".join(f"{name:>14}" for name in numbers))
for name, (got, expected) in seen.items():
    print(f"{name:26}" + "".join(f"{value:14.4g}" for value in got))
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
PY
