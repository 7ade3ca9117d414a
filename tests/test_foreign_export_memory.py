"""`nybble export` and `nybble.save_pretrained`: the most memory that they take, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nybble

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from .gptq_llama import write

if not os.access("/proc/self/clear_refs", os.W_OK):
    pytest.skip("needs Linux, which tells the most memory that a process had", allow_module_level=True)

# Prints by how many bytes the memory of the process grew at most, in `run`, after the same with a small checkpoint.
PROGRAM = """
import sys
from pathlib import Path
import nybble
from nybble.__main__ import main

def told(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

def export(source, out):
    assert main(["export", source, "--format", sys.argv[1], "--out", out]) == 0

def save(source, out):
    model, _ = nybble.load_pretrained(source)
    return lambda: nybble.save_pretrained(model, out, format=sys.argv[1])

def most(run):
    Path("/proc/self/clear_refs").write_text("5")
    before = told("VmRSS")
    run()
    return told("VmHWM") - before

small, large = sys.argv[3:5]
for source in (small, large):
    out = source + "-out"
    run = (lambda: export(source, out)) if sys.argv[2] == "export" else save(source, out)
    grown = most(run)
print("GROWN", grown)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A small and a large one, of GPTQ and of nybble."""
    aside = tmp_path_factory.mktemp("memory")
    gptq = [write(aside / "small", 128, 256, 1), write(aside / "large", 512, 2048, 24)]
    own = []
    for path in gptq:
        model, _ = nybble.load_pretrained(path)
        own.append(aside / f"{path.name}-own")
        nybble.save(model, own[-1])
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]
        (own[-1] / "config.json").write_text(json.dumps(config))
    return {"export": own, "save": gptq}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("how", ["export", "save"])
def test_the_peak_is_a_few_layers(how: str, format: str, checkpoints: dict[str, list[Path]]) -> None:
    small, large = checkpoints[how]
    command = [sys.executable, "-c", PROGRAM, format, how, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.rpartition("GROWN ")[2])
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 48 << 20
    assert grown < size / 4, "the checkpoint is never in memory as a whole, nor a second time"
    for path in (small, large):
        files = sorted(file.name for file in Path(f"{path}-out").iterdir())
        assert "model.safetensors" in files
        for file in files:
            (Path(f"{path}-out") / file).unlink()
        Path(f"{path}-out").rmdir()
