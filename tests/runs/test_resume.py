"""What a run leaves in its folder, who may be at it, and which faults are blamed on it."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvf.train
from conftest import SMALL, command, compose_config
from nvf.errors import InputError, explain
from nvf.files.atomic import atomic_write
from nvf.runs.resume import begin, recorded, remove_traces

WORDS = [*SMALL, "trainer=debug", "stage=attention", "dashboards=none"]
HOLD = "import sys, filelock as f; k = f.FileLock(sys.argv[1]); k.acquire(); print('held', flush=True); input()"


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run that another process is at, and that was never saved: it waits for the cache's lock."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "run"
    folder.mkdir(parents=True)
    begin(folder, {"config": compose_config(*WORDS), "memory": "", "queries": {}}, goes_on=False).release()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield folder
    process.communicate("\n")


def test_a_run_that_is_alive_is_refused_and_left(waiting: Path) -> None:
    before = {path.name: path.read_bytes() for path in waiting.iterdir()}
    done = command(f"resume={waiting}", cwd=waiting.parents[1])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is still running; wait for it, or stop it" in done.stderr
    for words in ([f"resume={waiting}"], [*WORDS, f"hydra.run.dir={waiting}"]):
        with pytest.raises(InputError, match="is still running"):
            nvf.train.run(*words)
    remove_traces(waiting)
    assert before.items() <= {path.name: path.read_bytes() for path in waiting.iterdir()}.items()


def test_a_run_whose_data_have_changed_is_refused_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    begin(tmp_path / "run", {"config": compose_config(*WORDS), "memory": "other", "queries": {}}, goes_on=False)
    with pytest.raises(InputError, match="the memory changed"):
        nvf.train.run("resume=run")
    assert recorded(tmp_path / "run")["k"] == 5


def test_traces_of_a_run_that_never_began_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name, kept in (("traces", False), ("theirs", True), ("fitted", True)):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        lock = begin(folder, {"config": {}, "memory": "", "queries": {}}, goes_on=False)  # held by this process
        (folder / "checkpoints").mkdir()
        if kept:
            (folder / {"theirs": "a.txt", "fitted": "checkpoints/last.ckpt"}[name]).touch()
        remove_traces(folder)
        assert folder.exists() == kept
        lock.release()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_fault_is_that_of_the_place_which_could_not_be_written(tmp_path: Path, number: int) -> None:
    words = explain(OSError(number, "no", "/kept/cache/ab"), tmp_path)
    assert words is not None
    assert "/kept/cache/ab" in words
    assert str(tmp_path) not in words
    assert str(tmp_path) in (explain(OSError(number, "no"), tmp_path) or "")
    assert explain(OSError(errno.EIO, "no", "/kept"), tmp_path) is None


def write_in_vain(fault: Exception | None) -> None:
    if fault is not None:
        raise fault
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"1")


@pytest.mark.parametrize("fault", [None, RuntimeError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_named_whatever_library_was_writing(tmp_path: Path, fault: Exception | None) -> None:
    with pytest.raises(OSError, match="No space") as caught, atomic_write(tmp_path / "rows"):
        write_in_vain(fault)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "rows"))
