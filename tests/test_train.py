"""The program as people use it: every config, the command line, sweeps, bad input, the wheel."""

import copy
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import nvf.train
from conftest import SMALL, SMALL_STEPS, command, compose_config, to_collection, write_folder
from nvf import InputError, Pipeline
from nvf.overrides import PATHS, TEXTS, settled, spelled
from nvf.train import CONF
from nvf.training.build import build

Run = Callable[..., dict[str, Any]]
CHOICES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_config_runs(run: Run, choice: str, tmp_path: Path, folder: Path) -> None:
    group, name = choice.split("/")
    overrides = [f"{group}={name}", *(["stage=joint"] if group == "joint" else [])]
    if choice == "trainer/gpu":
        compose_config(*overrides)  # what it asks for may not be there
        return
    if choice in ("data/embeddings", "queries/recorded", "recipe/recorded", "reranker/evidence"):
        overrides += ["data=embeddings", f"data.dir={folder}"]
    elif choice == "data/clustered":
        overrides += ["data.clusters=8", "data.rows_per_cluster=5", *SMALL[1:]]
    elif choice == "data/qdrant":
        to_collection(folder, tmp_path / "storage")
        storage = tmp_path / "storage"
        overrides += [f"data.path={storage}", "data.collection=items", f"data.dir={folder}", "data.distance=cosine"]
    else:
        overrides += SMALL
    shortened = SMALL_STEPS if group == "trainer" else ["trainer=debug"]
    results = run(*overrides, *shortened)
    assert results["config"][group if group not in ("experiment", "recipe") else "seed"] is not None
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.json", "examples.json", "checkpoints", "curves"} <= saved
    assert ("pipeline" in saved) == (choice != "stage/attention")


def test_results_keep_their_contract(run: Run) -> None:
    results = run(*SMALL, *SMALL_STEPS)
    assert set(results) >= {"test", "against_exact", "gradients", "seconds", "config", "versions", "memory"}
    for method in ("exact", "oracle", "attention", "pipeline"):
        for metric in ("top1", "top5", "mrr10"):
            figure = results["test"][method][metric]
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    for name in ("coverage", "rerank_given_coverage"):
        assert set(results["test"][name]) == {"value", "low", "high"}
    assert set(results["against_exact"]) == {"wins", "losses", "p"}
    assert set(results["seconds"]) == {"attention", "reranker", "evaluation", "total"}
    assert results["config"]["seed"] == results["config"]["attention"]["seed"] == 0
    assert results["versions"]["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch("sha256:[0-9a-f]{64}", results["memory"])


def test_a_new_user_types_one_line(tmp_path: Path) -> None:
    done = command(*SMALL, "trainer=debug", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "exact search" in done.stdout
    assert "against exact search" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    (run,) = tmp_path.glob("outputs/[0-9]*/*")
    assert {path.name for path in run.iterdir()} >= {".hydra", "train.log", "checkpoints", "pipeline", "results.json"}
    assert {path.name for path in (run / "checkpoints/reranker").iterdir()} == {
        "best.ckpt",
        "best.safetensors",
        "last.ckpt",
    }
    assert "exact search" in (run / "train.log").read_text()

    hits = Pipeline.load(run / "pipeline").search(np.random.default_rng(0).standard_normal((7, 8)), k=5)
    assert hits.rows.shape == hits.probabilities.shape == (7, 5)


def test_a_sweep_leaves_whole_runs_and_one_tree(tmp_path: Path) -> None:
    done = command("-m", *SMALL, "trainer=debug", "data=synthetic", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Epoch" not in done.stdout  # no progress bars
    runs = sorted(tmp_path.glob("outputs/multirun/*/*/[0-9]"))
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert [result["config"]["seed"] for result in results] == [0, 1]
    assert results[0]["memory"] != results[1]["memory"]
    for run in runs:
        assert list(run.glob("events.out.tfevents.*"))
        assert list(run.glob("curves/pipeline/events.out.tfevents.*"))
        assert (run / "pipeline/config.json").is_file()


TRAINER = {
    True: [  # which of them work
        *("precision=bf16-mixed", "precision=16-mixed", "limit_val_batches=1", "limit_train_batches=2"),
        *("max_steps=2", "max_steps=4", "max_steps=-1", "min_steps=8", "min_epochs=3", "max_epochs=null"),
        *("check_val_every_n_epoch=2", "check_val_every_n_epoch=9", "val_check_interval=0.5"),
        *("accumulate_grad_batches=2", "gradient_clip_val=0.5", "fast_dev_run=true", "detect_anomaly=true"),
        "num_sanity_val_steps=1",
    ],
    False: [
        *("precision=64-true", "precision=bf16-true", "precision=16-true", "precision=transformer-engine"),
        *("enable_checkpointing=false", "use_distributed_sampler=true", "inference_mode=true", "logger=false", "foo=1"),
    ],
}


@pytest.mark.parametrize(("word", "works"), [(word, works) for works, words in TRAINER.items() for word in words])
def test_the_trainers_settings_work_or_are_refused_before_the_fit(
    run: Run, tmp_path: Path, word: str, works: bool
) -> None:
    write_folder(tmp_path / "f", queries=100)
    small = ["data=embeddings", f"data.dir={tmp_path / 'f'}", "attention=linear", "attention.epochs=2"]
    words = [*small, "reranker.epochs=2", "reranker.folds=2", *f"++trainer.{word}".split()]
    if works:
        assert run(*words)["val"]["pipeline"]["top1"]["value"] > 0
    else:
        with pytest.raises(InputError, match=word.partition("=")[0]):
            run(*words)
        assert not list((tmp_path / "run").rglob("*.ckpt"))


BAD_SETTINGS = [
    (["k=0"], "k=0 is not a whole number of at least 1; 5 is the default"),
    (["k=many"], "k=many is not a whole number"),
    (["save_every=0"], "save_every=0 is not a whole number of at least 1; null saves"),
    (["deterministic=yes please"], "deterministic=yes please is neither true nor false"),
    (["seed=-1"], "seed=-1 is not a whole number of at least 0"),
    (["queries=noisy", "queries.sigma=-0.1"], "queries.sigma=-0.1 is not a number of at least 0"),
    (["data=embeddings"], "data.dir is not set; name the folder"),
    (["queries=recorded"], "data=synthetic has no recorded queries; choose queries=nearest"),
    (["attention_checkpoint=none.safetensors"], "attention_checkpoint=none.safetensors does not exist; name"),
    (["attention.epochs=0"], "attention.epochs=0 is not a whole number of at least 1; raise it"),
    (["attention.steps_per_epoch=null"], "generated queries never end; set steps_per_epoch"),
    (["stage=joint", "joint.relaxation=[1,0]"], "joint.relaxation=0 is not a number above 0"),
    (["stage=joint", "joint.epochs=0"], "joint.epochs=0 is not a whole number of at least 1"),
    (["reranker.lr=-1"], "lr=-1 is not a number above 0; 1e-3 is a safe start"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_SETTINGS, ids=[" ".join(o) for o, _ in BAD_SETTINGS])
def test_bad_settings_are_refused_before_any_work(run: Run, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        run(*overrides)
    assert list((tmp_path / "run").iterdir()) == []


def numbers(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of the numeric settings in a configuration."""
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(prefix + name)
    return found


@pytest.mark.parametrize(
    "choices",
    [["queries=warped"], ["data=clustered", "queries=noisy", "stage=joint", "joint=relaxed"], ["data=embeddings"]],
)
def test_every_number_is_checked_at_the_door(tmp_path: Path, folder: Path, choices: list[str]) -> None:
    choices = [*choices, *([f"data.dir={folder}"] if "data=embeddings" in choices else [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", choices))  # values that follow from others follow the bad one
    groups = ("data", "queries", "attention", "reranker", *(["joint"] if "stage=joint" in choices else []))
    names = ["k", *(name for group in groups for name in numbers({group: config[group]}))]
    assert len(names) >= 15
    for name in names:
        *path, leaf = name.split(".")
        for value in ("abc", -1, math.nan, [1], True):
            bad = copy.deepcopy(config)
            functools.reduce(dict.__getitem__, path, bad)[leaf] = value
            with pytest.raises(InputError, match=re.escape(str(value))):
                build(OmegaConf.to_container(OmegaConf.create(bad), resolve=True))


BAD_COMMANDS = [
    (["k=1001"], "error: k=1001 exceeds the memory's 1000 rows; lower k"),
    (["data=embeddings", "data.dir=folder"], "error: folder/queries.npy: row 3 holds NaN or infinite values"),
    (["trainer.devices=many"], "error: trainer: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_COMMANDS, ids=[" ".join(a) for a, _ in BAD_COMMANDS])
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_folder(tmp_path / "folder")
    queries = np.load(tmp_path / "folder/queries.npy")
    queries[3, 1] = np.nan
    np.save(tmp_path / "folder/queries.npy", queries)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"corpus.npy", "queries.npy", "targets.npy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("+attention.dropot=0.5", "a run reads the settings in conf/ and no others"),
        ("data=moon", "'data/moon'"),
    ],
)
def test_what_is_not_there_is_refused_before_torch_is_imported(tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = command(*arguments.split(), cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 1
    assert message in done.stderr
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"torch.py"}


TYPED = [
    "2024",
    "1e3",
    "1_1_1",
    "0x10",
    "true",
    "nan",
    "run=1",
    "café",
    "it's",
    "[a]",
    "{a: 1}",
    "a b",
    "50%",
    "C:\\d\\",
]


NAMES = sorted(set(TEXTS) - {"resume", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"})


@pytest.mark.parametrize("text", TYPED)
def test_text_stays_the_text_that_was_typed(text: str) -> None:
    config = compose_config("data=qdrant", *spelled([f"{name}={text}" for name in NAMES]))
    found = {name: functools.reduce(dict.__getitem__, name.split("."), config) for name in NAMES}
    assert found == dict.fromkeys(NAMES, text)


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_a_sweep_stay_the_texts_that_were_typed(name: str) -> None:
    parser = OverridesParser.create()
    (word,) = spelled([f"{name}={','.join(TYPED)}"])
    sweep = parser.parse_override(word)
    assert [parser.parse_override(f"{name}={one}").value() for one in sweep.sweep_string_iterator()] == TYPED


def test_words_that_mean_something_keep_their_meaning() -> None:
    meant = ["data.dir=null", "cache=false", "resume=null", "data.dir='1e3'", "data.dir='a','b'", "-m", "k=1,2"]
    meant += ["hydra.run.dir=runs/${now:%Y}", "data.dir=choice(1,2)", "experiment=k_sweep", "+trainer.max_steps=2"]
    assert spelled(meant) == meant
    assert spelled(["hydra.run.dir=~/a", "data.dir=a,b"]) == [f"hydra.run.dir='{Path.home()}/a'", "data.dir='a','b'"]


@pytest.mark.parametrize("start", ["", "/where/it/was/typed"])
def test_paths_start_where_the_command_was_typed(start: str) -> None:
    words = ["data=qdrant", *spelled([f"{name}=~/{name}" for name in PATHS[:2]]), "cache=kept"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*words, "attention_checkpoint=/a.ckpt", "data.path=2024"])  # a number, as in a file
    config = settled(cfg, start)
    assert config["data"]["memory"]["path"] == config["data"]["path"]
    expected = [str(Path.home() / name) for name in PATHS[:2]] + [os.path.join(start, "kept"), "/a.ckpt"]
    assert [config["data"][name] for name in ("dir", "mapped")] + [
        config["cache"],
        config["attention_checkpoint"],
    ] == expected
    assert config["data"]["path"] == os.path.join(start, "2024")
    assert config["reranker_checkpoint"] is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+foo=1", "leave out the sign"),
        ("++foo=1", "leave out the sign"),
        ("foo=1", "foo"),
        ("atention=mlp", "atention"),
        ("++attention={dropot: 1}", "leave out the sign"),
        ("queries.sigma=0.1", "sigma"),
        ("+queries.sigma=0.1", "leave out the sign"),
        ("~attention.lr", "leave out the sign"),
        ("queries.sigma=0.1=2", "mismatched input"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_by_name(
    word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        nvf.train.run(word)
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_choice_and_setting_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = command("--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    for path in CONF.glob("*/*.yaml"):
        assert re.search(rf"{path.parent.name}: .*\b{path.stem}\b", done.stdout), path
    for path in CONF.glob("hydra/launcher/*.yaml"):
        assert re.search(rf"hydra/launcher=.*\b{path.stem}\b", done.stdout), path
    for setting in ("seed", "k", "cache", "threads", "resume", "attention_checkpoint"):
        assert f"\n{setting}: " in done.stdout


def test_what_suits_a_kind_of_queries_is_a_recipe_and_can_be_pinned(folder: Path) -> None:
    def fitted(*words: str) -> tuple[str, str, int]:
        config = compose_config(*words)
        return config["attention"]["transform"], config["reranker"]["kind"], config["k"]

    assert fitted() == fitted("queries=noisy", "recipe=nearest") == ("mlp", "residual", 5)
    assert fitted("queries=noisy") == ("linear", "residual", 5)
    assert fitted("data=embeddings") == fitted("data=qdrant") == ("linear", "evidence", 20)
    assert fitted("data=embeddings", "queries=noisy") == fitted("queries=noisy")
    assert fitted("experiment=noise_sweep", "reranker=mlp", "k=3") == ("linear", "mlp", 3)
    for group in ("data", "queries"):
        for path in (CONF / group).glob("*.yaml"):
            assert "_global_\n" not in path.read_text(), path


def test_a_group_may_ask_for_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "own/experiment").mkdir(parents=True)
    mode = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      k: 0,1001\n"
    (tmp_path / "own/experiment/two.yaml").write_text(mode)
    done = command("--config-dir=own", "experiment=two", cwd=tmp_path)
    assert done.returncode == 1
    assert "k=0 is not a" in done.stderr
    assert (tmp_path / "outputs/multirun").is_dir()


def test_bad_input_in_a_sweep_fails_the_sweep(tmp_path: Path) -> None:
    done = command("-m", "k=0,1001", cwd=tmp_path)
    assert done.returncode == 1
    assert "k=0 is not a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheel_carries_everything(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run([*pip, *built], check=True)
    (wheel,) = tmp_path.glob("nvf-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")  # which is what pip does with it
    assert (tmp_path / "site/nvf/dashboards/page.html").is_file()
    (tmp_path / "empty").mkdir()
    code = "import sys, nvf.train; nvf.train.run(*sys.argv[1:]); print(nvf.train.CONF)"
    found = subprocess.run(
        [sys.executable, "-c", code, *SMALL, "trainer=debug", "dashboards=none", "stage=attention"],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == str(tmp_path / "site/nvf/conf")
    assert list((tmp_path / "empty").glob("outputs/*/*/results.json"))


DEBUG = [*SMALL, "trainer=debug", "dashboards=none", "stage=attention"]


def test_runs_from_python_are_those_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    started = time.perf_counter()
    first = nvf.train.run(*DEBUG, "cache=off", "threads=1")
    between = time.perf_counter()
    second = nvf.train.run(*DEBUG, "cache=off", "threads=1", "seed=1")
    assert first["seconds"]["total"] <= between - started
    assert second["seconds"]["total"] <= time.perf_counter() - between
    assert signal.getsignal(signal.SIGINT) is handler
    assert first["memory"] != second["memory"]
    assert first["test"] == run(*DEBUG, "threads=1")["test"]
    assert second["config"]["seed"] == 1
    assert len(list(tmp_path.glob("outputs/*/*/results.json"))) == 2
    assert "exact search" in next(tmp_path.glob("outputs/*/*/train.log")).read_text()


def test_folders_with_numbers_for_names_are_trained_on_and_gone_on_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "2024")
    words = ["data.dir=2024", "data.mapped=77", "cache=1_1", "attention=linear", "hydra.run.dir=1e3"]
    found = nvf.train.run("data=embeddings", "trainer=debug", "stage=attention", *words)
    assert {path.name for path in tmp_path.iterdir()} == {"2024", "77", "1_1", "1e3"}
    assert nvf.train.run("resume=1e3") == found
    (tmp_path / "1e3/results.json").unlink()
    assert nvf.train.run("resume=1e3")["test"] == found["test"]


@pytest.mark.parametrize(
    "words", [["-m"], ["k=1,2"], ["experiment=k_sweep"], ["resume=true"], ["trainer.devices=2"], ["data=moon"], ["k=0"]]
)
def test_what_cannot_be_one_run_is_refused_in_python(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        nvf.train.run(*words)
    assert not list(tmp_path.rglob("run.json"))


def test_a_stream_that_is_no_file_is_written_to(tmp_path: Path) -> None:
    script = "import contextlib, io, nvf.train\nwith contextlib.redirect_stderr(io.StringIO()):\n    nvf.train.main()\n"
    done = subprocess.run(
        [sys.executable, "-c", script, "data=embeddings"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: data.dir is not set")


def test_a_run_in_a_folder_of_its_own_finds_its_data(tmp_path: Path) -> None:
    write_folder(tmp_path / "café")
    words = [
        "data=embeddings",
        "data.dir=café",
        "data.mapped=rows",
        "cache=kept",
        "attention=linear",
        "stage=attention",
    ]
    words += ["trainer=debug", "hydra.job.chdir=true", "hydra.run.dir=ré=1"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "everything is in" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"café", "rows", "kept", "ré=1"}
