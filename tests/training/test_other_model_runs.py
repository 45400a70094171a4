"""Runs whose queries are of another model than the rows, from end to end."""

import csv
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import compose_config, without_time
from nvf import InputError, Pipeline
from nvf.evaluation.report import remarks, table
from nvf.models.alignment import Alignment
from nvf.options import parse
from nvf.runs.comparison.table import compare
from nvf.runs.resume import begin
from nvf.search import OPTIONS, search
from nvf.training import cache
from nvf.training.build import build
from nvf.training.select import Chosen, cross_fit
from programs import Program

Run = Callable[..., dict[str, Any]]
SHORT = ["attention.epochs=2", "reranker.epochs=2", "reranker.folds=2", "trainer.enable_progress_bar=false", "k=5"]
TURN = np.random.default_rng(5).standard_normal((16, 24))


def write(folder: Path, *, with_pairs: bool = False, references: bool = True) -> Path:
    """60 items in 16 dimensions, 800 queries in 24, near their items as a new model sees them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    corpus, targets = rng.standard_normal((60, 16)), rng.integers(60, size=800)
    asked = corpus[targets] + 0.8 * rng.standard_normal((800, 16))
    files = {"corpus": corpus, "targets": targets, "queries": new(asked)}
    if references:
        files |= {"reference_old_queries": asked, "reference_new_corpus": new(corpus)}
    if with_pairs:
        texts = rng.standard_normal((300, 16))
        files |= {"pairs_old": texts, "pairs_new": new(texts)}
    for name, array in files.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def new(texts: np.ndarray) -> np.ndarray:
    """What the new model makes of what the old one sees."""
    return np.tanh(texts @ TURN / 4) + 0.3


def top1(results: dict[str, Any], split: str = "test") -> dict[str, float]:
    return {name: of["top1"]["value"] for name, of in results[split].items() if isinstance(of, dict) and "top1" in of}


def words_of(folder: Path, *more: str) -> list[str]:
    return ["data=embeddings", f"data.dir={folder}", *SHORT, *more]


def ask(pipeline: Path, queries: Path, output: Path) -> np.ndarray:
    search(**parse([f"pipeline={pipeline}", f"queries={queries}", f"output={output}", "device=cpu", "k=3"], OPTIONS))
    return np.array([json.loads(line)["ids"] for line in output.read_text().splitlines()])


@pytest.mark.parametrize("with_pairs", [False, True])
def test_a_run_aligns_and_says_what_it_reaches(run: Run, tmp_path: Path, with_pairs: bool) -> None:
    folder = write(tmp_path / "data", with_pairs=with_pairs)
    results = run(*words_of(folder, *([] if with_pairs else ["dashboards=default"])))
    figures, found = results["test"], top1(results)
    assert figures["exact"] is figures["oracle"] is results["against_exact"] is None
    assert set(results["against_aligned"]) == {"wins", "losses", "p"}
    assert set(results["aligned"]) == {"by", "shrinkage", "strength"}
    assert set(results["aligned"]["by"]) <= ({"pairs", "log"} if with_pairs else {"log"})
    assert set(found) == {"old", "anew", "aligned", "attention", "pipeline"}
    old, corpus, targets = (np.load(folder / f"{name}.npy") for name in ("reference_old_queries", "corpus", "targets"))
    everyone = float(
        ((old @ (corpus / np.linalg.norm(corpus, axis=1, keepdims=True)).T).argmax(axis=1) == targets).mean()
    )
    assert found["old"] == pytest.approx(everyone, abs=0.12)  # of 80 of these queries
    assert min(found["aligned"], found["attention"], found["pipeline"]) > 0.5
    assert 0.7 < figures["recovery"]["value"] <= 1.1
    val = top1(results, "val")
    assert val["aligned"] <= val["attention"] + 0.03
    if with_pairs:
        assert found["aligned"] > 0.9 * found["anew"] - 0.05
    printed = table(results, 80)
    for name in ("old model", "embedded anew", "aligned", "recovery", "rows are aligned", "against aligned search"):
        assert f"\n{name} " in printed.replace("\n    ", "\n"), name
    assert "exact search" not in printed
    assert set(figures["seen_rows"]) == {*found}
    assert figures["seen_rows"]["attention"]["queries"] > 0
    hits = ask(tmp_path / "run/pipeline", folder / "queries.npy", tmp_path / "answers.jsonl")
    assert hits.shape == (800, 3)
    assert float((hits[:, 0] == targets).mean()) > 0.5
    with pytest.raises(InputError, match="24"):
        ask(tmp_path / "run/pipeline", folder / "reference_old_queries.npy", tmp_path / "none.jsonl")
    assert (tmp_path / "run/curves/stage-1").is_dir()
    compared = compare([tmp_path / "run"])
    (line,) = csv.DictReader(io.StringIO(compared.csv()))
    assert {name for name, value in line.items() if not value} >= {"exact_value", "oracle_value"}
    assert compared.text()
    assert remarks(results) == remarks(json.loads(json.dumps(results)))


@pytest.mark.parametrize(
    "choices",
    [
        ["stage=joint", "joint.epochs=1", "attention=mlp", "attention.epochs=4", "reranker=residual"],
        ["reranker=mlp", "index=ivf", "index.nlist=4", "attention=identity"],
        ["stage=attention", "data.dtype=float16", "attention.keys=learned", "attention=linear"],
    ],
    ids=" ".join,
)
def test_every_model_may_be_behind_an_alignment(run: Run, tmp_path: Path, choices: list[str]) -> None:
    if "index=ivf" in choices:
        pytest.importorskip("faiss")
    folder = write(tmp_path / "data", references=False)
    results = run(*words_of(folder, *choices))
    found = top1(results)
    assert results["test"]["exact"] is results["test"]["old"] is results["test"]["anew"] is None
    assert "recovery" not in results["test"]
    assert found["attention"] > 0.4
    if (tmp_path / "run/pipeline").exists():
        pipeline = Pipeline.load(tmp_path / "run/pipeline")
        assert (pipeline.memory.dim, pipeline.memory.query_dim) == (16, 24)
        hits = pipeline.search(np.load(folder / "queries.npy"), 1)
        assert float((hits.rows[:, 0] == np.load(folder / "targets.npy")).mean()) > 0.4


def test_generated_queries_may_have_another_width(run: Run, tmp_path: Path) -> None:
    sizes = ["data.rows=60", "data.dim=8", "queries.val_samples=200", "queries.test_samples=300"]
    steps = [f"{stage}.{word}" for stage in ("attention", "reranker") for word in ("epochs=1", "steps_per_epoch=4")]
    results = run("queries=warped", "queries.dim=12", *sizes, *steps)
    found = top1(results)
    assert results["test"]["exact"] is None
    assert results["aligned"]["by"] == ["log"]
    assert found["aligned"] > found["oracle"] - 0.05  # of 65,536 queries, through a rotation
    assert Pipeline.load(tmp_path / "run/pipeline").attention.query_dim == 12


def test_sharded_memories_are_refused(tmp_path: Path) -> None:
    words = words_of(write(tmp_path / "data"), "trainer=sharded", "trainer.devices=2", "stage=attention")
    with pytest.raises(InputError, match="trainer=sharded"):
        build(compose_config(*words))


def test_a_stage_1_is_reused_and_stands_in_for_fitting(run: Run, tmp_path: Path) -> None:
    words = words_of(write(tmp_path / "data", with_pairs=True), f"cache={tmp_path / 'cache'}")
    first, second = (run(*words, folder=tmp_path / name) for name in ("first", "second"))
    assert second["attention_fitted_by"] is not None
    assert without_time(first) == without_time(second)
    checkpoint = tmp_path / "first/checkpoints/attention/best.safetensors"
    again = run(*words, f"attention_checkpoint={checkpoint}", folder=tmp_path / "again")
    assert again["aligned"] == first["aligned"]
    assert top1(again)["attention"] == top1(first)["attention"]


def test_what_a_run_rests_on_are_the_pairs_too(tmp_path: Path) -> None:
    folder, found = write(tmp_path / "data", with_pairs=True), []
    for change in (None, None, "pairs", "references", "none"):
        if change == "pairs":
            np.save(folder / "pairs_new.npy", -np.load(folder / "pairs_new.npy"))
        elif change == "references":
            (folder / "reference_new_corpus.npy").unlink()
        elif change == "none":
            (folder / "pairs_new.npy").unlink()
            (folder / "pairs_old.npy").unlink()
        built = build(compose_config(*words_of(folder)))
        settings = [one.config["attention"] for one in built.variants]
        found.append(
            (cache.stage_key(built.config, built.source, settings), cache.circumstances(built.source)["pairs"])
        )
    assert found[0] == found[1]
    assert found[2] == found[3]  # what is for the table alone changes nothing
    assert len({key for key, _ in found}) == len({pairs for _, pairs in found}) == 3


def test_parts_of_the_log_are_aligned_without_their_queries(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    built = build(compose_config(*words_of(folder, "stage=reranker")))
    assert built.aligned is not None
    train, how = built.source.splits["train"], built.aligned
    about = {"epochs": 0, "hub_share": 0.0, "key_strength": 0.0}
    chosen = Chosen(built.exact, built.variants[0], about, None, {}, folds=2)
    for fold in cross_fit(built, chosen, tmp_path):
        rest = torch.ones(len(train.queries), dtype=torch.bool)
        rest[fold.unseen] = False
        start = Alignment.whitening_of(train.queries[rest], built.source.memory.rows, how["shrinkage"])
        pairs = built.source.memory.rows[train.targets[rest, 0]], train.queries[rest]
        keys = built.source.memory.aligned_with(start.with_map(*start.fit([pairs], [how["strength"]]))).keys
        torch.testing.assert_close(fold.attention.memory.keys, keys)
        assert not torch.equal(keys, built.source.memory.keys)


def test_a_run_that_is_killed_goes_on(run: Run, tmp_path: Path) -> None:
    folder, at = write(tmp_path / "data", with_pairs=True), (signal.SIGKILL, "last.ckpt", 1)
    words = [*words_of(folder, "attention=linear"), "cache=off", "dashboards=none", "stage=attention", "save_every=1"]
    with Program(*words, "hydra.run.dir=killed", cwd=tmp_path, at=at) as program:
        assert program.wait() != 0
    with Program("resume=killed", cwd=tmp_path) as program:
        assert program.wait() == 0, program.stderr
    alone, resumed = run(*words), json.loads((tmp_path / "killed/results.json").read_text())
    assert resumed["test"] == alone["test"]
    assert resumed["aligned"] == alone["aligned"]


def test_changed_pairs_are_changed_data(tmp_path: Path) -> None:
    record = {"config": {}, "memory": "", "queries": {}}
    begin(tmp_path, {**record, "pairs": "some"}, goes_on=False).release()
    for other in ("others", None):
        with pytest.raises(InputError, match="the pairs changed"):
            begin(tmp_path, {**record, "pairs": other}, goes_on=True)
    begin(tmp_path, {**record, "pairs": "some"}, goes_on=True).release()
