"""Runs that are killed at random moments, and resumed, end on the same bits as those that nobody disturbed."""

import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from conftest import write_folder
from programs import Program, wait_for

SMALL = ["data.rows=300", "data.dim=16", "queries.val_samples=500", "queries.test_samples=500"]
FULL = os.environ.get("NVF_ATTACK") == "full"
STEPS = {"attention": 150, "reranker": 60, "joint": 40} if FULL else {"attention": 20, "reranker": 15, "joint": 15}
EPOCHS = 6 if FULL else 3
LONG = [
    word for stage, steps in STEPS.items() for word in (f"{stage}.epochs={EPOCHS}", f"{stage}.steps_per_epoch={steps}")
]
WORDS = ["threads=1", "trainer.enable_progress_bar=false", "dashboards=none", "cache=off", "save_every=7"]
RECORDED = ["data=embeddings", "attention.lr=1e-2", "attention.epochs=20", "attention.patience=2"]
STAGES = {
    "attention": ["stage=attention", *SMALL, *LONG],
    "reranker": [*SMALL, *LONG],
    "joint": ["stage=joint", *SMALL, *LONG],
    "folds": RECORDED,
    "hard negatives": ["stage=attention", *SMALL, *LONG, "attention.sample=64", "attention.hard=4"],
}
SHARE = ("joint",)  # what `make test` kills runs in
MARKS = {"folds": "fitting attention without part 1", "hard negatives": "fitting attention"}


def reached(mark: str, process: Program) -> bool:
    """Wait until a process has printed the mark; false if it ended before."""
    wait_for(lambda: mark in process.stdout or process.ended())
    return not process.ended()


def bits(run: Path) -> dict[str, Any]:
    """Everything that a run has found: weights, figures, answers and curves."""
    results = json.loads((run / "results.json").read_text())
    for words in ("seconds", "versions"):
        del results[words]
    results["index"] = None if results["index"] is None else {**results["index"], "build_seconds": None}
    weights = {}
    for path in sorted(run.glob("checkpoints/**/best.ckpt")):
        state = torch.load(path, weights_only=True)["state_dict"]
        weights[str(path.relative_to(run))] = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
    saved = {path.name: path.read_bytes() for path in run.glob("pipeline/*")}
    curves = {
        str(folder.relative_to(run)): sorted({*scalars(folder)})
        for folder in {path.parent for path in run.rglob("events.out.tfevents.*")} - {run}
    }
    return {"results": results, "weights": weights, "pipeline": saved, "curves": curves, "answered": answers(run)}


def answers(run: Path) -> bytes:
    return (run / "answered.npy").read_bytes()


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    yield value.tag, event.step, value.tensor.float_val[0]


def write_turned_folder(folder: Path) -> None:
    """Queries in another space than the corpus, so that stage 1 has something to learn."""
    write_folder(folder, rows=200, queries=4000, dim=16)
    turn = np.eye(16) + 0.25 * np.random.default_rng(1).standard_normal((16, 16))
    np.save(folder / "queries.npy", np.load(folder / "queries.npy") @ turn)


def undisturbed(words: list[str], cwd: Path, mark: str) -> tuple[dict[str, Any], float]:
    """What the run finds, and the seconds from the mark to its end."""
    with Program(*words, "hydra.run.dir=whole", cwd=cwd) as process:
        assert reached(mark, process), process.stderr
        begun = time.monotonic()
        assert process.wait() == 0, process.stderr
    return bits(cwd / "whole"), time.monotonic() - begun


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_on_the_same_bits(stage: str, tmp_path: Path, attempts: Callable[[int, int], int]) -> None:
    if stage not in SHARE and attempts(1, 2) == 1:
        pytest.skip("make attack kills runs in every stage")
    words, mark = [*STAGES[stage], *WORDS], MARKS.get(stage, f"fitting {stage}")
    if stage == "folds":
        write_turned_folder(tmp_path / "folder")
        words.append(f"data.dir={tmp_path / 'folder'}")
    expected, seconds = undisturbed(words, tmp_path, mark)
    rng = random.Random(stage)
    kills, wanted = 0, attempts(2, 20)
    for chain in itertools.count():
        if kills >= wanted:
            return
        run = f"run{chain}"
        for link in itertools.count():
            with Program(*([f"resume={run}"] if link else [*words, f"hydra.run.dir={run}"]), cwd=tmp_path) as process:
                if reached("going on" if link else mark, process) and kills < wanted and link < 4:
                    with contextlib.suppress(TimeoutError):
                        process.wait(rng.uniform(0, seconds))
                    process.kill()
                status = process.wait()
                assert status in (0, -signal.SIGKILL), process.stdout + process.stderr
            if status == 0:
                break
            kills += 1
        found = bits(tmp_path / run)
        for what, values in expected.items():
            assert found[what] == values, what
