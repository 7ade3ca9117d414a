"""`nybble import`, `nybble export` and saving: the most memory that they take, in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
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

def take(source, out):
    assert main(["import", source, "--out", out]) == 0

def save(source, out):
    model, _ = nybble.load_pretrained(source)
    if sys.argv[1] == "nybble":
        return lambda: nybble.save(model, out)
    return lambda: nybble.save_pretrained(model, out, format=sys.argv[1])

def most(run):
    Path("/proc/self/clear_refs").write_text("5")
    before = told("VmRSS")
    run()
    return told("VmHWM") - before

small, large = sys.argv[3:5]
for source in (small, large):
    out = source + "-out"
    by_command = {"export": export, "import": take}.get(sys.argv[2])
    run = save(source, out) if by_command is None else lambda: by_command(source, out)
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
    return {"export": own, "save": gptq, "import": gptq}


def growth(how: str, format: str, small: Path, large: Path) -> int:
    """The most bytes by which the memory grew with the large checkpoint; what was written is removed."""
    command = [sys.executable, "-c", PROGRAM, format, how, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in (small, large):
        out = Path(f"{path}-out")
        assert any(file.suffix == ".safetensors" for file in out.iterdir())
        shutil.rmtree(out)
    return int(done.stdout.rpartition("GROWN ")[2])


def size_of(checkpoint: Path) -> int:
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert size > 48 << 20
    return size


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "format"),
    [(how, format) for how in ("export", "save") for format in ("compressed-tensors", "gptq")] + [("save", "nybble")],
)
def test_the_peak_is_a_few_layers(how: str, format: str, checkpoints: dict[str, list[Path]]) -> None:
    small, large = checkpoints[how]
    grown = growth(how, format, small, large)
    assert grown < size_of(large) / 4, "the checkpoint is never in memory as a whole, nor a second time"


@pytest.mark.full
def test_importing_takes_the_checkpoint_once(checkpoints: dict[str, list[Path]]) -> None:
    small, large = checkpoints["import"]
    grown, layer = growth("import", "", small, large), 512 * 2048
    assert grown < 1.15 * size_of(large) + 16 * layer
