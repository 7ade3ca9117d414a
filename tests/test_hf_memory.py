"""Memory of from_pretrained while it quantizes, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("safetensors")

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

HIDDEN, INNER, BLOCKS = 512, 1536, 12

# The most anonymous memory (without mapped files) beyond that of a small model, after which all that is loaded once is there.
CHILD = """
import json, sys, threading
import torch, transformers
import nybble

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

def load(directory):
    asked = nybble.HfConfig("w4a16g128", exclude="*embed*")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=asked)

load(sys.argv[1])
before, most, done = anonymous(), 0, threading.Event()

def watch():
    global most
    while not done.wait(0.0005):
        most = max(most, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2])
done.set()
thread.join()
layers = [one for one in model.modules() if isinstance(one, nybble.nn.Linear)]
held = sum(one.nbytes for one in layers) + sum(one.nbytes for one in model.parameters())
print(json.dumps({"most": most - before, "held": held, "layers": len(layers)}))
"""


def write(directory: Path, blocks: int) -> int:
    """A language model of random weights in bfloat16; returns its bytes."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": blocks, "vocab_size": 512}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, dtype=torch.bfloat16)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return sum(one.nbytes for one in model.parameters())


def test_the_peak_is_the_quantized_model_and_one_layer(tmp_path) -> None:
    write(tmp_path / "small", 1)
    floats = write(tmp_path / "large", BLOCKS)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["layers"] == 7 * BLOCKS + 1
    layer = 2 * HIDDEN * INNER
    # Of the largest layer: bfloat16, float32 of parts, codes. 16 MB: freed, and not given back yet.
    assert told["most"] < 1.1 * told["held"] + 4 * layer + (16 << 20), told
    assert told["most"] < 0.6 * floats, told
