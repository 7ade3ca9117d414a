"""Checkpoints of older libraries, whose tensors are in files of torch.save: pytorch_model.bin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.checkpoint import CheckpointError
from nybble.foreign import open_foreign

pytest.importorskip("safetensors")
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data" / "foreign"


def copied(tmp_path: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """A copy of a checkpoint without its tensors, and these."""
    path = tmp_path / name
    shutil.copytree(DATA / name, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    (path / "oracle.safetensors").unlink()
    return path, tensors


def read(path: Path) -> Tensor:
    (layer,) = open_foreign(path)[1].layers.values()
    return layer.read().dequantize()


@pytest.mark.parametrize(
    "name", ["gptq-w4-g32-asym-edge", "awq-gemm-w4-g32-edge", "bnb-int8", "ct-w4a16-asym-g32-edge"]
)
def test_a_file_of_torch_has_the_same_weights(name: str, tmp_path: Path) -> None:
    path, tensors = copied(tmp_path, name)
    torch.save(tensors, path / "pytorch_model.bin")
    torch.save({"steps": 1}, path / "training_args.bin")
    shutil.copyfile(DATA / name / "oracle.safetensors", path / "other.safetensors")  # has not the usual name
    assert torch.equal(read(path), read(DATA / name))


def test_several_files_and_their_index(tmp_path: Path) -> None:
    path, tensors = copied(tmp_path, "gptq-w4-g128-desc-act")
    places = {name: f"pytorch_model-{i + 1:05}-of-{len(tensors):05}.bin" for i, name in enumerate(tensors)}
    for name, file in places.items():
        torch.save({name: tensors[name]}, path / file)
    index = path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert torch.equal(read(path), read(DATA / path.name))
    index.write_text(json.dumps({"weight_map": {**places, "other": next(iter(places.values()))}}))
    with pytest.raises(CheckpointError, match="weight_map: other is in none of the files"):
        open_foreign(path)
    index.write_text(json.dumps({"weight_map": {**places, "other": "../x.bin"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./x\.bin' is no \.bin file beside it"):
        open_foreign(path)


def test_a_state_dict_of_modules_is_read(tmp_path: Path) -> None:
    """With torch's own versions of modules beside the items, parameters and one storage for two names."""
    path, tensors = copied(tmp_path, "bnb-int8")
    (name,) = (key.removesuffix(".SCB") for key in tensors if key.endswith(".SCB"))
    model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(8), "head": torch.nn.Linear(8, 8, bias=False)})
    state = model.state_dict(keep_vars=True)
    state["tied.weight"] = state["head.weight"]
    state.update(tensors)
    torch.save(state, path / "pytorch_model.bin")
    opened = open_foreign(path)[1]
    assert list(opened.layers) == [name]
    for key in ("norm.weight", "norm.bias", "head.weight", "tied.weight"):
        assert torch.equal(opened.parts[key].read(), state[key])


def test_safetensors_go_first(tmp_path: Path) -> None:
    shutil.copytree(DATA / "bnb-int8", tmp_path / "one")
    torch.save({"a": torch.ones(1)}, tmp_path / "one" / "pytorch_model.bin")
    assert torch.equal(read(tmp_path / "one"), read(DATA / "bnb-int8"))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda tensors: {**tensors, "x": 3}, "x: is a int: must be a tensor"),
        (lambda tensors: {"state_dict": tensors}, "state_dict: is a dict: must be a tensor"),
        (lambda tensors: list(tensors.values()), "must be a dict of tensors"),
        (lambda tensors: {**tensors, "x": torch.ones(2, 3).T}, r"x: strides \(1, 3\) of \(3, 2\): must be row by row"),
        (lambda tensors: {**tensors, "x": torch.nn.Linear(1, 1)}, "is not plain data; nybble runs nothing"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused(change: Any, rule: str, tmp_path: Path) -> None:
    path, tensors = copied(tmp_path, "bnb-int8")
    torch.save(change(tensors), path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rule):
        open_foreign(path)


def test_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    path, tensors = copied(tmp_path, "bnb-int8")
    for name in ("a.bin", "b.bin"):
        torch.save(tensors, path / name)
    with pytest.raises(CheckpointError, match=r"has 2 \.bin files, and neither pytorch_model\.bin nor"):
        open_foreign(path)
