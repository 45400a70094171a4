"""Signals and faults of the machine: runs stop within a step, keep what they have, and say how to go on."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import command, compose_config, write_folder
from nvf.errors import InputError
from nvf.files.records import sealed
from nvf.models.memory import VectorMemory
from nvf.overrides import resumed_settings, words_of
from nvf.runs.resume import begin, recorded
from nvf.train import train
from nvf.training.build import build_source
from nvf.training.cache import circumstances
from programs import Program, wait_for

Run = Callable[..., dict[str, Any]]
SMALL = ["data.rows=60", "data.dim=8", "queries.val_samples=200", "queries.test_samples=200"]
WORDS = [*SMALL, "threads=1", "trainer.enable_progress_bar=false", "dashboards=none", "cache=off", "stage=attention"]
LONG = [*WORDS, "attention.epochs=4", "attention.steps_per_epoch=40", "save_every=20", "hydra.run.dir=run"]
LAST = "run/checkpoints/attention/last.ckpt"
SAVED = ("last.ckpt", 2)  # a run is stopped where it saves its stage 1 for the second time


def figures(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    return {name: results[name] for name in ("test", "val", "gradients", "selection")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of the run that nobody stops."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = command(*LONG, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return figures(cwd / "run")


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_stops_a_run_that_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: dict[str, Any], how: signal.Signals, status: int
) -> None:
    with Program(*LONG, cwd=tmp_path, at=(how, *SAVED)) as process:
        assert process.wait() == status, process.stderr
        said = process.stdout + process.stderr
    resume = f"-m nvf.train resume={tmp_path / 'run'}"
    assert f"stopped by {how.name}; to resume: " in said
    assert resume in said
    assert not (tmp_path / "run/results.json").exists()
    saved = torch.load(tmp_path / LAST, weights_only=True)["global_step"]
    done = command("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved} of attention" in done.stdout
    assert figures(tmp_path / "run") == undisturbed
    assert "done already" in command("resume=run", cwd=tmp_path).stdout


def test_two_processes_are_not_at_one_run(tmp_path: Path) -> None:
    with Program(*LONG, cwd=tmp_path, at=(signal.SIGSTOP, *SAVED)) as process:
        process.wait_until_stopped()
        done = command("resume=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "is still running; wait for it, or stop it" in done.stderr
    assert (tmp_path / LAST).exists()


def test_slurm_has_a_run_requeued_by_lightning_and_it_goes_on(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    words = [word for word in LONG if not word.startswith("hydra.run.dir")]
    with Program(*words, cwd=tmp_path, at=(signal.SIGUSR1, *SAVED), **environment) as process:
        wait_for((tmp_path / "asked").exists, unless=process.ended)
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    done = command(*words, cwd=tmp_path, **environment, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    (run,) = {path.parent for path in tmp_path.glob("outputs/[0-9]*/*/results.json")}
    assert not list(run.rglob("hpc_ckpt*"))
    assert figures(run) == undisturbed


def test_resume_takes_the_runs_own_settings_alone(tmp_path: Path) -> None:
    for words, message in (
        (["resume=run"], "resume=run: there is no run/run.json"),
        (["resume=run", "k=3"], "resume=run takes the settings of the run in it; leave out k=3"),
        (["resume=run", "-m"], "resume=run takes the settings of the run in it; leave out -m"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            words_of(words)
    (tmp_path / "a 'b").mkdir()
    assert words_of(["--cfg", "job"]) == ["--cfg", "job"]


def test_a_record_that_was_changed_builds_nothing(run: Run, tmp_path: Path) -> None:
    run(*WORDS[:4], "trainer=debug", "stage=attention")
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    assert recorded(tmp_path / "run") == record["config"]
    record["config"]["trainer"]["callbacks"] = {"_target_": "os.system", "command": "false"}
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="damaged"):
        recorded(tmp_path / "run")
    del record["digest"]
    path.write_text(json.dumps(sealed(record)))
    with pytest.raises(InputError, match=r"wants os.system built, which conf/ does not name"):
        resumed_settings(tmp_path / "run", [])


def test_data_that_changed_are_refused(tmp_path: Path, folder: Path) -> None:
    config = compose_config("data=embeddings", f"data.dir={folder}", "trainer=debug", "cache=off", "dashboards=none")
    config["trainer"]["enable_progress_bar"] = False
    run = tmp_path / "run"
    run.mkdir()
    train(config, run, started=0.0)
    write_folder(folder, seed=1)
    with pytest.raises(InputError, match=r"the memory changed since the run began; restore them"):
        train(config, run, started=0.0, goes_on=True)


@pytest.mark.parametrize("samples", ["null", "640"])
def test_a_loss_that_is_no_number_ends_training_and_keeps_what_was_good(run: Run, tmp_path: Path, samples: str) -> None:
    words = [*WORDS[:4], "stage=attention", "attention.lr=1e30", "attention.schedule=constant", "save_every=1"]
    message = r"attention: the loss is nan or infinite in step \d+; lower attention\.lr"
    with pytest.raises(InputError, match=message):
        run(*words, f"train_samples={samples}", "attention.steps_per_epoch=50")
    saved = list((tmp_path / "run").rglob("last.ckpt"))
    for path in saved:
        step = torch.load(path, weights_only=True)["global_step"]
        assert step < 50


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=False)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, small_disk: Path) -> None:
    words = [word for word in LONG if not word.startswith("hydra.run.dir")]
    run = small_disk / "run"
    with Program(*words, f"hydra.run.dir={run}", cwd=tmp_path, at=(signal.SIGSTOP, *SAVED)) as process:
        process.wait_until_stopped()
        os.link(run / "checkpoints/attention/last.ckpt", small_disk / "kept")  # its room is not for the next one
        with pytest.raises(OSError, match="No space left"):
            fill(small_disk / "filler")
        process.send(signal.SIGCONT)
        assert process.wait() == 1
        said = process.stdout + process.stderr
    assert "Traceback" not in said
    assert re.search(r"error: the disk of .* is full .*; then .* resume=", said)
    assert torch.load(run / "checkpoints/attention/last.ckpt", weights_only=True)["global_step"] > 0
    assert not list(run.rglob("*.partial"))
    (small_disk / "filler").unlink()
    done = command(f"resume={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout


def test_a_full_cache_is_not_blamed_on_the_runs_folder(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "room").write_bytes(bytes(2**16))
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "filler")
    (small_disk / "room").unlink()
    words = [word for word in WORDS if not word.startswith("cache")]
    short = ["trainer=debug", "attention.hidden=8192", "hydra.run.dir=run", f"cache={small_disk / 'cache'}"]
    done = command(*words, *short, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: the disk of {small_disk / 'cache'}/")
    assert (tmp_path / "run/run.json").exists()


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    done = command(*WORDS, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: outputs cannot be written: outputs is no writable folder; give hydra.run.dir=path"
    )
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_too_little_memory_is_told_with_what_to_lower(tmp_path: Path) -> None:
    script = (
        "import resource, sys, torch, nvf.training.select, nvf.evaluation\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, taken + 2**29))\n"
        "from nvf.train import main\n"
        "main()\n"
    )
    (tmp_path / "limited.py").write_text(script)
    words = [*WORDS, "attention.batch_size=1000000", "attention.hidden=512"]
    done = subprocess.run(
        [sys.executable, "limited.py", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.match(r"error: out of memory \(.*\); start anew with a lower batch_size or ", done.stderr), done.stderr


def test_rows_on_the_disk_that_change_in_a_run_cost_the_run_not_the_truth(tmp_path: Path) -> None:
    memory = VectorMemory(torch.randn(50, 8), mapped=tmp_path)
    memory.check_unchanged()
    (rows,) = tmp_path.glob("*.rows")
    rows.chmod(0o644)
    with rows.open("r+b") as file:
        file.write(b"\1\2\3\4")
    os.utime(rows, (1, 1))
    with pytest.raises(InputError, match="changed"):
        memory.check_unchanged()


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deterministic_runs_find_the_same_on_any_number_of_threads(run: Run, tmp_path: Path, threads: int) -> None:
    words = [*SMALL, "data.rows=3000", "trainer=debug", "deterministic=true"]
    try:
        first, other = (run(*words, f"threads={count}", folder=tmp_path / str(count)) for count in (threads, 3))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    for what in ("test", "val", "gradients", "against_exact"):
        assert first[what] == other[what]
    weights = [(tmp_path / name / "pipeline/weights.safetensors").read_bytes() for name in (str(threads), "3")]
    assert weights[0] == weights[1]


def test_a_run_that_goes_on_under_other_arithmetic_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose_config(*SMALL)
    source = build_source(config)
    begin(tmp_path, {"config": config, **circumstances(source)}, goes_on=False).release()
    begin(tmp_path, {"config": config, **circumstances(source)}, goes_on=True).release()
    assert not caplog.records
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        begin(tmp_path, {"config": config, **circumstances(source)}, goes_on=True).release()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    changed = [record.args[1] for record in caplog.records if isinstance(record.args, tuple)]
    assert changed == ["threads", "deterministic"]
