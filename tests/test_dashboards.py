"""What TensorBoard will show, read back from real event files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from conftest import SMALL, SMALL_STEPS


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


@pytest.fixture
def finished(run: Callable[..., dict[str, Any]], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    return run(*SMALL, *SMALL_STEPS, "attention=residual", "trainer.log_every_n_steps=1"), tmp_path / "run"


def test_each_stage_has_its_curves(finished: tuple[dict[str, Any], Path]) -> None:
    _, folder = finished
    for stage in ("attention", "reranker"):
        shown = events(folder / stage)
        train = {f"train/{name}" for name in ("loss", "top1", "lr", "temperature")}
        train |= {f"gradients/{part}" for part in ("query", "transform" if stage == "attention" else "reranker")}
        val = {f"val/{name}" for name in ("loss", "top1", "top5", "coverage")}
        assert train | val <= set(shown.Tags()["scalars"])
        assert [event.step for event in shown.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
        assert [event.step for event in shown.Scalars("val/top1")] == [0, 2, 5]  # the untrained start, two epochs


def test_hparams_hold_the_settings_and_the_test_figures(finished: tuple[dict[str, Any], Path]) -> None:
    results, folder = finished
    shown = events(folder)
    for method in ("exact", "oracle", "attention", "pipeline"):
        for metric, figure in results["test"][method].items():
            (event,) = shown.Scalars(f"hp/{method}/{metric}")
            assert event.value == pytest.approx(figure["value"], abs=1e-6)
    (event,) = shown.Scalars("hp/pipeline/calibration_error")
    assert event.value == pytest.approx(results["test"]["calibration_error"]["pipeline"]["value"], abs=1e-6)
    content = shown.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    settings = {name: value.ListFields()[0][1] for name, value in session.hparams.items() if value.ListFields()}
    assert settings["attention.transform"] == "residual"
    assert settings["data.rows"] == 40
    assert settings["reranker.lr"] == pytest.approx(3e-3)
