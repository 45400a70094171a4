"""The comparison that is run on request: every row is there, and baselines equal loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapters
import baselines
from nvf.errors import InputError
from nvf.evaluation import wilson
from nvf.queries import QueryBatch, Recorded

FEW_EPOCHS = ["attention.epochs=1", "reranker.epochs=1", "reranker.folds=2", "k=5"]
NAMES = [
    "exact search",
    "query-bank normalisation",
    "linear adapter, triplet loss",
    "linear adapter, full softmax",
    "documents moved to their queries",
    "linear adapter + learned keys",
    "the same + query-bank normalisation",
    "linear adapter + residual reranker",
    "NVF, stage 1",
    "NVF, pipeline",
]


@pytest.fixture
def source(folder: Path) -> Recorded:
    return adapters.read(folder, seed=0)


@pytest.fixture
def problem(source: Recorded) -> baselines.Problem:
    return baselines.Problem(source.memory.rows, source.splits["train"], source.splits["val"], seed=0)


def loop_ranks(keys: np.ndarray, batch: QueryBatch) -> list[int]:
    ranks = []
    for query, (target,) in zip(batch.queries.numpy(), batch.targets.tolist(), strict=True):
        order = np.argsort([-float(query @ key) for key in keys], kind="stable").tolist()
        ranks.append(1 + order.index(target))
    return ranks


def test_the_command_prints_every_method(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: Recorded
) -> None:
    monkeypatch.setattr(baselines, "EPOCHS", 2)
    output = tmp_path / "table.md"
    adapters.main([f"data.dir={folder}", "seed=0", f"output={output}", *FEW_EPOCHS])
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    heading, _, titles, rule, *lines, _, verdict = output.read_text().splitlines()
    assert "50 rows; 320 train, 40 val, 40 test queries; seed 0" in heading
    assert [line.split("|")[1].strip() for line in lines] == NAMES
    assert {len(line) for line in (titles, rule, *lines)} == {len(titles)}
    right = sum(rank == 1 for rank in loop_ranks(source.memory.rows.numpy(), source.splits["test"]))
    interval = "{value:.1f} ({low:.1f}-{high:.1f})".format(**{n: 100 * v for n, v in wilson(right, 40).items()})
    assert lines[0].split("|")[2].strip() == interval
    assert verdict.startswith("NVF is not significantly below exact search")
    assert "the linear adapter, full softmax by" in verdict


def test_exact_search_and_moved_documents_equal_loops(problem: baselines.Problem) -> None:
    exact = baselines.exact_search(problem)
    rows, train = problem.rows.numpy(), problem.train
    assert baselines.ranks(exact.score, problem.val).tolist() == loop_ranks(rows, problem.val)

    found = {}
    for weight in baselines.WEIGHTS:
        keys = []
        for row, vector in enumerate(rows):
            own = [q for q, (t,) in zip(train.queries.numpy(), train.targets.tolist(), strict=True) if t == row]
            key = (1 - weight) * vector + weight * np.mean(own, axis=0) if own else vector
            keys.append(key / np.linalg.norm(key))
        ranks = loop_ranks(np.array(keys), problem.val)
        found[weight] = (np.mean([r == 1 for r in ranks]), np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    moved = baselines.moved_documents(problem)
    assert moved.val == pytest.approx(max(found.values()))
    assert moved.chosen == f"weight {max(found, key=lambda weight: found[weight]):g}"


def test_query_bank_normalisation_equals_its_formula(problem: baselines.Problem) -> None:
    method = baselines.bank_normalised(problem, baselines.exact_search(problem))
    _, beta, _, share = method.chosen.replace(",", "").split()
    bank = (float(beta) * problem.rows @ problem.train.queries.T).exp().mean(dim=-1).log() / float(beta)
    expected = problem.val.queries @ problem.rows.T - float(share) * bank
    torch.testing.assert_close(method.score(problem.val.queries), expected)


def test_no_baseline_validates_worse_than_exact_search(
    problem: baselines.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "EPOCHS", 1)
    (_, exact), *others = baselines.baselines(problem)
    for name, method in others:
        assert method.val >= exact.val, name
        assert method.val == pytest.approx(baselines.figures(method.score, problem.val)), name


def test_a_part_of_a_folder(source: Recorded, tmp_path: Path) -> None:
    adapters.subsample(source, tmp_path, 0, subsample_rows=30, subsample_train=100)
    part = adapters.read(tmp_path, seed=0)
    assert (len(part.memory), len(part.splits["train"].queries)) == (30, 100)
    for name, split in part.splits.items():
        whole = source.splits[name]
        for query, (target,) in zip(split.queries, split.targets, strict=True):
            before = int(whole.targets[(whole.queries - query).abs().sum(dim=-1).argmin(), 0])
            torch.testing.assert_close(part.memory.rows[target], F.normalize(source.memory.rows[before], dim=-1))
    kept = (source.memory.rows @ part.memory.rows.T).amax(dim=-1) > 1 - 1e-5
    assert int(kept.sum()) == 30
    assert len(part.splits["test"].queries) == int(kept[source.splits["test"].targets].sum())


def test_more_than_there_is(source: Recorded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"subsample_rows=51 is not in 1\.\.50"):
        adapters.subsample(source, tmp_path, 0, subsample_rows=51)
    with pytest.raises(InputError, match=r"data\.dir is not set"):
        adapters.main(["seed=0"])
