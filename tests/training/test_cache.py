"""Stage 1 is fitted once: the same settings find it again, others do not, and no way of dying leaves a trap."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SMALL, SMALL_STEPS, compose_config, without_time, write_folder
from nvf import InputError, Pipeline
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.training import cache
from nvf.training import select as selection
from nvf.training.build import Built, build
from nvf.training.checkpoints import save_weights
from programs import PATIENCE, SERVER

Run = Callable[..., dict[str, Any]]


def key(*overrides: str) -> str:
    return key_of(build(compose_config(*SMALL, *overrides)))


def key_of(built: Built) -> str:
    return cache.stage_key(built.config, built.source, [one.config["attention"] for one in built.variants])


def test_a_reused_stage_1_gives_the_same_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = f"cache={tmp_path / 'cache'}"
    alone = run(*SMALL, *SMALL_STEPS, "reranker.lr=1e-2", "cache=off", folder=tmp_path / "alone")
    first = run(*SMALL, *SMALL_STEPS, kept, folder=tmp_path / "first")
    monkeypatch.setattr(selection, "_fit_variants", None)  # it would be called
    second = run(*SMALL, *SMALL_STEPS, kept, "reranker.lr=1e-2", folder=tmp_path / "second")
    assert alone["attention_fitted_by"] is first["attention_fitted_by"] is None
    assert second["attention_fitted_by"]["folder"] == str(tmp_path / "first")
    assert without_time(second) == without_time(alone)
    ours, theirs = (Pipeline.load(tmp_path / name / "pipeline").state_dict() for name in ("alone", "second"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (tmp_path / "second/checkpoints/attention/best.safetensors").is_file()


def test_the_chosen_variant_is_reused_with_its_hubs_and_folds(run: Run, tmp_path: Path, folder: Path) -> None:
    words = ["data=embeddings", f"data.dir={folder}", "attention.epochs=2", "reranker.epochs=1", "reranker.folds=2"]
    first, second = (run(*words, f"cache={tmp_path / 'cache'}", folder=tmp_path / name) for name in ("first", "second"))
    assert second["attention_fitted_by"] is not None
    assert without_time(first) == without_time(second)


def test_the_key_is_of_all_that_stage_1_depends_on_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = key()
    same = ["reranker.lr=1e-2", "reranker.seed=3", "reranker=mlp", "k=3", "threads=1", "cache=elsewhere", "stage=joint"]
    same += ["save_every=1"]
    assert {key(word) for word in same} == {base}
    others = [
        "attention.lr=2e-2",
        "attention.seed=1",
        "data.seed=1",
        "queries.seed=1",
        "queries=noisy",
        "attention=linear",
    ]
    others += ["trainer.precision=bf16-mixed", "data.rows=41", "attention.epochs=3", "data.dtype=float16"]
    assert len({base, *(key(word) for word in others)}) == len(others) + 1
    monkeypatch.setattr(cache, "code_hash", lambda: "of other code")
    assert key() != base


def test_the_key_is_of_the_users_queries_not_of_their_folder(tmp_path: Path) -> None:
    for name in ("one", "copy", "other"):
        write_folder(tmp_path / name)
    queries = np.load(tmp_path / "other/queries.npy")
    np.save(tmp_path / "other/queries.npy", queries * np.linspace(1, 2, queries.shape[1]))
    keys = []
    for name in ("one", "copy", "other"):
        keys.append(key_of(build(compose_config("data=embeddings", f"data.dir={tmp_path / name}"))))
    one, copy, other = keys
    assert one == copy != other


def test_a_reused_stage_1_leaves_the_folds_that_are_asked_for(tmp_path: Path, folder: Path) -> None:
    words = ["data=embeddings", f"data.dir={folder}", "attention.epochs=1"]
    words += [f"cache={tmp_path / 'cache'}", "trainer.enable_progress_bar=false"]
    for folds in (3, 2):
        config = compose_config(*words, f"reranker.folds={folds}")
        chosen = selection.fit_attention(build(config), tmp_path / str(folds))
        assert chosen.folds == folds
    assert chosen.fitted_by is not None


def test_a_deterministic_run_does_not_reuse_what_two_threads_fitted(run: Run, tmp_path: Path) -> None:
    words = [*SMALL, *SMALL_STEPS, "stage=attention", f"cache={tmp_path / 'cache'}"]
    try:
        for number, own in enumerate(["threads=2", "deterministic=true", "threads=1", "deterministic=true"]):
            results = run(*words, own, folder=tmp_path / str(number))
            assert (results["attention_fitted_by"] is None) == (number < 3)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)


def test_how_often_a_fit_is_saved_changes_no_bits(run: Run, tmp_path: Path) -> None:
    often, never = (run(*SMALL, *SMALL_STEPS, f"save_every={n}", folder=tmp_path / str(n)) for n in (1, 1000))
    assert without_time(often) == without_time(never)
    weights = [(tmp_path / n / "pipeline/weights.safetensors").read_bytes() for n in ("1", "1000")]
    assert weights[0] == weights[1]


def test_a_damaged_entry_is_fitted_anew(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [*SMALL, *SMALL_STEPS, f"cache={tmp_path / 'cache'}"]
    run(*words, folder=tmp_path / "first")
    (weights,) = (tmp_path / "cache").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    assert run(*words, folder=tmp_path / "second")["attention_fitted_by"] is None
    assert "stage 1 is fitted anew" in caplog.text
    assert run(*words, folder=tmp_path / "third")["attention_fitted_by"] is not None


def test_a_cache_that_cannot_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache=.*/file cannot be written .*; give another, or cache=off"):
        run(*SMALL, *SMALL_STEPS, f"cache={tmp_path / 'file'}")


def hold(root: str, until: Any) -> None:
    """Hold the entry of a stage 1, as a job does that fits it."""
    with cache.opened({"cache": root, "trainer": {"devices": 1}}, "key") as entry:
        assert entry is not None
        entry.with_name(f".{entry.name}.partial").touch()  # as in the middle of writing
        until.set()
        time.sleep(PATIENCE)


def test_a_killed_job_leaves_neither_lock_nor_half_an_entry(tmp_path: Path) -> None:
    held = SERVER.Event()
    process = SERVER.Process(target=hold, args=(str(tmp_path / "cache"), held))
    process.start()
    assert held.wait(PATIENCE)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    attention = SoftAttention(VectorMemory.synthetic(rows=30, dim=8, seed=0))
    with cache.opened({"cache": tmp_path / "cache", "trainer": {"devices": 1}}, "key") as entry:
        assert entry is not None
        assert cache.read(entry, attention.memory) is None
        save_weights(attention, entry, stage="attention", notes={"a": 1})
        kept = cache.read(entry, attention.memory)
    assert kept is not None
    assert kept[1] == {"a": 1}
    assert not list((tmp_path / "cache").glob(".*"))
