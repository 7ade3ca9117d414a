"""Damaged and lying checkpoints of other libraries: refused by name, never read wrongly, never at the cost of memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nybble.checkpoint import CheckpointError
from nybble.foreign.tensors import Tensors, read_header
from nybble.recipe import Recipe
from nybble.stress import samples
from nybble.stress.children import in_children
from nybble.stress.figure import Tally
from nybble.stress.foreign import damages

HERE = Path(__file__).parent
CHECKPOINTS = sorted(path for path in (HERE / "data" / "foreign").iterdir() if path.is_dir())
# Of each format one; the others are tried by the nightly tests too.
FEW = (
    "awq-gemm-w4-g32-edge", "bnb-int8", "bnb-nf4-double", "ct-old-marlin24-w4-g128", "ct-old-sparse24-w8a8", "ct-w4a16-asym-g32-edge", "gguf-q4-k-m",
    "gptq-w4-g128-desc-act", "hqq-w3-g32-tensors", "hqq-w4-g16-saved", "onnx-w4-g32-asym", "quanto-qint4", "torchao-intx-g32",
)  # fmt: skip


def damaged(name: str, first: int, last: int) -> Tally:
    if name.startswith("onnx"):
        pytest.importorskip("onnx")
    found = in_children(damages, [(HERE / "data" / "foreign" / name, first, last)])
    assert (found.tried, found.failures) == (last - first, [])
    return found


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("name", FEW)
def test_damages_are_refused_or_harmless(name: str) -> None:
    counts = damaged(name, 0, 300).facts
    assert counts["refused"] > 60
    assert counts["read"] > 5, "not every damage matters, such as one of a code"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [path.name for path in CHECKPOINTS])
def test_many_damages_are_refused_or_harmless(name: str) -> None:
    damaged(name, 300, 10_300)


def test_tensors_without_numbers(tmp_path: Path) -> None:
    """Found by the figure `headers`: torch cannot view no bytes as floats."""
    path = tmp_path / "model.safetensors"
    shapes = {"a": [0], "b": [3, 0], "c": [0, 2, 5]}
    for dtype in ("F32", "BF16", "U8", "I64"):
        path.write_bytes(samples.safetensors({name: (dtype, shape, b"") for name, shape in shapes.items()}))
        tensors = Tensors(tmp_path)
        assert {name: list(tensors.read(name).shape) for name in shapes} == shapes


class TestLinks:
    """Only harmless files of the tests' own; what is refused is not read."""

    def checkpoint(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        path = folder / "model.safetensors"
        path.write_bytes(samples.safetensors())
        return path

    def test_within_the_directory(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path / "model")
        path.rename(path.with_name("real"))
        path.symlink_to("real")
        assert read_header(path)[0].keys() >= {"a.qweight"}

    def test_into_the_blobs_of_a_cache(self, tmp_path: Path) -> None:
        blob = self.checkpoint(tmp_path / "models--a--b" / "blobs")
        path = tmp_path / "models--a--b" / "snapshots" / "0123" / "model.safetensors"
        path.parent.mkdir(parents=True)
        path.symlink_to(Path("../../blobs", blob.name))
        assert read_header(path)[0].keys() >= {"a.qweight"}
        other = self.checkpoint(tmp_path / "models--c--d" / "blobs")
        path.unlink()
        path.symlink_to(other)
        with pytest.raises(CheckpointError, match="a link out of its directory"):
            read_header(path)

    def test_by_a_directory_that_is_a_link(self, tmp_path: Path) -> None:
        self.checkpoint(tmp_path / "model")
        (tmp_path / "link").symlink_to("model")
        assert read_header(tmp_path / "link" / "model.safetensors")[0].keys() >= {"a.qweight"}

    @pytest.mark.parametrize(
        "to", ["../other/model.safetensors", "/dev/zero", "/dev/null", "missing", "model.safetensors"]
    )
    def test_elsewhere(self, to: str, tmp_path: Path) -> None:
        self.checkpoint(tmp_path / "other")
        (tmp_path / "model").mkdir()
        path = tmp_path / "model" / "model.safetensors"
        path.symlink_to(to)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (a link out|cannot be opened)"):
            read_header(path)

    def test_shards_have_names_alone(self, tmp_path: Path) -> None:
        self.checkpoint(tmp_path / "other")
        path = self.checkpoint(tmp_path / "model")
        for name in (
            "../other/model.safetensors",
            str(tmp_path / "other" / "model.safetensors"),
            "/dev/zero",
            "..",
            "",
        ):
            (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
            with pytest.raises(CheckpointError, match=r"is no \.safetensors file beside it"):
                Tensors(path.parent)


def test_recipes_are_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: must be a regular file"):
        Recipe.load(tmp_path / "pipe.json")
    (tmp_path / "recipe.json").write_bytes(samples.recipe_json())
    (tmp_path / "link.json").symlink_to("recipe.json")
    assert Recipe.load(tmp_path / "link.json").seed == 3
