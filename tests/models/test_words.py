"""Words against a BM25 of a few lines; the log left out of itself; what is saved is what is read, or refused."""

import json
import logging
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nvf.errors import InputError
from nvf.models import words as module
from nvf.models.words import K1, LISTED, B, Words, WordScores, terms

pytest.importorskip("bm25s")
FRUIT = ["apple", "banana", "cherry", "date", "elder", "fig", "grape", "hazel", "iris", "juniper", "kiwi", "lemon"]


def some_texts(count: int, seed: int, length: int = 5) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(FRUIT, k=drawn.randint(1, length))) for _ in range(count)]


def bm25(query: str, texts: list[str]) -> list[float]:
    """The score of each text, as the books have it."""
    documents = terms(texts)
    average = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(texts)
    for term in terms([query])[0]:
        holding = sum(term in document for document in documents)
        for place, document in enumerate(documents):
            count, length = document.count(term), len(document) / average
            rarity = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            scores[place] += rarity * count / (count + K1 * (1 - B + B * length))
    return scores


def by_loop(query: str, texts: list[str], logged: list[str], answers: torch.Tensor, left_out: int = -1) -> torch.Tensor:
    """Both scores of every row, (N, 2)."""
    found = torch.zeros(len(texts), 2)
    found[:, 0] = torch.tensor(bm25(query, texts))
    for place, score in enumerate(bm25(query, logged) if logged else []):
        for row in answers[place].tolist():
            if row >= 0 and place != left_out:
                found[row, 1] = max(float(found[row, 1]), score)
    return found


def dense(words: WordScores, rows: int) -> torch.Tensor:
    """The scores of all rows, (B, N, 2), of which each is listed once."""
    for listed in words.rows.tolist():
        listed = [row for row in listed if row >= 0]
        assert len(set(listed)) == len(listed)
    assert (words.scores >= 0).all()
    assert (words.scores[words.rows < 0] == 0).all()
    every = torch.zeros(len(words.rows), rows + 1, 2)  # the padding counts for the last
    every.scatter_add_(1, (words.rows % (rows + 1)).unsqueeze(-1).expand_as(words.scores), words.scores)
    return every[:, :rows]


def gathered() -> tuple[Words, list[str], list[str], torch.Tensor]:
    """40 rows, 30 logged queries with one or two answers each."""
    texts, logged = some_texts(40, 0), some_texts(30, 1)
    answers = torch.randint(40, (30, 2), generator=torch.Generator().manual_seed(0))
    answers[::3, 1] = -1
    return Words.gather(texts, logged, answers), texts, logged, answers


def test_terms_are_words_parts_and_pairs() -> None:
    assert terms(["Big Äpfel, 7!"]) == [
        ["big", "äpfel", "7", "~#big", "~big#", "~#äpf", "~äpfe", "~pfel", "~fel#", "~#7#", "big äpfel", "äpfel 7"]
    ]
    assert terms(["", "?!", "die rote Lampen"], stopwords=["die"])[:2] == [[], []]
    assert "die" not in terms(["die rote"], stopwords=["die"])[0]
    assert "lamp" in terms(["Lampen"], stemmer="german")[0]
    assert terms(["the sun"], stopwords="en")[0][0] == "sun"
    assert terms(["太陽系"])[0] == ["太陽系", "~#太陽系", "~太陽系#"]


@pytest.mark.parametrize("query", [*some_texts(4, 2), "fig fig fig", "grapes", "xyzzy fig"])
def test_scores_are_those_of_a_plain_bm25(query: str) -> None:
    words, texts, logged, answers = gathered()
    torch.testing.assert_close(dense(words.scores([query]), 40)[0], by_loop(query, texts, logged, answers))


@pytest.mark.parametrize("query", ["", "  ?!", "xyzzy", "é"])
def test_what_no_row_has_matches_nothing(query: str) -> None:
    words = gathered()[0]
    found = words.scores([query, "fig"])
    assert (found.rows[0] == -1).all()
    assert (found.scores[0] == 0).all()
    assert found.scores[1].any()
    assert (words.scores([]).of(torch.empty(0, 3, dtype=torch.int64))).shape == (0, 3, 2)


def test_a_logged_query_does_not_match_itself() -> None:
    words, texts, logged, answers = gathered()
    found = dense(words.scores(logged, logged=True), 40)
    for place, query in enumerate(logged):
        torch.testing.assert_close(found[place], by_loop(query, texts, logged, answers, left_out=place))
    assert not torch.equal(found, dense(words.scores(logged), 40))


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    words, _, logged, _ = gathered()
    expected = [dense(words.scores(logged, logged=logs), 40) for logs in (False, True)]
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 7)
    assert [torch.equal(dense(words.scores(logged, logged=logs), 40), expected[logs]) for logs in (0, 1)] == [True] * 2


def test_the_best_rows_of_each_channel_are_listed() -> None:
    texts, logged = some_texts(300, 3), some_texts(250, 4)
    answers = torch.arange(250).unsqueeze(-1)
    words = Words.gather(texts, logged, answers)
    asked = some_texts(20, 5)
    found = dense(words.scores(asked), 300)
    for place, query in enumerate(asked):
        expected = by_loop(query, texts, logged, answers)
        for channel in range(2):
            best = found[place, :, channel].topk(LISTED).values
            torch.testing.assert_close(best, expected[:, channel].topk(LISTED).values)
        listed = found[place] > 0
        torch.testing.assert_close(found[place][listed], expected[listed])
    others = dense(words.scores(logged[:1], logged=True), 300)[0, :, 1].topk(LISTED).values
    torch.testing.assert_close(others, by_loop(logged[0], texts, logged, answers, 0)[:, 1].topk(LISTED).values)


def test_a_log_without_words_is_no_channel_and_rows_without_words_are_refused() -> None:
    texts, answers = some_texts(5, 0), torch.zeros(2, 1, dtype=torch.int64)
    for logged in ([], ["", "!"]):
        words = Words.gather(texts, logged, answers)
        assert not words.scores(["fig"]).scores[..., 1].any()
    with pytest.raises(InputError, match=r"none of the 2 texts has a word to search for; set data\.words=null"):
        Words.gather(["", "..."], ["fig"], answers[:1])


def test_scores_of_rows_are_looked_up() -> None:
    words = WordScores(torch.tensor([[7, 2, -1]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]]))
    assert words.of(torch.tensor([[2, 5, 7, -1]])).tolist() == [[[3, 4], [0, 0], [1, 2], [0, 0]]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stemmer": "klingon"}, "data.words.stemmer=klingon cannot be used"),
        ({"stemmer": 5}, "data.words.stemmer=5 cannot be used"),
        ({"stopwords": "klingon"}, "data.words.stopwords=klingon.*; null keeps all words"),
        ({"stopwords": 5}, "data.words.stopwords=5.*; null keeps all words"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Words.gather(["fig"], [], torch.zeros(0, 1, dtype=torch.int64), **settings)


def test_it_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.DEBUG):
        words = gathered()[0]
        words.scores(["", "fig"])
        words.save(tmp_path / "words")
        Words.load(tmp_path / "words", 40)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_without_bm25s_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[lexical\]'"):
        gathered()


@pytest.mark.parametrize("logs", [True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, logs: bool) -> None:
    texts, logged = some_texts(40, 0), some_texts(30, 1) if logs else []
    answers = torch.arange(30).unsqueeze(-1)
    words = Words.gather(texts, logged, answers, stemmer="german", stopwords=["für", "date"])
    words.save(tmp_path / "words")
    loaded = Words.load(tmp_path / "words", 40)
    assert loaded.settings == words.settings
    for ours, theirs in zip(words.scores(some_texts(9, 8)), loaded.scores(some_texts(9, 8)), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"memory|texts"):
        Words.load(tmp_path / "words", 39)


def change_json(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**record, **values}))

    return change


def change_array(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, edit(np.load(folder / name)), allow_pickle=True)


def put(place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[place] = value
        return array

    return edit


VOCABULARY, PARAMS = "text/vocab.index.json", "text/params.index.json"
DATA, PLACES, STARTS = (f"text/{name}.csc.index.npy" for name in ("data", "indices", "indptr"))
FORGED: dict[str, Callable[[Path], None]] = {
    "word beyond the index": change_json(VOCABULARY, fig=10**6),
    "word before the index": change_json(VOCABULARY, fig=-1),
    "word of text": change_json(VOCABULARY, fig="0"),
    "one more word": change_json(VOCABULARY, xyzzy=0),
    "list of words": lambda folder: (folder / VOCABULARY).write_text("[1]"),
    "rows": change_json(PARAMS, num_docs=10**9),
    "rows of a float": change_json(PARAMS, num_docs=40.0),
    "unknown setting": change_json(PARAMS, os="system"),
    "not finite": change_array(DATA, put(0, np.inf)),
    "not a number": change_array(DATA, put(0, np.nan)),
    "negative": change_array(DATA, put(0, -1)),
    "other numbers": change_array(DATA, lambda array: array.astype(np.int64)),
    "short": change_array(DATA, lambda array: array[:-1]),
    "row beyond": change_array(PLACES, put(3, 40)),
    "row before": change_array(PLACES, put(3, -1)),
    "start beyond": change_array(STARTS, put(1, 10**6)),
    "end beyond": change_array(STARTS, put(-1, 10**6)),
    "matrix": change_array(STARTS, lambda array: array[None]),
    "answer beyond": change_array("answers.npy", put(0, 40)),
    "fewer answers": change_array("answers.npy", lambda array: array[:-1]),
    "flat answers": change_array("answers.npy", lambda array: array[:, 0]),
    "answers of text": change_array("answers.npy", lambda array: array.astype(str)),
    "pickled answers": change_array("answers.npy", lambda array: array.astype(object)),
    "settings": change_json("settings.json", stopwords=7),
    "unknown settings": change_json("settings.json", os="system"),
    "no index": lambda folder: shutil.rmtree(folder / "text"),
    "no vocabulary": lambda folder: (folder / VOCABULARY).unlink(),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_forged_files_are_refused(tmp_path: Path, forge: Callable[[Path], None]) -> None:
    gathered()[0].save(tmp_path / "words")
    forge(tmp_path / "words")
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, OSError, InputError)):
        Words.load(tmp_path / "words", 40)


def test_params_that_ask_for_other_scores_are_not_followed(tmp_path: Path) -> None:
    words = gathered()[0]
    words.save(tmp_path / "words")
    change_json(PARAMS, backend="numba", method="bm25+", dtype="object", k1="x", corpus=["a"] * 40)(tmp_path / "words")
    found = Words.load(tmp_path / "words", 40).scores(["fig grape"])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, words.scores(["fig grape"]), strict=True))
