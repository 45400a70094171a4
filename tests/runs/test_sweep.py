"""Sweeps as people run them: side by side, stage 1 once, killed, resumed, and true to their exit status."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from conftest import SMALL, SMALL_STEPS, command, compose_config, without_time
from nvf import InputError
from nvf.files.records import sealed
from nvf.overrides import composed, words_of
from nvf.runs import sweep as sweeps
from nvf.runs.settings import key, material
from programs import Program, wait_for

STEPS = [word for word in SMALL_STEPS if not word.startswith("reranker.epochs")]
WORDS = [*SMALL, *STEPS, "dashboards=none", "dashboards.levels=true"]
SWEEP = ["-m", *WORDS, "reranker.epochs=12", "hydra/launcher=parallel"]
FOUR = [*SWEEP, "reranker.lr=1e-3,3e-3", "reranker.seed=0,1"]
TWO = [*SWEEP, "reranker.lr=1e-3", "reranker.seed=0,1"]  # the first two jobs of FOUR


def jobs(cwd: Path) -> dict[str, dict[str, Any]]:
    """The results of the one sweep under a folder, by job."""
    found = sorted(cwd.glob("outputs/multirun/*/*/*/results.json"))
    assert len({path.parents[1] for path in found}) == 1
    return {path.parent.name: json.loads(path.read_text()) for path in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = command(*FOUR, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "done already" not in done.stdout
    return cwd


def test_jobs_side_by_side_share_one_stage_1_and_end_on_a_table(undisturbed: Path) -> None:
    results = jobs(undisturbed)
    assert list(results) == ["0", "1", "2", "3"]
    assert sum(result["attention_fitted_by"] is None for result in results.values()) == 1
    assert len(list(undisturbed.glob("outputs/cache/*.safetensors"))) == 1
    assert {result["config"]["threads"] for result in results.values()} == {1}
    (sweep,) = undisturbed.glob("outputs/multirun/*/*")
    names = {path.name for path in sweep.iterdir() if path.name.startswith("comparison")}
    assert names == {f"comparison.{end}" for end in ("md", "csv", "png")}
    (events,) = sweep.glob("events.out.tfevents.*")
    shown = EventAccumulator(str(events)).Reload()
    assert shown.Tags()["images"] == ["figures/1_curves", "figures/2_comparison"]
    assert len(shown.Images("figures/2_comparison")) == 1
    (text,) = shown.Tensors("comparison/text_summary")
    assert (
        text.tensor_proto.string_val[0].decode().replace("&lt;", r"\<") + "\n" == (sweep / "comparison.md").read_text()
    )
    lines = {path.name for path in sweep.glob("*/curves/*")}
    assert lines == {"stage-1", "pipeline"}  # without a job's level lines, of which there would be many


def test_a_resumed_sweep_runs_what_is_missing_alone(undisturbed: Path) -> None:
    before = jobs(undisturbed)
    (sweep,) = undisturbed.glob("outputs/multirun/*/*")
    (sweep / "1/results.json").unlink()
    half = (sweep / "2/results.json").read_text()[:-100]
    (sweep / "2/results.json").write_text(half)
    other = json.loads((sweep / "3/results.json").read_text())
    other["config"]["reranker"]["lr"] = 0.5
    (sweep / "3/results.json").write_text(json.dumps(other))
    done = command(f"resume={sweep.relative_to(undisturbed)}", cwd=undisturbed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done already") == 1
    after = jobs(undisturbed)
    assert {job: without_time(result) for job, result in after.items()} == {
        job: without_time(result) for job, result in before.items()
    }
    assert after["0"]["seconds"] == before["0"]["seconds"]
    assert json.loads((sweep / "3/results.before.json").read_text())["config"]["reranker"]["lr"] == 0.5
    for job in "0123":
        points = [
            (value.tag, event.step)
            for path in (sweep / job / "curves/pipeline").glob("events.out.tfevents.*")
            for event in EventFileLoader(str(path)).Load()
            for value in event.summary.value
            if value.tag.startswith("train/")
        ]
        assert len(points) == len(set(points)) > 0  # those of two tries do not mix


def workers(parent: int) -> list[int]:
    """The processes that run jobs."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "popen_loky" in line]


@pytest.mark.parametrize("attempt", range(int(os.environ.get("NVF_KILLS", "1"))))
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_fails_the_sweep_and_resume_completes_it(
    undisturbed: Path, tmp_path: Path, how: signal.Signals, attempt: int
) -> None:
    rng = random.Random(f"{attempt} {how}")
    with Program(*TWO, cwd=tmp_path) as process:
        begun = "*/checkpoints/reranker/last.ckpt" if attempt == 0 else "train.log"
        wait_for(lambda: list(tmp_path.glob(f"outputs/multirun/*/*/{begun}")), unless=process.ended)
        time.sleep(rng.uniform(0.0, 15.0) if attempt else 0.0)
        if running := workers(process.pid):
            os.kill(rng.choice(running), how)
        status = process.wait()
    unfinished = len(list(tmp_path.glob("outputs/multirun/*/*/*/results.json"))) < 2
    assert status != 0 if unfinished else status in (0, 1)
    (sweep,) = tmp_path.glob("outputs/multirun/*/*")
    done = command(f"resume={sweep}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected, found = jobs(undisturbed), jobs(tmp_path)
    assert list(found) == ["0", "1"]
    assert all(without_time(result) == without_time(expected[job]) for job, result in found.items())


@pytest.mark.slow
def test_a_failing_job_leaves_its_reason_and_the_others_run(tmp_path: Path) -> None:
    done = command("-m", *WORDS, "reranker.epochs=1", "k=0,3", "hydra/launcher=parallel", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 jobs that began have no results (0)" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(jobs(tmp_path)) == ["1"]
    (log,) = tmp_path.glob("outputs/multirun/*/*/0/train.log")
    assert "k=0 is not a whole number of at least 1" in log.read_text()


@pytest.mark.slow  # joblib shows the same in less time
def test_the_local_executor_of_submitit_runs_a_sweep(tmp_path: Path) -> None:
    done = command("-m", *WORDS, "reranker.epochs=1", "seed=0,1", "hydra/launcher=local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(jobs(tmp_path)) == ["0", "1"]


def test_optuna_searches_for_the_best_on_validation(tmp_path: Path) -> None:
    done = command("experiment=search", "hydra.sweeper.n_trials=2", *WORDS, "reranker.epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [result["val"]["pipeline"]["top1"]["value"] for result in jobs(tmp_path).values()]
    assert len(found) == 2
    assert f"Best value: {max(found)}" in done.stdout


def test_the_slurm_launcher_is_composed(tmp_path: Path) -> None:
    done = command("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "--cfg", "hydra", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher" in done.stdout
    assert "partition: gpu" in done.stdout


@pytest.mark.parametrize(
    ("launcher", "share"),
    [
        ({"_target_": "x.BasicLauncher"}, None),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 3}, 2),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -1}, 1),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 20}, 1),
        ({"_target_": "x.LocalLauncher", "cpus_per_task": None}, 1),
        ({"_target_": "x.LocalLauncher", "cpus_per_task": 2}, 2),
        ({"_target_": "x.SlurmLauncher", "cpus_per_task": 4}, None),
    ],
)
def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch, launcher: dict[str, Any], share: int | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert sweeps.threads(launcher) == share


@pytest.mark.parametrize("words", [["trainer.devices=2"], ["trainer=ddp"], ["+trainer.num_nodes=2"]])
def test_local_ddp_in_a_sweep_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"trainer\.devices=\w+: .*; give trainer\.devices=1 "):
        sweeps.refuse_local_ddp(compose_config(*words))
    monkeypatch.setenv("SLURM_NTASKS", "2")  # the cluster starts the processes
    sweeps.refuse_local_ddp(compose_config(*words))


@pytest.mark.parametrize("words", [["trainer=ddp", "trainer.devices=1"], ["trainer=debug"]])
def test_what_starts_one_process_may_be_swept(words: list[str]) -> None:
    sweeps.refuse_local_ddp(compose_config(*words, "trainer.accelerator=cpu"))


def test_a_sweep_is_resumed_by_its_folder_with_the_words_that_it_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["k=1,2", "attention=mlp,linear", "data.dir='a=1'", "experiment=k_sweep", "hydra/launcher=parallel"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.json").write_text(json.dumps(sealed({"overrides": own})))
    resumed = ["--multirun", *own, "resume='s'", "hydra.sweep.dir='s'"]
    assert words_of(["resume=s"]) == resumed
    assert words_of(["resume=s", "hydra.launcher.n_jobs=3"]) == [
        *resumed[:-2],
        "hydra.launcher.n_jobs=3",
        *resumed[-2:],
    ]
    for others in (["k=3"], ["-m"]):
        with pytest.raises(InputError, match=f"leave out {others[0]}"):
            words_of(["resume=s", *others])
    with pytest.raises(InputError, match="is for the command line"):
        composed(["resume=s"])


@pytest.mark.parametrize(
    "word",
    [
        *("attention._target_=os.system", "++attention={_target_: os.system}", "hydra.launcher._target_=os.system"),
        *("--config-dir=/tmp", "-cd=/tmp", "hydra.searchpath=[/tmp]", "+hydra.callbacks.x={}", "hydra/launcher=../x"),
        *(
            "experiment=../../../../tmp/evil",
            "experiment=${k}",
            "/tmp/evil=x",
            "data@x=synthetic",
            "",
            1,
            None,
            ["k=1"],
        ),
    ],
)
def test_a_sweeps_record_has_nothing_of_others_read_or_built(tmp_path: Path, word: Any) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(sealed({"overrides": ["k=1,2", word]})))
    with pytest.raises(InputError, match="start the sweep anew"):
        words_of([f"resume={tmp_path}"])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"overrides": null}', '{"overrides": ["k=1"]}', "\x00"])
def test_a_damaged_record_of_a_sweep_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(InputError, match="damaged"):
        sweeps.words(tmp_path)


@pytest.mark.parametrize("word", ["resume=true", "resume=false", "resume=outputs"])
def test_resume_names_a_folder(tmp_path: Path, word: str) -> None:
    (tmp_path / "outputs").mkdir()
    done = command(*WORDS, word, cwd=tmp_path) if word == "resume=true" else command(word, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {word}")


def test_one_list_says_which_settings_leave_the_figures_as_they_are() -> None:
    config = compose_config(
        "dashboards=none", "trainer.enable_progress_bar=false", "threads=1", "cache=off", "save_every=3"
    )
    same = compose_config("trainer.log_every_n_steps=1", "+trainer.enable_checkpointing=true")
    assert key(material(config)) != key(material(same))
    del same["trainer"]["enable_checkpointing"]
    assert key(material(config)) == key(material(same))
    assert {"k", "attention.lr", "trainer.precision"} <= material(config).keys()
