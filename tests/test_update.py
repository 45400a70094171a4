"""The update command: what it writes answers as `Pipeline.updated` does, and what is wrong leaves nothing behind."""

import json
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import command
from nvf.embed import write_texts
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, OF_WORDS, Evidence
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker
from nvf.models.words import Words
from nvf.options import parse
from nvf.update import OPTIONS, update
from programs import Program

RNG = np.random.default_rng(0)
TEXTS = ["red fox", "green tree", "blue sea", "old house"]


def vectors(count: int) -> np.ndarray:
    return RNG.standard_normal((count, 8)).astype(np.float32)


def save(folder: Path, ids: Any = None, *, worded: bool = False) -> Pipeline:
    """A pipeline over 30 items with a log of 40 queries."""
    torch.manual_seed(0)
    memory = VectorMemory(torch.from_numpy(vectors(30)), ids=ids, distinct=True)
    attention = SoftAttention(memory, transform="linear", worded=worded)
    queries, targets = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1), torch.randint(30, (40, 1))
    evidence = Evidence.gather(memory, queries, targets, worded=worded)
    features = len((*FEATURES, *OF_WORDS)) if worded else len(FEATURES)
    pipeline = Pipeline(attention, EvidenceReranker(features, hidden=(8, 8)), k=4, evidence=evidence)
    if worded:
        memory.texts = [f"{TEXTS[number % 4]} {number}" for number in range(30)]
        pipeline.words = Words.gather(memory.texts, [f"where {number}" for number in range(40)], targets)
    pipeline.save(folder)
    return pipeline.requires_grad_(False).eval()


def run(place: Path, **given: Any) -> str:
    settings = {"pipeline": place / "pipeline", "output": place / "new", **given}
    return update(**parse([f"{name}={value}" for name, value in settings.items()], OPTIONS))


def answers(pipeline: Pipeline, texts: list[str] | None = None) -> list[np.ndarray]:
    queries = np.random.default_rng(1).standard_normal((20, 8))
    hits = pipeline.search(queries, 6, texts=None if texts is None else texts * 5)
    return [hits.rows if hits.ids is None else hits.ids, hits.probabilities]


def equal(mine: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(mine, theirs, strict=True))


def items(folder: Path, count: int, ids: list[Any] | None) -> np.ndarray:
    folder.mkdir()
    given = vectors(count)
    np.save(folder / "corpus.npy", given)
    if ids is not None:
        (folder / "ids.json").write_text(json.dumps(ids))
    return given


@pytest.mark.parametrize("ids", [None, [*range(100, 130)]], ids=["rows", "ids"])
def test_the_command_does_what_the_call_does(tmp_path: Path, ids: Any) -> None:
    pipeline = save(tmp_path / "pipeline", ids)
    new = None if ids is None else [7, 105]
    given = items(tmp_path / "add", 2, new)
    gone, targets = ([0, 29], [1, 28]) if ids is None else ([100, 129], [7, 101])
    (tmp_path / "remove.json").write_text(json.dumps(gone))
    (tmp_path / "log").mkdir()
    asked = vectors(2)
    np.save(tmp_path / "log" / "queries.npy", asked)
    np.save(tmp_path / "log" / "targets.npy", np.array(targets))
    said = run(tmp_path, add=tmp_path / "add", remove=tmp_path / "remove.json", log=tmp_path / "log")
    assert said.startswith(f"{30 if ids is None else 29} items, 30 before")
    expected = pipeline.updated(add=given, ids=new, remove=gone, log=(asked, targets))
    assert equal(answers(Pipeline.load(tmp_path / "new")), answers(expected))
    assert not equal(answers(expected), answers(pipeline))


@pytest.mark.skipif(find_spec("bm25s") is None, reason="needs bm25s")
def test_texts_come_from_the_folders(tmp_path: Path) -> None:
    pipeline = save(tmp_path / "pipeline", [*"abcdefghijklmnopqrstuvwxyzäöüß"], worded=True)
    given, asked = items(tmp_path / "add", 2, ["new", "a"]), vectors(1)
    write_texts(tmp_path / "add" / "texts.jsonl", ["white snow", "black coal"])
    run(tmp_path, add=tmp_path / "add")
    expected = pipeline.updated(add=given, ids=["new", "a"], texts=["white snow", "black coal"])
    for texts in (TEXTS, ["white", "snow", "black coal", "where 3"]):
        assert equal(answers(Pipeline.load(tmp_path / "new"), texts), answers(expected, texts))
    (tmp_path / "add" / "texts.jsonl").unlink()
    with pytest.raises(InputError, match="texts"):
        run(tmp_path, add=tmp_path / "add")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "log").mkdir()
    columns = {"vector": list(asked), "targets": [["a", "new"]], "text": ["who is it"]}
    pq.write_table(pa.table(columns), tmp_path / "log" / "queries.parquet")
    run(tmp_path, pipeline=tmp_path / "new", log=tmp_path / "log")
    expected = expected.updated(log=(asked, [["a", "new"]]), log_texts=["who is it"])
    asking = ["who is it", "who", "where", "snow"]
    assert equal(answers(Pipeline.load(tmp_path / "new"), asking), answers(expected, asking))


def test_the_pipelines_own_folder_is_replaced(tmp_path: Path) -> None:
    pipeline = save(tmp_path / "pipeline")
    (tmp_path / "remove.json").write_text("[]")
    done = command("pipeline=pipeline", "output=pipeline", "remove=remove.json", module="nvf.update", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert equal(answers(Pipeline.load(tmp_path / "pipeline")), answers(pipeline))
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", "remove.json"}


@pytest.mark.parametrize("moment", [".pipeline.old", "pipeline"])
def test_a_killed_update_leaves_a_pipeline_that_answers_and_can_be_updated(tmp_path: Path, moment: str) -> None:
    expected = answers(save(tmp_path / "pipeline"))
    (tmp_path / "remove.json").write_text("[]")
    words = ["pipeline=pipeline", "output=pipeline", "remove=remove.json"]
    killed = (signal.SIGKILL, moment, 1)  # as it puts the old folder aside, or the new one in its place
    with Program(*words, cwd=tmp_path, module="nvf.update", at=killed) as process:
        assert process.wait() == -signal.SIGKILL
    assert equal(answers(Pipeline.load(tmp_path / "pipeline")), expected)
    run(tmp_path, output=tmp_path / "pipeline", remove=tmp_path / "remove.json")
    assert equal(answers(Pipeline.load(tmp_path / "pipeline")), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", "remove.json"}


@pytest.mark.parametrize(
    ("name", "text"), [("remove", "[31]"), ("remove", "{}"), ("remove", "[1, 1]"), ("remove", json.dumps([*range(27)]))]
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path / "pipeline")
    (tmp_path / "remove.json").write_text(text)
    with pytest.raises(InputError, match=name) as caught:
        run(tmp_path, remove=tmp_path / "remove.json")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", "remove.json"}


def test_options_are_checked_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add="):
        run(tmp_path)
    (tmp_path / "new").write_text("a file")
    with pytest.raises(InputError, match="new"):  # before the pipeline, which is missing
        run(tmp_path, remove=tmp_path / "none.json")
    (tmp_path / "new").unlink()
    save(tmp_path / "pipeline")
    for option in ("add", "remove", "log"):
        with pytest.raises(InputError, match="none"):
            run(tmp_path, **{option: tmp_path / "none"})
    assert not (tmp_path / "new").exists()
