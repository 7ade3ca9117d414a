"""The files of a checkpoint: names, what cannot be saved, disk errors, and kills at every step."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.checkpoint import CheckpointError, writing
from nybble.checkpoint.index import Index, parse_index
from nybble.nn import Linear

from .small_models import dense, quantized, same_state

pytest.importorskip("safetensors")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestFiles:
    def test_index_and_names(self, tmp_path: Path) -> None:
        nybble.save(quantized("w4a16g32"), tmp_path)
        index = json.loads((tmp_path / "nybble.json").read_text())
        assert (index["schema"], index["version"], index["nybble"]) == ("nybble.checkpoint", 1, nybble.__version__)
        assert names(tmp_path) == [index["weights"]["file"], "nybble.json"]
        assert (tmp_path / index["weights"]["file"]).stat().st_size == index["weights"]["bytes"]
        assert index["layers"][0] == {
            "name": "0",
            "kind": "Linear",
            "scheme": "w4a16g32",
            "in_features": 40,
            "out_features": 24,
            "bias": True,
            "stored": 0,
            "dtype": "float32",
            "tied_to": None,
        }

    def test_weights_are_plain_safetensors(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        model = quantized()
        nybble.save(model, tmp_path)
        stored = load_file(next(tmp_path.glob("*.safetensors")))
        state = model.state_dict()
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[key], state[key]) for key in state)

    def test_a_second_save_replaces_the_first(self, tmp_path: Path) -> None:
        nybble.save(quantized(seed=0), tmp_path)
        first = names(tmp_path)
        nybble.save(quantized(seed=1), tmp_path)
        assert len(names(tmp_path)) == 2
        assert names(tmp_path) != first
        assert same_state(quantized(seed=1), nybble.load(dense(2), tmp_path))
        nybble.save(quantized(seed=1), tmp_path)
        assert same_state(quantized(seed=1), nybble.load(dense(2), tmp_path))

    def test_leftovers_go_and_other_files_stay(self, tmp_path: Path) -> None:
        (tmp_path / ".nybble-abcdefgh.tmp").mkdir()
        (tmp_path / ".nybble-abcdefgh.tmp" / "weights").write_text("x")
        (tmp_path / "model-0123456789abcdef.safetensors").write_text("x")
        (tmp_path / "model-00001-of-00002.safetensors").write_text("x")
        (tmp_path / "config.json").write_text("x")
        nybble.save(quantized(), tmp_path)
        kept = set(names(tmp_path))
        assert {"model-00001-of-00002.safetensors", "config.json", "nybble.json"} <= kept
        assert len(kept) == 4

    def test_files_have_the_users_permissions(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            nybble.save(quantized(), tmp_path)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


class TestUnsavable:
    @pytest.mark.parametrize(
        ("change", "name"),
        [
            (lambda m: m.register_buffer("extra", torch.empty(3, device="meta")), "extra"),
            (lambda m: m.register_buffer("extra", torch.eye(3).to_sparse()), "extra"),
            (lambda m: m.register_buffer("extra", torch.zeros(3, dtype=torch.complex64)), "extra"),
            (lambda m: m.add_module("lazy", nn.LazyLinear(3)), r"lazy\.weight"),
            (lambda m: setattr(type(m[1]), "get_extra_state", lambda self: {"a": 1}), r"1\._extra_state"),
            (lambda m: m.register_state_dict_post_hook(lambda m, s, *_: (s.pop("3.bias"), None)[1]), r"3\.bias"),
            (lambda m: m[0].double(), "0: .*float64"),
        ],
    )
    def test_named_and_nothing_written(self, tmp_path: Path, change: Any, name: str, monkeypatch: Any) -> None:
        model = quantized()
        model[1].__class__ = type("Norm", (nn.BatchNorm1d,), {})
        change(model)
        with pytest.raises(ValueError, match=f"^{name}"):
            nybble.save(model, tmp_path)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("name", ["__metadata__", "\ud800", "n" * 4097], ids=["metadata", "no-text", "long"])
    def test_names_that_load_would_refuse(self, tmp_path: Path, name: str) -> None:
        nybble.save(dense(), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        model = dense()
        model.register_buffer(name, torch.ones(3))
        with pytest.raises(ValueError, match="of this name" if len(name) < 4096 else "string of 1..4096 characters"):
            nybble.save(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_weights_that_load_would_refuse(self, tmp_path: Path) -> None:
        model = quantized()
        model[0].unpack()
        nybble.save(model, tmp_path)
        model[0].scale.data.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=r"^0\.scale: must be finite"):
            nybble.save(model, tmp_path)
        assert same_state(nybble.load(dense(), tmp_path), nybble.load(dense(), tmp_path))

    def test_root_layer_and_non_modules(self, tmp_path: Path) -> None:
        for wrong in (Linear(8, 8), {"a": torch.zeros(3)}):
            with pytest.raises(TypeError, match=r"^model="):
                nybble.save(wrong, tmp_path)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"^model="):
                nybble.load(wrong, tmp_path)  # type: ignore[arg-type]

    def test_missing_safetensors_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nybble.save(quantized(), tmp_path)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        monkeypatch.setitem(sys.modules, "safetensors", None)
        for call in (nybble.save, nybble.load):
            with pytest.raises(ImportError, match=r"nybble\[save\]"):
                call(quantized(), tmp_path)


class TestDiskErrors:
    @pytest.mark.parametrize("function", ["fsync", "replace"])
    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_the_old_checkpoint_survives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, after: int
    ) -> None:
        nybble.save(quantized(seed=0), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        original, calls = getattr(os, function), [0]

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        monkeypatch.setattr(os, function, failing)
        if {"fsync": 4, "replace": 2}[function] <= after:
            nybble.save(quantized(seed=1), tmp_path)
            return
        with pytest.raises(OSError, match="No space left"):
            nybble.save(quantized(seed=1), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("after", [0, 1, 3])
    def test_a_disk_that_gets_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        nybble.save(quantized(seed=0), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        original, calls = writing._write_all, [0]

        def failing(write: Any, data: Any) -> None:
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(write, data)

        monkeypatch.setattr(writing, "_write_all", failing)
        with pytest.raises(OSError, match="No space left"):
            nybble.save(quantized(seed=1), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_weight_that_changes_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = quantized()
        original = writing._laid_out

        def changing(specs: Any) -> Any:
            model[0].hold_unpacked({"qweight": torch.zeros(1, 1, dtype=torch.int8), "scale": torch.ones(1, 1)})
            return original(specs)

        monkeypatch.setattr(writing, "_laid_out", changing)
        with pytest.raises(RuntimeError, match=r"0\.qweight.*: the weight changed while the checkpoint was written"):
            nybble.save(model, tmp_path)
        assert names(tmp_path) == []

    def test_failure_after_the_switch_keeps_the_new_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nybble.save(quantized(seed=0), tmp_path)
        original, calls = os.fsync, [0]

        def failing(descriptor: int) -> None:
            calls[0] += 1
            if calls[0] == 4:
                raise OSError(errno.EIO, "I/O error")
            original(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="I/O error"):
            nybble.save(quantized(seed=1), tmp_path)
        assert same_state(quantized(seed=1), nybble.load(dense(2), tmp_path))

    def test_a_file_size_limit_is_an_os_error(self, tmp_path: Path) -> None:
        nybble.save(quantized(), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        program = f"""
            import resource, sys, nybble, torch
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            try:
                nybble.save(torch.nn.Sequential(torch.nn.Linear(100, 100)), {str(tmp_path)!r})
            except OSError as error:
                sys.exit(17)
        """
        assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 17
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_killed_at_every_step(self, tmp_path: Path) -> None:
        """A child dies without any cleanup before its n-th system call; the directory must load, old or new."""
        program = f"""
            import os, sys, torch, nybble
            from torch import nn
            directory = {str(tmp_path)!r}
            def model(value):
                model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
                for parameter in model.parameters():
                    parameter.data.fill_(value)
                nybble.quantize(model, goal="memory", include="0")
                return model
            old, new = model(1.0), model(2.0)
            def die_at(n):
                count = [0]
                def wrap(function):
                    def step(*args, **kwargs):
                        count[0] += 1
                        if count[0] == n:
                            os._exit(9)
                        return function(*args, **kwargs)
                    return step
                for name in ("fsync", "replace", "chmod", "unlink", "mkdir", "rmdir", "listdir"):
                    setattr(os, name, wrap(getattr(os, name)))
            nybble.save(old, directory)
            seen = []
            for n in range(1, 60):
                child = os.fork()
                if not child:
                    die_at(n)
                    nybble.save(new, directory)
                    os._exit(0)
                status = os.waitpid(child, 0)[1]
                loaded = nybble.load(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), directory)
                values = {{round(float(v), 2) for v in (loaded[0].bias[0], loaded[1].weight[0, 0])}}
                assert values in ({{1.0}}, {{2.0}}), values
                seen.append((os.waitstatus_to_exitcode(status), values.pop()))
                nybble.save(old, directory)
                assert len(os.listdir(directory)) == 2, os.listdir(directory)
                if status == 0:
                    break
            codes = [code for code, _ in seen]
            assert codes == [9] * (len(codes) - 1) + [0] and len(codes) > 8, seen
            assert {{value for _, value in seen}} == {{1.0, 2.0}}, seen
            print("steps", len(codes))
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("steps")


def test_the_index_may_name_fused_modules() -> None:
    index = Index("0.1.0", f"model-{'0' * 16}.safetensors", 8, "0" * 64, (), {}, {})
    assert b"fused" not in index.to_json(), "an older nybble reads it"
    fused = replace(index, fused=("", "encoder.1"))  # the model itself has no name
    assert parse_index(fused.to_json()) == fused
    assert parse_index(index.to_json()) == index
    for value, message in (("encoder.0", "fused is"), ([3], r"fused\[0\] is 3")):
        wrong = json.dumps({**json.loads(index.to_json()), "fused": value}).encode()
        with pytest.raises(CheckpointError, match=message):
            parse_index(wrong)
