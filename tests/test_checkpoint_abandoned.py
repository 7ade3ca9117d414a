"""Writers that are killed, that meet in one directory, and directories that cannot be written."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble
from nybble.checkpoint import CheckpointError, abandoned, own, tensors
from nybble.checkpoint.files import INDEX, Digest, digest, file_at_once, open_file, replace_checkpoint, written_at_once
from nybble.foreign.map_model import map_model
from nybble.recipe import file as recipe_file
from nybble.stress.faults import read_only

safetensors = pytest.importorskip("safetensors")


def model(value: float) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for parameter in made.parameters():
        parameter.data.fill_(value)
    return made


def value_in(directory: Path) -> float:
    loaded = nybble.load(model(0.0), directory)
    found = {float(part.flatten()[0]) for part in loaded.state_dict().values()}
    assert len(found) == 1, f"parts of {len(found)} checkpoints"
    return found.pop()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def killed(body: Any) -> None:
    """Runs ``body`` in a child that kills itself when it is called back."""
    child = os.fork()
    if not child:
        body(lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _save(directory: Path, write: Any) -> None:
    def weights(path: Path) -> Digest:
        path.write_bytes(b"x")
        write()
        return digest(path, {})

    replace_checkpoint(directory, weights, lambda content: b"{}")


def _directory(path: Path, write: Any) -> None:
    with written_at_once(path / "out") as aside:
        (aside / "file").write_text("x")
        write()


def _file(path: Path, write: Any) -> None:
    with file_at_once(path / "out") as aside:
        aside.write_text("x")
        write()


def _without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


WRITERS = {"checkpoint": _save, "directory": _directory, "file": _file}


@pytest.mark.parametrize("name", WRITERS)
class TestLeftovers:
    def test_of_a_killed_writer_go(self, name: str, tmp_path: Path) -> None:
        for _ in range(2):
            killed(lambda kill: WRITERS[name](tmp_path, kill))
        left = names(tmp_path)
        assert len(left) == 1, "the second has removed what the first left"
        assert left[0].endswith(".tmp")
        WRITERS[name](tmp_path, lambda: None)
        assert not any(found.endswith(".tmp") for found in names(tmp_path))

    def test_of_an_exception_go(self, name: str, tmp_path: Path) -> None:
        def fail() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            WRITERS[name](tmp_path, fail)
        assert names(tmp_path) == []

    def test_without_locks_only_old_ones_go(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        killed(lambda kill: WRITERS[name](tmp_path, kill))
        (left,) = tmp_path.iterdir()
        _without_locks(monkeypatch)
        WRITERS[name](tmp_path, lambda: None)
        assert left.exists(), "it may be of a writer that lives"
        shutil.rmtree(tmp_path / "out") if (tmp_path / "out").is_dir() else None
        for old in (left, *left.iterdir()):
            os.utime(old, (0, time.time() - abandoned._OLD - 60))
        WRITERS[name](tmp_path, lambda: None)
        assert not left.exists()


def test_what_a_living_writer_writes_stays(tmp_path: Path) -> None:
    with file_at_once(tmp_path / "a") as first:
        first.write_text("first")
        recipe_file.write(tmp_path / "a.json", {"x": 1})
        with file_at_once(tmp_path / "a") as second:
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
        assert first.exists()
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a", "a.json"]


def test_a_temporary_directory_can_be_written_to_by_other_writers(tmp_path: Path) -> None:
    with written_at_once(tmp_path / "out") as aside:
        nybble.save(model(1.0), aside / "checkpoint")
        nybble.save(model(2.0), aside)
        with written_at_once(aside / "other") as inner, file_at_once(inner / "file") as file:
            file.write_text("x")
    assert value_in(tmp_path / "out") == 2.0
    assert value_in(tmp_path / "out" / "checkpoint") == 1.0
    assert names(tmp_path / "out" / "other") == ["file"]
    assert names(tmp_path) == ["out"]


def test_what_another_program_calls_alike_stays(tmp_path: Path) -> None:
    (tmp_path / ".nybble-notes.tmp").write_text("x")
    (tmp_path / "model-0123456789abcdef.safetensors").mkdir()
    for value in (1.0, 2.0):
        nybble.save(model(value), tmp_path)
    assert names(tmp_path)[0] == ".nybble-notes.tmp"
    assert (tmp_path / "model-0123456789abcdef.safetensors").is_dir()
    assert len(names(tmp_path)) == 4


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / ".nybble-abcdefgh.tmp").symlink_to(tmp_path / "kept")
    _save(tmp_path / "to", lambda: None)
    assert names(tmp_path / "kept") == ["file"]
    assert not any(found.endswith(".tmp") for found in names(tmp_path / "to"))


def test_a_save_waits_for_another(tmp_path: Path) -> None:
    nybble.save(model(1.0), tmp_path)
    second = threading.Thread(target=nybble.save, args=(model(2.0), tmp_path))
    with abandoned.held(tmp_path):
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert value_in(tmp_path) == 1.0
    second.join(10)
    assert value_in(tmp_path) == 2.0


def test_a_save_that_interrupts_one_into_the_same_directory_says_so(tmp_path: Path) -> None:
    nybble.save(model(1.0), tmp_path / "to")

    def in_the_handler_of_a_signal() -> None:
        nybble.save(model(3.0), tmp_path / "elsewhere")
        with pytest.raises(RuntimeError, match="this thread is writing there already"):
            nybble.save(model(2.0), tmp_path / "to")

    _save(tmp_path / "to", in_the_handler_of_a_signal)
    assert value_in(tmp_path / "elsewhere") == 3.0
    nybble.save(model(2.0), tmp_path / "to")
    assert value_in(tmp_path / "to") == 2.0


def test_a_long_wait_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandoned, "_PATIENCE", 0.05)
    stopped = threading.Event()

    def writes() -> None:
        with abandoned.held(tmp_path):
            stopped.wait(0.3)

    writer = threading.Thread(target=writes)
    writer.start()
    while not abandoned._held:
        time.sleep(0.001)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path}: another process or thread that saves there"):
        nybble.save(model(1.0), tmp_path)
    writer.join()
    assert value_in(tmp_path) == 1.0
    assert not abandoned._held


def test_a_child_keeps_no_lock_of_its_parent(tmp_path: Path) -> None:
    started, ended = os.pipe(), os.pipe()
    parent = os.fork()
    if not parent:  # which is killed while it saves; its own child lives on

        def forks() -> None:
            if not os.fork():
                os.write(started[1], b"x")
                os.read(ended[0], 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

        _save(tmp_path, forks)
    os.waitpid(parent, 0)
    try:
        assert os.read(started[0], 1) == b"x"
        descriptor = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        os.write(ended[1], b"x")


def test_a_child_that_is_forked_while_its_parent_saves_can_save(tmp_path: Path) -> None:
    with abandoned.held(tmp_path):
        child = os.fork()
        if not child:
            with abandoned.held(tmp_path / ".."):
                os._exit(bool(abandoned._held) - 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _saves(directory: Path, value: float) -> None:
    torch.set_num_threads(1)
    for _ in range(25):
        nybble.save(model(value), directory)


def test_two_processes_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_saves, args=(tmp_path, value)) for value in (1.0, 2.0, 3.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert value_in(tmp_path) in (1.0, 2.0, 3.0)
    assert len(names(tmp_path)) == 2


def _mapped(directory: Path) -> float:
    made = model(0.0)
    map_model(made, directory)
    return made[0].weight[0, 0].item()


def _replaced_before(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, directory: Path, times: int) -> list[float]:
    """Before the first calls of a function, save other values; those that are saved."""
    called, values = getattr(of, name), []

    def first_save(*args: Any, **kwargs: Any) -> Any:
        if len(values) < times:
            values.append(2.0 + len(values))
            nybble.save(model(values[-1]), directory)
        return called(*args, **kwargs)

    monkeypatch.setattr(of, name, first_save)
    return values


@pytest.mark.parametrize("read", [value_in, _mapped], ids=["load", "map"])
class TestLoadDuringASave:
    @pytest.mark.parametrize("name", ["_check_size", "_check_hash"])
    @pytest.mark.parametrize(("locks", "times"), [(True, 1), (False, 3)])
    def test_gives_the_new_checkpoint(
        self, read: Any, name: str, locks: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nybble.save(model(1.0), tmp_path)
        _without_locks(monkeypatch) if not locks else None
        values = _replaced_before(monkeypatch, tensors, name, tmp_path, times)
        assert read(tmp_path) == values[-1] == 1.0 + times

    def test_the_next_save_waits_until_it_is_read(
        self, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nybble.save(model(1.0), tmp_path)
        checked, third = tensors._check_size, threading.Thread(target=nybble.save, args=(model(3.0), tmp_path))
        waited = []

        def saves_before(*args: Any) -> None:
            if not third.ident and not waited:
                waited.append(False)
                nybble.save(model(2.0), tmp_path)
            elif not third.ident:
                third.start()
                third.join(0.3)
                waited.append(third.is_alive())
            checked(*args)

        monkeypatch.setattr(tensors, "_check_size", saves_before)
        assert read(tmp_path) == 2.0
        assert waited == [False, True]
        third.join(10)
        monkeypatch.undo()
        assert read(tmp_path) == 3.0

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the list of open files")
    def test_keeps_the_old_index_so_that_no_other_gets_its_inode(
        self, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nybble.save(model(1.0), tmp_path)
        checked, kept = tensors._check_size, []

        def look(*args: Any) -> None:
            found = [file.stat() for file in Path("/proc/self/fd").iterdir() if file.exists()]
            kept.append(any(os.path.samestat(file, (tmp_path / INDEX).stat()) for file in found))
            checked(*args)

        monkeypatch.setattr(tensors, "_check_size", look)
        assert read(tmp_path) == 1.0
        assert kept == [True]
        monkeypatch.undo()
        found = [file.stat() for file in Path("/proc/self/fd").iterdir() if file.exists()]
        assert not any(os.path.samestat(file, (tmp_path / INDEX).stat()) for file in found)

    @pytest.mark.parametrize(
        ("error", "again"),
        [(None, False), (RuntimeError("no file"), False), (RuntimeError("no file"), True)],
        ids=["library", "torch", "and-there-again"],
    )
    def test_of_tensors_that_are_gone_since_their_file_was_checked(
        self, read: Any, error: Exception | None, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nybble.save(model(1.0), tmp_path)
        opened = safetensors.safe_open

        def as_torch_raises(path: Path, **options: Any) -> Any:
            if error is not None and not path.exists():
                path.write_bytes(b"x") if again else None
                raise error
            return opened(path, **options)

        monkeypatch.setattr(safetensors, "safe_open", as_torch_raises)
        values = _replaced_before(monkeypatch, safetensors, "safe_open", tmp_path, 1)
        assert read(tmp_path) == values[-1] == 2.0

    def test_is_tried_some_times_and_what_stays_damaged_once(
        self, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nybble.save(model(1.0), tmp_path)
        _without_locks(monkeypatch)
        values = _replaced_before(monkeypatch, tensors, "_check_size", tmp_path, 1000)
        with pytest.raises(CheckpointError, match="cannot be opened as a regular file: No such file"):
            read(tmp_path)
        assert len(values) == own._ATTEMPTS
        (weights,) = tmp_path.glob("*.safetensors")
        weights.unlink()
        seen: list[Path] = []
        monkeypatch.setattr(
            tensors, "_check_size", lambda path, index: seen.append(path) or open_file(path).__enter__()
        )
        with pytest.raises(CheckpointError, match="No such file"):
            read(tmp_path)
        assert len(seen) == 1


@pytest.mark.parametrize(("disk", "count"), [("slow", 60), ("fast", 600)])
def test_loads_while_another_process_saves(
    disk: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nybble.save(model(1.0), tmp_path)
    if disk == "fast":  # one save takes less time than reading an index
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    writer = multiprocessing.get_context("fork").Process(target=_saves_in_turn, args=(tmp_path, count))
    writer.start()
    loaded = {value_in(tmp_path)}
    while writer.is_alive():
        loaded.add(value_in(tmp_path))
    writer.join()
    assert writer.exitcode == 0
    assert loaded <= {1.0, 2.0, 3.0}


def _saves_in_turn(directory: Path, count: int) -> None:
    torch.set_num_threads(1)
    for turn in range(count):
        nybble.save(model(1.0 + turn % 3), directory)


def _gptq(directory: Path) -> None:
    nybble.quantize(
        model(1.0), "w4a16", method="gptq", calibration=[torch.ones(2, 8)], goal="memory", resume=str(directory)
    )


_INTO = {
    "save": lambda directory: nybble.save(model(1.0), directory),
    "save-new": lambda directory: nybble.save(model(1.0), directory / "new"),
    "recipe": lambda directory: recipe_file.write(directory / "recipe.json", {}),
    "resume": _gptq,
}


def _into_read_only(directory: Path, there: Any) -> None:
    torch.set_num_threads(1)
    found = {} if read_only(directory) else None
    for name, write in _INTO.items() if found is not None else ():
        try:
            write(directory)
        except OSError as error:
            found[name] = type(error).__name__, error.errno, str(error)
    assert found is None or found.keys() == _INTO.keys()
    there.send(found)


class TestNoPlace:
    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that nobody can write")
    def test_a_directory_that_cannot_be_made(self) -> None:
        with pytest.raises(OSError, match=r"no checkpoint could be written: .*'/proc/nybble'"):
            nybble.save(model(1.0), "/proc/nybble")

    def test_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system", "x.tmp")

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
        with pytest.raises(OSError, match="no checkpoint could be written: Read-only file system") as caught:
            nybble.save(model(1.0), tmp_path)
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(tmp_path))

    def test_really_read_only(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_into_read_only, args=(tmp_path, there))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        said = here.recv()
        if said is None:
            pytest.skip("needs a file system that may be mounted")
        for name, (kind, number, message) in said.items():
            assert (name, kind, number) == (name, "OSError", errno.EROFS)
            assert str(tmp_path) in message, name
            assert "Read-only file system" in message, name

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(FileExistsError, match="no checkpoint could be written: File exists"):
            nybble.save(model(1.0), tmp_path / "file")

    def test_gone_meanwhile(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no checkpoint could be written: No such file") as caught:
            _save(tmp_path / "gone", lambda: shutil.rmtree(tmp_path / "gone"))
        assert caught.value.filename == str(tmp_path / "gone")
        assert names(tmp_path) == []
