"""An updated pipeline against one that is put together from scratch over the new items and the new log."""

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.models.alignment import Alignment
from nvf.models.ann_index import build_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, OF_WORDS, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.words import Words

GIVEN, DIM, LOGGED = 40, 8, 60
WORDS = ["red", "green", "blue", "old", "new", "big", "small", "round", "flat", "warm", "cold", "fast", "slow", "soft"]
lexical = pytest.mark.skipif(find_spec("bm25s") is None, reason="needs bm25s")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 4)) for _ in range(count)]


class State:
    """What a pipeline is made from, by name of the item: vectors, texts, and a log of queries with names of items."""

    def __init__(self, *, named: bool, seed: int = 0, width: int | None = None) -> None:
        vectors = normal(GIVEN, DIM, seed=seed)
        vectors[[7, 21]] = vectors[3].clone()  # three items of one row
        vectors[30] = vectors[29].clone()
        names = [f"item {number}" for number in range(GIVEN)] if named else [*range(GIVEN)]
        self.named, self.vectors = named, dict(zip(names, vectors, strict=True))
        self.texts = dict(zip(names, sentences(GIVEN, seed), strict=True))
        self.width = width  # of the queries, where they are of another model than the rows
        self.queries = unit(normal(LOGGED, width or DIM, seed=seed + 1))
        self.log_texts = sentences(LOGGED, seed + 1)
        rng = np.random.default_rng(seed + 2)
        self.answers = [{names[place] for place in rng.choice(30, 1 + query % 2)} for query in range(LOGGED)]
        self.close()

    def close(self) -> None:
        """An answer is the row, and so all items of it."""
        for answers in self.answers:
            rows = {tuple(self.vectors[name].tolist()) for name in answers}
            answers |= {name for name, vector in self.vectors.items() if tuple(vector.tolist()) in rows}

    def memory(self) -> VectorMemory:
        ids = np.array([*self.vectors], dtype=object) if self.named else None
        memory = VectorMemory(torch.stack([*self.vectors.values()]), ids=ids, distinct=True)
        memory.texts = [*self.texts.values()]
        if self.width is None:
            return memory
        shapes = {
            "centre": (self.width,),
            "whitening": (self.width, self.width),
            "mean": (DIM,),
            "map": (DIM, self.width),
        }
        maps = {name: 0.3 * normal(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
        return memory.aligned_with(Alignment(**{**maps, "whitening": maps["whitening"] + torch.eye(self.width)}))

    def log(self, memory: VectorMemory) -> Tensor:
        """The targets, (n, m) rows padded with -1."""
        place = {name: number for number, name in enumerate(self.vectors)}
        rows = [
            sorted({int(memory.rows_of(torch.tensor([place[name]]))) for name in answers if name in place})
            for answers in self.answers
        ]
        width = max(1, *map(len, rows))
        return torch.tensor([[*some, *[-1] * (width - len(some))] for some in rows])

    def evidence(self, memory: VectorMemory, *, worded: bool) -> Evidence:
        return Evidence.gather(memory, self.queries, self.log(memory), worded=worded)

    def words(self, memory: VectorMemory) -> Words:
        return Words.gather(memory.texts_of_rows(), self.log_texts, self.log(memory))


def made(state: State, *, worded: bool = False, keys: str = "learned") -> Pipeline:
    """A pipeline over the state of which nothing is left at zero, with moved keys and hubs corrected."""
    torch.manual_seed(0)
    memory = state.memory()
    attention = SoftAttention(
        memory, transform="linear", keys=keys, biased=True, worded=worded, hubs=[0.5, 7.0], beta=9.0
    )
    features = len((*FEATURES, *OF_WORDS)) if worded else len(FEATURES)
    pipeline = Pipeline(
        attention,
        EvidenceReranker(features, hidden=(8, 8)),
        k=4,
        evidence=state.evidence(memory, worded=worded),
    )
    with torch.no_grad():
        for tensor in (*pipeline.parameters(), attention.bias):
            tensor += 0.1 * torch.randn(tensor.shape)
        if worded:
            attention.word_weights.copy_(torch.tensor([0.05, 0.02]))
            pipeline.words = state.words(memory)
    return pipeline.requires_grad_(False).eval()


def rebuilt(before: Pipeline, state: State, old: dict[Any, Any]) -> Pipeline:
    """A pipeline over the state with the weights of another; `old` maps items that stay to what they were called."""
    memory, worded = state.memory(), before.words is not None
    new = copy.deepcopy(before)
    attention = SoftAttention(memory, **before.attention.settings)
    attention.load_state_dict(
        {name: value for name, value in before.attention.state_dict().items() if name not in ("delta", "bias")},
        strict=False,
    )
    evidence = state.evidence(memory, worded=worded)
    was = {name: number for number, name in enumerate(before_names(before))}
    share, beta = before.attention.hubs
    bank = before.attention.moved(before.evidence.queries)
    for place, name in enumerate(state.vectors):
        row = int(memory.rows_of(torch.tensor([place])))
        if name in old:
            former = int(before.memory.rows_of(torch.tensor([was[old[name]]])))
            attention.bias[row] = before.attention.bias[former]
            attention.delta.data[row] = before.attention.delta[former]
        elif not any(
            torch.equal(memory.rows[row], before.memory.rows[int(before.memory.rows_of(torch.tensor([was[one]])))])
            for one in old.values()
        ):
            mean = sum(math.exp(beta * float(query @ memory.keys[row])) for query in bank) / len(bank)
            attention.bias[row] = -share * math.log(mean) / beta
    new.attention, new.evidence, new.words = attention, evidence, state.words(memory) if worded else None
    return new.requires_grad_(False).eval()


def before_names(pipeline: Pipeline) -> list[Any]:
    return [*range(pipeline.memory.given)] if pipeline.memory.ids is None else pipeline.memory.ids.tolist()


def same(mine: Pipeline, theirs: Pipeline, *, exactly: bool = False) -> None:
    """Both hold the same and answer the same."""
    near = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    assert torch.equal(mine.memory.rows, theirs.memory.rows)
    assert before_names(mine) == before_names(theirs)
    assert (mine.memory.row_of_vector is None) == (theirs.memory.row_of_vector is None)
    if mine.memory.row_of_vector is not None:
        assert torch.equal(mine.memory.row_of_vector, theirs.memory.row_of_vector)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(
            mine.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}", **near
        )
    if theirs.evidence is not None:
        torch.testing.assert_close(mine.evidence.similar, theirs.evidence.similar, **near)
    texts = None if theirs.words is None else sentences(50, 9)
    asked = normal(50, theirs.memory.query_dim, seed=8)
    assert torch.equal(mine.memory.keys, theirs.memory.keys)
    found, expected = (pipeline.search(asked, 12, texts=texts) for pipeline in (mine, theirs))
    torch.testing.assert_close(found.probabilities, expected.probabilities, **near)
    assert float((found.rows == expected.rows).double().mean()) > 0.99


@pytest.fixture(params=[False, pytest.param(True, marks=lexical)], ids=["vectors", "worded"])
def worded(request: pytest.FixtureRequest) -> bool:
    return request.param


def changed(state: State, pipeline: Pipeline, *, add: Tensor, names: list[Any], remove: list[Any], log: int) -> None:
    """Change the state and the pipeline alike; names that exist are replaced, and `log` queries are asked."""
    worded, old = pipeline.words is not None, dict(zip(state.vectors, state.vectors, strict=True))
    texts = sentences(len(add), 5)
    state.close()
    rows = {name: tuple(vector.tolist()) for name, vector in state.vectors.items()}
    groups = [[name for name in rows if rows[name] == row] for row in set(rows.values())]
    for name, vector, text in zip(names, add, texts, strict=True):
        if name in old and not torch.equal(unit(state.vectors[name]), unit(vector)):
            del old[name]
        state.vectors[name], state.texts[name] = vector, text
    for name in remove:
        del state.vectors[name], state.texts[name], old[name]
    for group in groups:  # the log stays with the row while an item has it, and else goes with the first item left
        left = [name for name in group if name in old] or [name for name in group if name in state.vectors][:1]
        for answers in state.answers:
            answers.difference_update(set(group) - set(left))
    queries, asked = normal(log, state.width or DIM, seed=6), sentences(log, 7)
    if log > 1:
        queries[1] = queries[0]
    new = [[name] for name in [*state.vectors][-log:]] if log else []
    state.queries = torch.cat([state.queries, unit(queries)])
    state.log_texts, state.answers = [*state.log_texts, *asked], [*state.answers, *map(set, new)]
    numbered = {name: place for place, name in enumerate(state.vectors)}
    expected = rebuilt(pipeline, state, old)
    mine = pipeline.updated(
        add=add,
        ids=names if state.named else None,
        texts=texts if worded else None,
        remove=remove,
        log=(queries, new if state.named else [[numbered[name] for name in some] for some in new]) if log else None,
        log_texts=asked if worded and log else None,
    )
    same(mine, expected)


CASES = {
    "added": ([*range(40, 45)], [], 0),
    "removed": ([], [0, 5, 39], 0),
    "one of equals": ([], [7], 0),
    "all of equals": ([], [3, 7, 21], 0),
    "replaced": ([2, 3, 40], [], 0),
    "replaced with its equal": ([29, 30], [], 0),
    "all": ([1, 29, 40, 41], [0, 21, 9], 6),
    "logged": ([], [], 5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("named", "width"), [(True, None), (False, None), (True, DIM), (True, 12), (False, 5)], ids=str
)
def test_an_update_is_what_is_put_together_from_scratch(
    case: str, named: bool, width: int | None, worded: bool
) -> None:
    state = State(named=named, width=width)
    add, remove, log = CASES[case]
    if not named:
        add = [number for number in add if number >= 40]
    name: Callable[[int], Any] = (lambda number: f"item {number}") if named else (lambda number: number)
    changed(
        state,
        made(state, worded=worded),
        add=normal(len(add), DIM, seed=3),
        names=[*map(name, add)],
        remove=[*map(name, remove)],
        log=log,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rows_stay_and_new_ones_join(dtype: str) -> None:
    state, add = State(named=False), normal(3, DIM, seed=3)
    memory = VectorMemory(torch.stack([*state.vectors.values()]), dtype=dtype, distinct=True)
    attention = SoftAttention(memory, transform="identity", biased=True, hubs=[0.5, 20.0])
    pipeline = Pipeline(
        attention, EvidenceReranker(len(FEATURES)), k=4, evidence=state.evidence(memory, worded=False)
    ).eval()
    expected = VectorMemory(torch.cat([*state.vectors.values(), *add]).view(-1, DIM), dtype=dtype, distinct=True)
    mine = pipeline.updated(add=add)
    assert torch.equal(mine.memory.rows, expected.rows)
    assert torch.equal(mine.memory.row_of_vector, expected.row_of_vector)
    theirs = state.evidence(expected, worded=False)
    torch.testing.assert_close(mine.evidence.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-3)


def test_nothing_to_do_changes_no_bit(worded: bool) -> None:
    pipeline = made(State(named=True), worded=worded)
    same(pipeline.updated(), pipeline, exactly=True)
    assert pipeline.updated().memory.fingerprint == pipeline.memory.fingerprint


def test_what_is_added_and_removed_again_leaves_no_trace(worded: bool) -> None:
    pipeline = made(State(named=True), worded=worded)
    add, new = normal(5, DIM, seed=3), [f"new {number}" for number in range(5)]
    add[0] = pipeline.memory.rows[3]
    more = pipeline.updated(add=add, ids=new, texts=sentences(5, 5) if worded else None)
    assert len(more.memory) > len(pipeline.memory)
    same(more.updated(remove=new[::-1]), pipeline)


def test_the_rows_that_stay_keep_every_bit_and_the_given_pipeline_is_untouched() -> None:
    pipeline = made(State(named=True))
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    new = pipeline.updated(add=normal(6, DIM, seed=3), ids=[f"item {n}" for n in range(35, 41)], remove=["item 0"])
    old = torch.arange(1, 32)  # rows; of the vectors, three others are equal to rows that come before
    assert torch.equal(new.attention.delta[:31], pipeline.attention.delta[old])
    assert torch.equal(new.attention.bias[:31], pipeline.attention.bias[old])
    assert not new.attention.delta[31:].any()
    assert torch.equal(new.memory.rows[:31], pipeline.memory.rows[old])
    for name, value in pipeline.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_update_of_a_saved_pipeline_is_that_of_the_pipeline(tmp_path: Path, worded: bool) -> None:
    pipeline = made(State(named=True), worded=worded)
    change: dict[str, Any] = {"add": normal(3, DIM, seed=3), "ids": ["a", "item 7", "b"], "remove": ["item 21"]}
    change |= {"log": (normal(2, DIM, seed=4), ["a", ["b", "item 3"]])}
    change |= {"texts": sentences(3, 5), "log_texts": sentences(2, 6)} if worded else {}
    expected = pipeline.updated(**change)
    pipeline.save(tmp_path / "before")
    mine = Pipeline.load(tmp_path / "before").updated(**change)
    same(mine, expected, exactly=True)
    mine.save(tmp_path / "before")
    same(Pipeline.load(tmp_path / "before"), expected, exactly=True)
    assert (mine.memory.texts is not None) == worded


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_index_follows_with_its_settings(kind: str) -> None:
    pytest.importorskip("faiss")
    pipeline = made(State(named=False))
    pipeline.index = build_index(pipeline.attention.keys(), kind, **({"nlist": 20} if kind == "ivf" else {"m": 8}))
    more, fewer = pipeline.updated(add=normal(5, DIM, seed=3)), pipeline.updated(remove=[*range(25)])
    assert pipeline.updated().index is pipeline.index
    for new, rows in ((more, 42), (fewer, 14)):
        assert new.index.kind == kind
        assert len(new.index) == len(new.memory) == rows
        new.index.check_fits(new.attention.keys())
        found = new.search(normal(9, DIM, seed=4), 4).rows
        new.index = None
        assert torch.equal(found, new.search(normal(9, DIM, seed=4), 4).rows)
    assert more.updated(remove=[0]).memory.given == 44


@pytest.mark.parametrize("keys", ["frozen", "learned"])
@pytest.mark.parametrize("distinct", [True, False])
def test_a_pipeline_without_log_ids_or_bias(keys: str, distinct: bool) -> None:
    vectors = normal(20, DIM, seed=0)
    vectors[5] = vectors[4].clone()
    torch.manual_seed(0)
    attention = SoftAttention(VectorMemory(vectors, distinct=distinct), transform="linear", keys=keys)
    pipeline = Pipeline(attention, Reranker(DIM, kind="residual", hidden=(8, 8)), k=4).eval()
    add = torch.cat([vectors[:1], normal(2, DIM, seed=3)])
    mine = pipeline.updated(add=add.numpy().astype(np.float64), remove=np.array([1, 4]))
    assert len(mine.memory) == (20 if distinct else 21)
    expected = VectorMemory(torch.cat([vectors[[0, 2, 3, *range(5, 20)]], add]), distinct=distinct)
    assert torch.equal(mine.memory.rows, expected.rows)
    hits = mine.search(vectors[6:8], 1)
    assert hits.rows.tolist() == [[4], [5]]
    assert mine.memory.fingerprint != pipeline.memory.fingerprint


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"add": torch.ones(1, 9), "ids": ["a"]}, "add"),
    "integers": ({"add": torch.ones(1, DIM).long(), "ids": ["a"]}, "add"),
    "one vector": ({"add": torch.ones(DIM), "ids": ["a"]}, "add"),
    "list": ({"add": [[1.0] * DIM], "ids": ["a"]}, "add"),
    "zero": ({"add": torch.zeros(1, DIM), "ids": ["some"]}, "some"),
    "not finite": ({"add": torch.full((1, DIM), math.nan), "ids": ["a"]}, "add"),
    "no ids": ({"add": torch.ones(1, DIM)}, "ids"),
    "too few ids": ({"add": torch.ones(2, DIM), "ids": ["a"]}, "ids"),
    "ids of another type": ({"add": torch.ones(1, DIM), "ids": [731]}, "731"),
    "an id twice": ({"add": torch.ones(2, DIM), "ids": ["twice", "twice"]}, "twice"),
    "added and removed": ({"add": torch.ones(1, DIM), "ids": ["item 4"], "remove": ["item 4"]}, "item 4"),
    "unknown": ({"remove": ["item 4", "nobody"]}, "nobody"),
    "removed twice": ({"remove": ["item 4", "item 4"]}, "item 4"),
    "number for a name": ({"remove": [4]}, "remove"),
    "too many": ({"remove": [f"item {number}" for number in range(2, 40)]}, "k=4"),
    "all": ({"remove": [f"item {number}" for number in range(40)]}, "remove"),
    "log": ({"log": (torch.ones(1, DIM), ["nobody"])}, "nobody"),
    "log of what is removed": ({"remove": ["item 4"], "log": (torch.ones(1, DIM), ["item 4"])}, "item 4"),
    "no target": ({"log": (torch.ones(2, DIM), ["item 4", []])}, "log"),
    "too few targets": ({"log": (torch.ones(2, DIM), ["item 4"])}, "log"),
    "width of queries": ({"log": (torch.ones(1, 9), ["item 4"])}, "queries"),
    "texts without words": ({"add": torch.ones(1, DIM), "ids": ["a"], "texts": ["red"]}, "texts"),
    "no answer left": ({"remove": [f"item {number}" for number in range(31)]}, "remove"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str) -> None:
    given, named = BAD[case]
    with pytest.raises(InputError, match=named) as caught:
        made(State(named=True)).updated(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("remove", [[40], [-1], ["item 4"], [True]])
def test_row_numbers_are_those_of_the_vectors(remove: list[Any]) -> None:
    with pytest.raises(InputError, match="remove"):
        made(State(named=False)).updated(remove=remove)


@pytest.mark.parametrize("targets", [[40], ["item 4"], [1.5], [-1]])
def test_targets_without_ids_are_row_numbers(targets: list[Any]) -> None:
    with pytest.raises(InputError, match="log"):
        made(State(named=False)).updated(log=(torch.ones(1, DIM), targets))


@lexical
@pytest.mark.parametrize("given", [{}, {"texts": []}, {"texts": ["red", "green"]}, {"texts": [None]}])
def test_items_of_a_pipeline_with_words_have_texts(given: dict[str, Any]) -> None:
    pipeline = made(State(named=True), worded=True)
    with pytest.raises(InputError, match="texts"):
        pipeline.updated(add=torch.ones(1, DIM), ids=["a"], **given)
    with pytest.raises(InputError, match="log_texts"):
        pipeline.updated(log=(torch.ones(1, DIM), ["item 4"]), log_texts=given.get("texts"))


@lexical
def test_words_whose_texts_were_not_kept_cannot_be_updated(tmp_path: Path) -> None:
    pipeline = made(State(named=True), worded=True)
    pipeline.memory.texts = None  # as in a folder of an older version
    pipeline.save(tmp_path / "old")
    with pytest.raises(InputError, match="train it again"):
        Pipeline.load(tmp_path / "old").updated(remove=["item 4"])


def test_a_log_needs_a_pipeline_that_keeps_one_and_so_do_new_rows_among_hubs() -> None:
    memory = VectorMemory(normal(20, DIM, seed=0))
    attention = SoftAttention(memory, biased=True, hubs=[0.5, 20.0])
    pipeline = Pipeline(attention, Reranker(DIM), k=4)
    with pytest.raises(InputError, match="log"):
        pipeline.updated(log=(torch.ones(1, DIM), [3]))
    with pytest.raises(InputError, match="hub_correction"):
        pipeline.updated(add=torch.ones(1, DIM))
    assert len(pipeline.updated(remove=[3]).memory) == 19
    old = made(State(named=False))
    old.attention.hubs = None  # as in a folder of an older version
    with pytest.raises(InputError, match="hub_correction"):
        old.updated(add=torch.ones(1, DIM))


def test_density_is_computed_anew_where_it_was_saved_without_neighbours() -> None:
    pipeline = made(State(named=False))
    known, pipeline.evidence.similar = pipeline.updated(add=normal(3, DIM, seed=3)), None
    same(pipeline.updated(add=normal(3, DIM, seed=3)), known)


def test_targets_may_be_given_as_numbers_lists_arrays_or_tensors() -> None:
    pipeline, asked = made(State(named=False)), normal(2, DIM, seed=4)
    expected = pipeline.updated(log=(asked, [[3, 5], [4]]))
    rows = torch.tensor([[3, 5], [4, -1]])
    for targets in (rows, rows.numpy(), [rows[0], rows[1].numpy()], [(3, 5), np.int64(4)]):
        same(pipeline.updated(log=(asked, targets)), expected, exactly=True)


@lexical
def test_words_remain_where_nothing_that_was_asked_for_does(tmp_path: Path) -> None:
    state = State(named=True)
    memory = state.memory()
    pipeline = Pipeline(SoftAttention(memory, transform="identity", worded=True), Reranker(DIM), k=4)
    pipeline.words = state.words(memory)
    pipeline.updated(remove=[f"item {number}" for number in range(31)]).save(tmp_path / "new")
    mine, left = Pipeline.load(tmp_path / "new"), [state.texts[f"item {number}"] for number in range(31, 40)]
    expected = Words.gather(left, [], torch.full((1, 1), -1)).scores(sentences(20, 9))
    every = torch.arange(9).expand(20, -1)
    assert torch.equal(mine.words.scores(sentences(20, 9)).of(every), expected.of(every))
