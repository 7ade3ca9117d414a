#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: tensors of torch.float4_e2m1fn_x2 (dtype F4: mxfp4, nvfp4) are written, and read again by load_file
# and get_tensor alone.
#
# Expected: what save_file writes, every reader of the same package reads, or says that it does not take the dtype. save_file refuses
# dtypes that it does not know.
# Seen, for a tensor of shape (4, 8), 8 bytes of two codes in a row:
#   - the header says [4, 16], so get_slice(...).get_shape() is twice as wide as the tensor that get_tensor returns;
#   - each slice raises "shape '[4, 16]' is invalid for input of size 32", also one of whole rows, which cuts no byte, and [:];
#   - safetensors.torch.load, on the bytes that safetensors.torch.save made, raises KeyError: 'F4';
#   - of an F8_E8M0 tensor, its scales, slices are right, but load raises KeyError as well.
# Why it matters: slices are how the ranks of tensor parallelism read their part of a weight. A checkpoint that one process loads
# then fails on several, with an error about a shape that the model does not have.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
"$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, load_file, save, save_file

assert safetensors.__version__ == "0.8.0"
assert torch.__version__.startswith("2.13.0")
path = Path(sys.argv[1], "model.safetensors")
codes = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
tensors = {"weight": codes.view(torch.float4_e2m1fn_x2), "scale": torch.ones(4, 1).to(torch.float8_e8m0fnu)}
save_file(tensors, path)
whole = load_file(path)["weight"]
assert whole.shape == (4, 8)
assert torch.equal(whole.view(torch.uint8), codes)
print("load_file: the tensor that was saved,", tuple(whole.shape))
with safetensors.safe_open(path, "pt") as file:
    part = file.get_slice("weight")
    print("get_slice: get_shape() is", part.get_shape())
    assert part.get_shape() == [4, 16]
    for name, index in {":": slice(None), "0:2": slice(0, 2), ":, 0:8": (slice(None), slice(0, 8))}.items():
        try:
            part[index]
        except RuntimeError as error:
            assert "shape '[4, 16]' is invalid for input of size 32" in str(error), error
            print(f"get_slice(...)[{name}]: {error}")
        else:
            sys.exit("slices are read now")
    assert file.get_slice("scale")[1:3].float().tolist() == [[1.0], [1.0]]
for name in tensors:
    try:
        load(save({name: tensors[name]}))
    except KeyError as error:
        assert str(error) in ("'F4'", "'F8_E8M0'"), error
        print(f"load(save({name})): KeyError: {error}")
    else:
        sys.exit("load reads it now")
PY
