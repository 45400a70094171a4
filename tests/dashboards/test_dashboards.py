"""What TensorBoard will show, read back from real event files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from conftest import SMALL, SMALL_STEPS
from nvf.dashboards import figures
from nvf.dashboards.examples import examples_of
from nvf.dashboards.show import SWITCHES, check_dashboards, show
from nvf.data.queries import QueryBatch, Recorded
from nvf.errors import InputError
from nvf.evaluation.evaluate import evaluate
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.runs.curves import CHART
from nvf.train import CONF


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture
def finished(run: Callable[..., dict[str, Any]], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    return run(*SMALL, *SMALL_STEPS, "attention=residual", "trainer.log_every_n_steps=1"), tmp_path / "run"


def test_each_stage_goes_on_where_the_one_before_it_ended(finished: tuple[dict[str, Any], Path]) -> None:
    _, folder = finished
    for line, first in (("stage-1", 0), ("pipeline", 6)):
        shown = events(folder / "curves" / line)
        train = {f"train/{name}" for name in ("loss", "top1", "lr", "temperature")}
        train |= {f"gradients/{part}" for part in ("query", "transform" if line == "stage-1" else "reranker")}
        val = {f"val/{name}" for name in ("loss", "top5", "coverage", "ndcg10")}
        tags = shown.Tags()["scalars"]
        assert train | val | {CHART} <= set(tags)
        assert "epoch" not in tags
        assert min(tags) == CHART  # TensorBoard sorts so, too
        assert [event.step - first for event in shown.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
        assert [event.step - first for event in shown.Scalars(CHART)] == [0, 2, 5]  # the untrained start, two epochs


def test_the_first_chart_has_both_stages_and_their_ceilings(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    off = [f"dashboards.{switch}=false" for switch in SWITCHES[1:]]
    words = [*SMALL, *SMALL_STEPS, "dashboards=default", *off, f"cache={tmp_path / 'cache'}"]
    for name, fits in (("run", True), ("again", False)):
        results = run(*words, folder=tmp_path / name)["val"]
        folder, last = tmp_path / name / "curves", 12 if fits else 6
        levels = {line: results[line]["top1"]["value"] for line in ("exact", "oracle")}
        levels["coverage"] = results["coverage"]["value"]
        if not fits:  # stage 1 is the cache's
            levels["stage-1"] = results["attention"]["top1"]["value"]
        assert {path.name for path in folder.iterdir()} == {*levels, "stage-1", "pipeline"}
        assert events(folder / "pipeline").Scalars(CHART)[-1].step == last - 1
        for line, level in levels.items():
            points = [(event.step, event.value) for event in events(folder / line).Scalars(CHART)]
            assert points == [(step, pytest.approx(level)) for step in range(last + 1)]


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


CONFIGURED: Any = OmegaConf.to_container(OmegaConf.load(CONF / "dashboards" / "default.yaml"))
SHOWN = {**CONFIGURED, "queries": 2}  # drawing takes its time


def shown_events(
    model: SoftAttention | Pipeline, batch: QueryBatch, settings: dict[str, Any], folder: Path, **options: Any
) -> EventAccumulator:
    """What is written of a model, without an oracle."""
    found = evaluate(model, batch, k=4, oracle=None)
    source = Recorded(model.memory, {"val": batch}, texts=options.get("texts"))
    show(model, batch, found, examples_of(found, source, count=settings["queries"]), settings, folder, **options)
    return events(folder)


def test_show_writes_every_figure(decisive: Pipeline, batch: QueryBatch, tmp_path: Path) -> None:
    texts = ["$a\t\u6f22\n" * 30] * 30
    shown = shown_events(decisive, batch, CONFIGURED, tmp_path, texts=texts)
    assert shown.Tags()["images"] == ["figures/1_won", "figures/2_lost", "figures/3_others", "figures/4_reliability"]
    for tag in shown.Tags()["images"]:
        steps = [image.step for image in shown.Images(tag)]
        assert steps == [*range(len(steps))] != []
        for image in shown.Images(tag):
            assert min(image.width, image.height) >= 400
            assert 1.5 < image.width / image.height < 2.5  # as the cards that show it


def test_stage_one_alone_is_shown_too(memory: VectorMemory, batch: QueryBatch, tmp_path: Path) -> None:
    shown = shown_events(SoftAttention(memory), batch, SHOWN, tmp_path)
    assert "figures/4_reliability" in shown.Tags()["images"]
    assert {path.name for path in (tmp_path / "curves").iterdir()} == {"exact", "coverage", "stage-1"}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_turns_its_own_item_off(decisive: Pipeline, batch: QueryBatch, tmp_path: Path, switch: str) -> None:
    shown = shown_events(decisive, batch, {**SHOWN, switch: False}, tmp_path)
    images = {tag.split("_")[1] for tag in shown.Tags()["images"]}
    assert ("won" in images) == (switch != "candidates")
    assert ("reliability" in images) == (switch != "reliability")
    assert (tmp_path / "curves").exists() == (switch != "levels")
    assert (tmp_path / "projector_config.pbtxt").exists() == (switch != "projector")


def test_nothing_is_written_where_all_is_off(pipeline: Pipeline, batch: QueryBatch, tmp_path: Path) -> None:
    found = evaluate(pipeline, batch, k=4, oracle=None)
    show(pipeline, batch, found, {}, {**SHOWN, **dict.fromkeys(SWITCHES, False)}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reliability": "yes"}, "dashboards.reliability=yes is neither true nor false; false leaves it out"),
        ({"reliability": 1}, "dashboards.reliability=1 is neither true nor false"),
        ({"queries": 0}, "dashboards.queries=0 is not a whole number of at least 1 and below 41; 1 to 40"),
        ({"queries": True}, "dashboards.queries=True is not a whole number"),
        ({"projector_points": 3}, "dashboards.projector_points=3 is not a whole number of at least 4"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(settings: dict[str, Any], says: str) -> None:
    check_dashboards(CONFIGURED)
    with pytest.raises(InputError, match=re.escape(says)):
        check_dashboards({**SHOWN, **settings})


def test_texts_are_shortened_to_one_line() -> None:
    assert figures.shortened("a\n b\t c") == "a b c"
    assert figures.shortened("x" * 50, 10) == "x" * 9 + "\u2026"


@pytest.mark.parametrize("limit", [4, 40, 4000])
def test_the_projector_has_a_name_for_every_point(
    pipeline: Pipeline, batch: QueryBatch, tmp_path: Path, limit: int
) -> None:
    texts = [f"text\t{row}" for row in range(30)]
    shown_events(pipeline, batch, {**SHOWN, "projector_points": limit}, tmp_path, texts=texts)
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    vectors = np.loadtxt(tmp_path / embedding.tensor_path, delimiter="\t")
    lines = [line.split("\t") for line in (tmp_path / embedding.metadata_path).read_text().splitlines()]
    assert lines[0] == ["kind", "row", "text"]
    assert len(vectors) == len(lines) - 1 <= limit
    assert len({line[0] for line in lines[1:]}) == 3
    known = {"row": pipeline.memory.rows, "query": batch.queries}
    known["transformed query"] = pipeline.attention.moved(batch.queries).detach()
    for vector, (kind, row, text) in zip(vectors, lines[1:], strict=True):
        assert text == f"text {row}"
        near = (known[kind] - torch.tensor(vector)).abs().amax(dim=-1)
        assert near.min() < 1e-6
        assert int(row) == near.argmin() if kind == "row" else int(row) in batch.targets[near.argmin()]
    if limit == 40:  # the rows shown are the queries' targets first
        rows = {line[1] for line in lines[1:] if line[0] == "row"}
        assert {line[1] for line in lines[1:] if line[0] == "query"} <= rows


def test_a_picture_that_cannot_be_drawn_costs_no_run(
    run: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "00000").touch()  # where the projector's folder should be
    assert run(*SMALL, *SMALL_STEPS, "dashboards.projector=true")["test"]["pipeline"] is not None
    assert "could be drawn" in caplog.text
    assert "00000" in caplog.text
