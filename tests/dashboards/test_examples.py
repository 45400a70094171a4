"""The examples of a run, held against its evaluation, query by query."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SMALL, SMALL_STEPS, write_folder
from nvf.dashboards.examples import CANDIDATES, LONGEST, examples_of, exemplary
from nvf.data.queries import QueryBatch, Recorded
from nvf.evaluation.evaluate import BINS, Evaluation, Outcomes, evaluate
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.words import Words

EXTRA = "the extra [lexical]"


def test_queries_won_come_first_then_those_lost_then_those_without_an_answer() -> None:
    before, after = torch.tensor([1, 2, 1, 2, 3, 1, 2, 1, 2, 1]), torch.tensor([1, 1, 2, 2, 1, 1, 1, 1, 1, 1])
    none = torch.zeros(10, 1, dtype=torch.long)
    seen = Outcomes(none, none, {"exact": after, "attention": before, "pipeline": after}, {}, {}, {}, {})
    assert exemplary(seen, 6).tolist() == [1, 4, 2, 3, 0, 5]  # one was lost, and others fill the places left
    assert exemplary(seen, 100).tolist() == [1, 4, 6, 8, 2, 3, 0, 5, 7, 9]
    assert exemplary(seen, 1).tolist() == [1]
    del seen.ranks["pipeline"]
    assert exemplary(seen, 2).tolist() == [2, 1]  # stage 1 alone, against exact search


@pytest.fixture
def recorded(memory: VectorMemory, batch: QueryBatch) -> Recorded:
    """Queries with texts and ids; one in three has a second target."""
    memory.ids = np.array([f"item {row}" for row in range(30)], dtype=object)
    texts = [f"text number{row} of all{' x' * LONGEST}" for row in range(30)]
    asked = [f"where is Number{row}, the text of all" for row in batch.targets[:, 0].tolist()]
    return Recorded(memory, {"val": batch}, texts=texts, asked={"val": asked})


def found_by(pipeline: Pipeline, recorded: Recorded) -> Evaluation:
    return evaluate(pipeline, recorded.splits["val"], k=4, oracle=None)


def test_every_query_has_its_texts_ranks_and_candidates(decisive: Pipeline, recorded: Recorded) -> None:
    pytest.importorskip("bm25s", reason=EXTRA)
    found, batch = found_by(decisive, recorded), recorded.splits["val"]
    assert recorded.texts is not None
    assert recorded.asked is not None
    recorded.words = Words.gather(recorded.texts, [], torch.empty(0, 1, dtype=torch.long))
    examples = json.loads(json.dumps(examples_of(found, recorded, count=200), allow_nan=False))
    assert examples["compared"] == ["pipeline", "attention"]
    assert len(examples["queries"]) == 120
    first, both = decisive.ranked(batch.queries, batch.targets, 30)
    verdicts = [query["verdict"] for query in examples["queries"]]
    assert {*verdicts} == {"won", "lost", "same"}
    assert verdicts.count("won") - verdicts.count("lost") == int((both.ranks == 1).sum() - (first.ranks == 1).sum())
    for query in examples["queries"]:
        number, targets = query["query"], batch.targets[query["query"]].tolist()
        assert query["text"] == recorded.asked["val"][number]
        assert query["ranks"].keys() == {"exact", "attention", "pipeline"}
        assert (
            query["ranks"]["pipeline"] == min(both.rows[number].tolist().index(row) for row in targets if row >= 0) + 1
        )
        assert {one["row"] for one in query["candidates"]} == {*first.rows[number, :4].tolist()}
        for one in query["candidates"]:
            for method, top in (("attention", first), ("pipeline", both)):
                place = top.rows[number].tolist().index(one["row"])
                probable = float(top.scores[number].softmax(dim=-1)[place])
                assert one["probabilities"][method] == pytest.approx(probable, rel=1e-4)
            assert one["id"] == f"item {one['row']}"
            assert one["right"] == (one["row"] in targets)
            assert one["text"].startswith(f"text number{one['row']} of")
            assert len(one["text"]) == LONGEST
            assert one["words"] == [f"number{one['row']}"] * (one["row"] == targets[0])  # others are in every text
        last = [one["probabilities"]["pipeline"] for one in query["candidates"]]
        assert last == sorted(last, reverse=True)


def test_the_right_ones_are_among_few_of_many_candidates(decisive: Pipeline, recorded: Recorded) -> None:
    decisive.k = 25
    found = found_by(decisive, recorded)
    for query in examples_of(found, recorded, count=120)["queries"]:
        assert len(query["candidates"]) == CANDIDATES
        right = {one["row"] for one in query["candidates"] if one["right"]}
        candidates = {*found.outcomes.candidates[query["query"]].tolist()}
        assert right == candidates & {*recorded.splits["val"].targets[query["query"]].tolist()}


def test_reliability_counts_each_query_in_its_bin(decisive: Pipeline, recorded: Recorded) -> None:
    found = found_by(decisive, recorded)
    for method, bins in examples_of(found, recorded, count=1)["reliability"].items():
        confidences, right = found.outcomes.confidences[method].numpy(), found.outcomes.share_right(method).numpy()
        assert bins["error"] == found.figures["calibration_error"][method]["value"]
        assert sum(bins["queries"]) == 120
        for number in range(BINS):
            inside = (confidences >= number / BINS) & (confidences < (number + 1) / BINS)
            assert bins["queries"][number] == inside.sum()
            for name, values in (("confidence", confidences), ("share_right", right)):
                mean = values[inside].mean() if inside.any() else None
                assert bins[name][number] == pytest.approx(mean)


def test_a_run_leaves_its_examples_whatever_is_drawn(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(*SMALL, *SMALL_STEPS, "dashboards=none", "dashboards.queries=5")
    examples = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert len(examples["queries"]) == 5
    for query in examples["queries"]:
        assert query["text"] is None
        assert all(one["text"] is one["id"] is None and one["words"] == [] for one in query["candidates"])


def test_texts_of_queries_are_of_those_that_validate(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason=EXTRA)
    write_folder(folder := tmp_path / "embeddings")
    for name, count in (("texts", 50), ("queries_texts", 400)):
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    words = ("data=embeddings", f"data.dir={folder}", "data.plan.chosen_by=20", "stage=attention")
    run(*words, "attention=linear", "attention.epochs=1", "dashboards.queries=40")
    queries = json.loads((tmp_path / "run" / "examples.json").read_text())["queries"]
    assert len(queries) == 20
    targets = np.load(folder / "targets.npy")
    for query in queries:
        number = int(query["text"].split()[1])
        for one in query["candidates"]:
            assert one["text"] == f"texts {one['row']}"
            assert one["right"] == (targets[number] == one["row"])
