"""Stages as the program fits them: what is kept, what competes, which checkpoints are taken."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import SMALL, SMALL_STEPS, compose_config
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.runs.sweep import finished
from nvf.train import train
from nvf.training.build import build, build_source
from nvf.training.checkpoints import load_attention
from nvf.training.select import fit_attention

KEPT = {"best.ckpt", "best.safetensors", "last.ckpt"}
Run = Callable[..., dict[str, Any]]


def test_one_seed_gives_one_result(run: Run, tmp_path: Path) -> None:
    first, again, other = (
        run(*SMALL, *SMALL_STEPS, f"seed={seed}", folder=tmp_path / name)
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    for key in ("test", "val", "against_exact", "gradients", "memory"):
        assert first[key] == again[key]
    assert first["test"] != other["test"]
    assert first["memory"] != other["memory"]


def test_the_best_epoch_goes_on(run: Run, tmp_path: Path) -> None:
    results = run(*SMALL, "stage=attention", "attention.epochs=6", "attention.steps_per_epoch=4", "attention.lr=0.1")
    best = torch.load(tmp_path / "run/checkpoints/attention/best.ckpt", weights_only=True)
    (kept,) = [state for name, state in best["callbacks"].items() if name.startswith("KeepBest")]
    assert results["val"]["attention"]["top1"]["value"] == pytest.approx(float(kept["best_model_score"]), abs=1e-6)
    assert results["test"]["pipeline"] is None
    assert not (tmp_path / "run/pipeline").exists()


@pytest.mark.parametrize("transform", ["linear", "residual"])
def test_the_untrained_start_wins_over_harmful_training(
    run: Run, tmp_path: Path, folder: Path, transform: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nvf")
    ruin = [f"{stage}.{setting}" for stage in ("attention", "reranker") for setting in ("lr=30", "schedule=constant")]
    results = run("data=embeddings", f"data.dir={folder}", f"attention={transform}", "reranker=residual", *ruin)
    top1 = {method: results["val"][method]["top1"]["value"] for method in ("exact", "attention", "pipeline")}
    assert top1["exact"] == top1["attention"] == top1["pipeline"]
    assert "no epoch validates better than the untrained start" in caplog.text
    assert {path.name for path in (tmp_path / "run/checkpoints/attention").iterdir()} == KEPT
    source = build_source(compose_config("data=embeddings", f"data.dir={folder}"))
    attention, _ = load_attention(tmp_path / "run/checkpoints/attention/best.safetensors", source.memory)
    queries = torch.randn(5, 8)
    assert torch.equal(attention.transform(queries), queries)


def test_recorded_queries_stop_early(run: Run, tmp_path: Path, folder: Path) -> None:
    run(
        "data=embeddings",
        f"data.dir={folder}",
        "attention=linear",
        "attention.epochs=50",
        "attention.lr=1",
        "attention.patience=2",
    )
    last = torch.load(tmp_path / "run/checkpoints/attention/last.ckpt", weights_only=True)
    assert last["epoch"] < 40


def test_stage_one_can_be_had_from_a_checkpoint(run: Run, tmp_path: Path) -> None:
    first = run(*SMALL, *SMALL_STEPS, "stage=attention", folder=tmp_path / "first")
    path = tmp_path / "first/checkpoints/attention/best.safetensors"
    second = run(*SMALL, *SMALL_STEPS, f"attention_checkpoint={path}", folder=tmp_path / "second")
    whole = run(*SMALL, *SMALL_STEPS, folder=tmp_path / "whole")
    assert second["test"] == whole["test"]
    assert second["test"]["attention"] == first["test"]["attention"]
    assert not (tmp_path / "second/checkpoints/attention").exists()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages for the small synthetic memory of seed 0."""
    folder = tmp_path_factory.mktemp("stages")
    train(compose_config(*SMALL, *SMALL_STEPS, "trainer.enable_progress_bar=false"), folder, started=0.0)
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage 1 for the small synthetic memory of seed 0."""
    folder = tmp_path_factory.mktemp("stage1")
    config = compose_config(*SMALL, *SMALL_STEPS, "trainer.enable_progress_bar=false")
    fit_attention(build(config), folder)
    return folder / "checkpoints/attention/best.safetensors"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "has memory sha256:.*, but this run has sha256:.*; fit the stages anew"),
        (["data.dim=4"], "has memory"),
        (["attention=linear"], "has settings .*'mlp'.*, but this run has .*'linear'"),
        (["attention.hidden=3"], "has settings"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(checkpoint: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(compose_config(*SMALL, *overrides, f"attention_checkpoint={checkpoint}"))


def test_a_damaged_or_missing_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    memory = build_source(compose_config(*SMALL)).memory
    whole = checkpoint.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError, match="is truncated or not a checkpoint of NVF"):
            load_attention(tmp_path / "cut.safetensors", memory)
    with pytest.raises(InputError, match="does not exist; name a run's"):
        load_attention(tmp_path / "none.safetensors", memory)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    save_file(SoftAttention(memory).state_dict(), tmp_path / "foreign.safetensors")
    for foreign in ("foreign.ckpt", "foreign.safetensors"):
        with pytest.raises(InputError, match="not a checkpoint of NVF"):
            load_attention(tmp_path / foreign, memory)


JOINT = ["stage=joint", "joint.epochs=2", "joint.steps_per_epoch=3"]


@pytest.mark.filterwarnings("error:.*in eval mode")  # an evaluation comes before; dropout is on again after it
def test_joint_training_goes_on_from_both_stages(run: Run, tmp_path: Path) -> None:
    log = "trainer.log_every_n_steps=1"
    whole = run(*SMALL, *SMALL_STEPS, *JOINT, log, folder=tmp_path / "whole")
    apart = run(*SMALL, *SMALL_STEPS, folder=tmp_path / "apart")
    assert whole["joint"]["before"] == apart["test"]
    assert apart["joint"] is None
    assert whole["seconds"]["joint"] > 0
    checkpoints = tmp_path / "whole/checkpoints"
    paths = {
        stage: f"{stage}_checkpoint={checkpoints / stage / 'best.safetensors'}" for stage in ("attention", "reranker")
    }
    for given in ([paths["reranker"]], [*paths.values()]):
        again = run(*SMALL, *SMALL_STEPS, *JOINT, log, *given, folder=tmp_path / f"again{len(given)}")
        assert again["test"] == whole["test"]
        assert again["joint"] == whole["joint"]
        assert {path.name for path in (tmp_path / f"again{len(given)}/checkpoints").iterdir()} == {"joint"}
    training = whole["gradients"]["training"]["joint"]
    assert set(training) == {"steps", "query", "transform", "temperature", "reranker"}
    assert training["steps"] == 6


def test_joint_training_from_scratch_fits_nothing_apart(run: Run, tmp_path: Path) -> None:
    longer = ["joint.epochs=8", "joint.steps_per_epoch=10", "joint.lr=0.03"]
    results = run(*SMALL, "stage=joint", "stage.warm_start=false", *longer)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"joint"}
    assert results["test"]["pipeline"]["top1"]["value"] > results["joint"]["before"]["pipeline"]["top1"]["value"] + 0.1
    assert set(results["gradients"]["training"]) == {"joint"}


def test_joint_training_of_recorded_queries_gives_way_unless_it_is_clearly_better(
    run: Run, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["data=embeddings", f"data.dir={folder}", "attention=linear", "attention.keys=learned", *SMALL_STEPS]
    for clear in (False, True):
        monkeypatch.setattr("nvf.training.select.clearly_above", lambda *_, clear=clear: clear)
        results = run(*few, *JOINT, "joint.lr=0.01", "joint.epochs=6", folder=tmp_path / str(clear))
        assert results["joint"]["kept"] == clear
        assert (results["test"] == results["joint"]["before"]) == (not clear)


@pytest.mark.parametrize(("allowed", "epochs"), [(5, 1), (3, 0)])
def test_joint_training_keeps_to_the_limits(
    run: Run, folder: Path, caplog: pytest.LogCaptureFixture, allowed: int, epochs: int
) -> None:
    caplog.set_level(logging.INFO, "nvf")
    few = ["data=embeddings", f"data.dir={folder}", "attention=linear", "attention.epochs=1", "reranker.epochs=1"]
    results = run(*few, "stage=joint", "reranker.folds=null", f"data.work={allowed * 50 * 320 * 8}")
    by = f"data.work={allowed * 50 * 320 * 8:g}"
    assert results["cut"] == {"joint": {"by": by, "kept": {"epochs": epochs}, "asked": {"epochs": 3}}}
    assert f"joint training was cut    to {epochs or 'no'} of 3 epochs, by {by}" in caplog.text
    assert epochs or not results["joint"]["kept"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reranker_checkpoint=none.safetensors"],
            "reranker_checkpoint=none.safetensors does not exist; name a run's",
        ),
        (["reranker_checkpoint=ATTENTION"], "has stage attention, but this run needs reranker; name a run's"),
        (["reranker_checkpoint=RERANKER", "seed=1"], "has memory sha256:.*; fit the stages anew"),
        (["reranker_checkpoint=RERANKER", "reranker=mlp"], "has reranker .*'residual'.*, but this run has .*'mlp'"),
        (["reranker_checkpoint=RERANKER", "k=4"], "has k 5, but this run has 4"),
        (["attention_checkpoint=RERANKER"], "has stage reranker, but this run needs attention"),
        (["stage.warm_start=maybe"], "stage.warm_start=maybe is neither true nor false"),
    ],
)
def test_joint_training_refuses_what_does_not_fit(
    run: Run, tmp_path: Path, checkpoints: Path, overrides: list[str], message: str
) -> None:
    for stage in ("attention", "reranker"):
        path = str(checkpoints / stage / "best.safetensors")
        overrides = [override.replace(stage.upper(), path) for override in overrides]
    with pytest.raises(InputError, match=message):
        run(*SMALL, *JOINT, *overrides)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_reranker_of_another_log_is_refused(run: Run, tmp_path: Path, folder: Path) -> None:
    few = ["data=embeddings", f"data.dir={folder}", "attention=linear", "attention.epochs=1", "reranker.epochs=1"]
    run(*few, folder=tmp_path / "first")
    path = tmp_path / "first/checkpoints/reranker/best.safetensors"
    np.save(folder / "queries.npy", np.load(folder / "queries.npy") + 0.01)
    with pytest.raises(InputError, match="was fitted with another log of queries; fit the stages anew"):
        run(*few, f"reranker_checkpoint={path}", folder=tmp_path / "second")


def test_generated_queries_over_a_folders_memory(run: Run, folder: Path) -> None:
    (folder / "queries.npy").unlink()
    (folder / "targets.npy").unlink()
    small = ["queries.val_samples=100", "queries.test_samples=100", *SMALL_STEPS]
    results = run("data=embeddings", f"data.dir={folder}", "queries=noisy", *small)
    assert results["test"]["oracle"] == results["test"]["exact"]


def test_several_right_answers_run_to_the_end(run: Run, tmp_path: Path, folder: Path) -> None:
    targets = np.load(folder / "targets.npy")
    np.save(folder / "targets.npy", np.stack([targets, (targets + 1) % 50], axis=1))
    one = run("data=embeddings", f"data.dir={folder}", "attention.epochs=2", "reranker.epochs=2")
    assert one["test"]["pipeline"]["top1"]["value"] > 0
    assert finished(tmp_path / "run", one["config"]) == one["val"]["pipeline"]["ndcg10"]["value"]


LARGE = {
    "half": ["data.dtype=float16"],
    "mapped": ["data.dtype=bfloat16", "data.mapped=rows"],
    "sampled": ["attention.sample=20", "attention.hard=3"],
}


@pytest.mark.parametrize("way", LARGE)
@pytest.mark.parametrize("recorded", [False, True])
def test_ways_with_a_large_memory_run_to_the_end(
    run: Run, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, way: str, recorded: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["data=embeddings", f"data.dir={folder}"] if recorded else [*SMALL, "queries=noisy"]
    results = run("trainer=debug", "stage=joint", *given, *LARGE[way])
    plain = run("trainer=debug", "stage=joint", *given, folder=tmp_path / "plain")
    for method in ("exact", "attention", "pipeline"):
        ours, theirs = (found["test"][method]["top1"]["value"] for found in (results, plain))
        assert ours == pytest.approx(theirs, abs=0.1)
    assert ("mapped" in results["config"]["data"] and (tmp_path / "rows").is_dir()) == (way == "mapped")
    loaded = Pipeline.load(tmp_path / "run/pipeline")
    assert str(loaded.memory.rows.dtype) == f"torch.{results['config']['data']['dtype']}"
    assert loaded.search(torch.randn(3, 8), k=2).rows.shape == (3, 2)
