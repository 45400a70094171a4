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
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from conftest import SMALL, SMALL_STEPS
from nvf.dashboards import figures
from nvf.dashboards.show import SWITCHES, check_dashboards, show
from nvf.data.queries import QueryBatch
from nvf.errors import InputError
from nvf.evaluation.evaluate import evaluate
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.train import CONF


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


@pytest.fixture
def batch(memory: VectorMemory) -> QueryBatch:
    """Queries near their first targets; one in three has a second one."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.stack([torch.randperm(30, generator=generator)[:2] for _ in range(120)])
    queries = memory.rows[targets[:, 0]] + 0.35 * torch.randn(120, 8, generator=generator)
    targets[torch.arange(120) % 3 > 0, 1] = -1
    return QueryBatch(unit(queries), targets)


CONFIGURED: Any = OmegaConf.to_container(OmegaConf.load(CONF / "dashboards" / "default.yaml"))
SHOWN = {**CONFIGURED, "queries": 2}  # drawing takes its time
FIGURES = {
    "candidates": "figures/1_candidates",
    "reliability": "figures/2_reliability",
}


def shown_events(
    model: SoftAttention | Pipeline, batch: QueryBatch, settings: dict[str, Any], folder: Path, **options: Any
) -> EventAccumulator:
    """What is written of a model, without an oracle."""
    show(model, batch, evaluate(model, batch, k=4, oracle=None), settings, folder, **options)
    return events(folder)


def test_show_writes_a_page_of_scalars_and_every_figure(pipeline: Pipeline, batch: QueryBatch, tmp_path: Path) -> None:
    found = evaluate(pipeline, batch, k=4, oracle=pipeline.memory.rows.flip(0))
    texts = ["$a\t\u6f22\n" * 30] * 30
    show(pipeline, batch, found, CONFIGURED, tmp_path, steps=70, texts=texts)
    shown = events(tmp_path)
    assert shown.Tags()["images"] == list(FIGURES.values())
    for tag in FIGURES.values():
        (image,) = shown.Images(tag)
        assert min(image.width, image.height) > 400
    for metric in ("top1", "top5"):
        levels = {name: found.figures[name][metric]["value"] for name in ("exact", "oracle")}
        for name, level in {**levels, "coverage": found.figures["coverage"]["value"]}.items():
            points = [(event.step, event.value) for event in shown.Scalars(f"{metric}/{name}")]
            assert points == [(0, pytest.approx(level)), (70, pytest.approx(level))]


def charts(folder: Path) -> dict[str, list[str]]:
    """The patterns of tags that each chart of the custom page shows."""
    written = events(folder).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(written)
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def test_the_custom_page_shows_the_curves_of_both_stages_and_their_ceilings(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    off = [f"dashboards.{switch}=false" for switch in SWITCHES[1:]]
    run(*SMALL, *SMALL_STEPS, "trainer.log_every_n_steps=1", "dashboards=default", *off)
    folder = tmp_path / "run"
    logged = {
        f"{place}: {tag}"
        for place in (".", "attention", "reranker")
        for tag in events(folder / place).Tags()["scalars"]
    }
    drawn = {
        title: {tag for tag in logged if any(re.match(pattern, tag.split(": ")[1]) for pattern in patterns)}
        for title, patterns in charts(folder).items()
    }
    for title, metric in (("Top-1", "top1"), ("Top-5", "top5")):
        curves = {f"{stage}: val/{metric}" for stage in ("attention", "reranker")}
        assert drawn[title] == curves | {f".: {metric}/{name}" for name in ("exact", "oracle", "coverage")}
    assert events(folder).Scalars("top1/exact")[-1].step == 6  # as long as the stages


def test_stage_one_alone_is_shown_too(memory: VectorMemory, batch: QueryBatch, tmp_path: Path) -> None:
    shown = shown_events(SoftAttention(memory), batch, SHOWN, tmp_path)
    assert shown.Tags()["images"] == list(FIGURES.values())
    assert {"top1/exact", "top1/coverage"} <= set(shown.Tags()["scalars"])
    assert "top1/oracle" not in shown.Tags()["scalars"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_turns_its_own_item_off(pipeline: Pipeline, batch: QueryBatch, tmp_path: Path, switch: str) -> None:
    shown = shown_events(pipeline, batch, {**SHOWN, switch: False}, tmp_path)
    assert set(shown.Tags()["images"]) == {tag for name, tag in FIGURES.items() if name != switch}
    assert ("custom_scalars__config__" in shown.Tags()["tensors"]) == (switch != "scalars_page")
    assert ("top1/exact" in shown.Tags()["scalars"]) == (switch != "scalars_page")
    assert (tmp_path / "projector_config.pbtxt").exists() == (switch != "projector")


def test_nothing_is_written_where_all_is_off(pipeline: Pipeline, batch: QueryBatch, tmp_path: Path) -> None:
    found = evaluate(pipeline, batch, k=4, oracle=None)
    show(pipeline, batch, found, {**SHOWN, **dict.fromkeys(SWITCHES, False)}, tmp_path)
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
    assert lines[0] == ["kind", "row", "text", "query"]
    assert len(vectors) == len(lines) - 1 <= limit
    assert len({line[0] for line in lines[1:]}) == 3
    for vector, (kind, row, text, query) in zip(vectors, lines[1:], strict=True):
        assert text == f"text {row}"
        if kind == "row":
            expected = pipeline.memory.rows[int(row)]
        else:
            assert int(row) == batch.targets[int(query), 0]
            expected = batch.queries[int(query)]
            expected = pipeline.attention.moved(expected) if kind == "transformed query" else expected
        assert vector == pytest.approx(expected.detach().numpy(), abs=1e-6)
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
