#!/usr/bin/env bash
# safetensors 0.8.0: save_file takes a tensor called "__metadata__", returns as if all were well, and writes a file that no
# safetensors can open: not this tensor, and none of the others.
#
# Expected: an error when it is saved, as for a tensor of an unknown dtype or one that shares memory: "__metadata__" is the header's
# own key for strings. Or another place for the tensor.
# Seen: the header gets the tensor's entry under that key; with metadata= the key stands in it twice. Opening raises
# SafetensorError ("invalid JSON in header"), and nothing in the file can be read by name any more.
# Why it matters: names are those of a model's parameters and buffers, and a checkpoint is not read at once after it is written. The
# old one may be gone by the time the new one is found to be unreadable.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.2.6
"$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

assert safetensors.__version__ == "0.8.0"
path = Path(sys.argv[1], "model.safetensors")
tensors = {"__metadata__": np.ones(3, np.float32), "weight": np.zeros(2, np.float32)}
for metadata, word in ((None, "expected a string"), ({"format": "np"}, "duplicate field")):
    save_file(tensors, path, metadata)  # raises nothing
    data = path.read_bytes()
    keys = []
    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=lambda pairs: keys.append([k for k, _ in pairs]))
    print(f"metadata={metadata}: {len(data)} bytes written, names in the header: {keys[-1]}")
    try:
        load_file(path)
    except safetensors.SafetensorError as error:
        assert "invalid JSON in header" in str(error) and word in str(error), error
        print(f"  load_file: {error}")
    else:
        sys.exit("it can be loaded now")
del tensors["__metadata__"]
save_file(tensors, path)
assert load_file(path).keys() == {"weight"}
print("without that tensor the file is read")
PY
