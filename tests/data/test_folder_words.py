"""Texts beside vectors: a line a vector, each follows its vector, and what is wrong is named with file and line."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvf.data.folder import read_memory, read_recorded, texts_of_rows
from nvf.data.queries import Recorded
from nvf.data.splits import SPLITS
from nvf.errors import InputError
from nvf.models.memory import VectorMemory, unit

PLAIN = {"stemmer": None, "stopwords": None}


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def worded(folder: Path) -> Path:
    """The folder with texts: row 7's holds `item7`, and query 3's `ask3` and the item that answers it."""
    write_texts(folder / "texts.jsonl", [f"item{row}" for row in range(50)])
    targets = np.load(folder / "targets.npy")
    write_texts(folder / "queries_texts.jsonl", [f"ask{place} item{row}" for place, row in enumerate(targets)])
    return folder


def read(folder: Path, **given: Any) -> Recorded:
    return read_recorded(folder, read_memory(folder), **{"seed": 0, "words": PLAIN, **given})


def first_rows(recorded: Recorded, split: str) -> list[int]:
    """The row that matches each query's words best in the texts."""
    words = recorded.splits[split].words
    assert words is not None
    return words.rows.gather(1, words.scores[..., 0].argmax(dim=-1, keepdim=True)).squeeze(-1).tolist()


def follow(recorded: Recorded) -> None:
    """Each query's words are its own: they name its target."""
    for split in SPLITS:
        assert first_rows(recorded, split) == recorded.splits[split].targets[:, 0].tolist()


def test_texts_follow_their_queries_into_splits(worded: Path) -> None:
    pytest.importorskip("bm25s")
    follow(read(worded))
    np.save(worded / "times.npy", np.random.default_rng(0).permutation(400))
    by_time = read(worded)
    follow(by_time)
    assert [len(by_time.splits[split].queries) for split in SPLITS] == [320, 40, 40]


def test_texts_follow_where_queries_and_rows_are_merged(worded: Path) -> None:
    pytest.importorskip("bm25s")
    corpus = np.load(worded / "corpus.npy")
    np.save(worded / "corpus.npy", np.concatenate([corpus[:1], corpus]))  # rows 0 and 1 are one
    targets = np.load(worded / "targets.npy") + 1
    queries, texts = np.load(worded / "queries.npy"), [f"item{row}" for row in targets]
    np.save(worded / "queries.npy", np.concatenate([queries[::-1][:30], queries]))  # whose second lines have no words
    np.save(worded / "targets.npy", np.concatenate([targets[::-1][:30], targets]))
    write_texts(worded / "texts.jsonl", ["other", *(f"item{row}" for row in range(1, 51))])
    write_texts(worded / "queries_texts.jsonl", [*texts[::-1][:30], *texts[:-30], *["nothing"] * 30])
    recorded = read(worded)
    assert recorded.merged == 30
    assert recorded.texts is not None
    assert recorded.texts[:3] == ["other\nitem1", "item2", "item3"]
    follow(recorded)


def test_splits_of_the_user_have_texts_of_their_own(worded: Path) -> None:
    pytest.importorskip("bm25s")
    queries, targets = np.load(worded / "queries.npy"), np.load(worded / "targets.npy")
    for split, places in zip(SPLITS, np.split(np.random.default_rng(0).permutation(400), [300, 350]), strict=True):
        np.save(worded / f"{split}_queries.npy", queries[places])
        np.save(worded / f"{split}_targets.npy", targets[places])
        write_texts(worded / f"{split}_texts.jsonl", [f"item{targets[place]}" for place in places])
    for name in ("queries.npy", "targets.npy", "queries_texts.jsonl"):
        (worded / name).unlink()
    follow(read(worded))


def test_a_training_query_does_not_answer_itself(worded: Path) -> None:
    pytest.importorskip("bm25s")
    targets = np.arange(400) % 50
    np.save(worded / "targets.npy", targets)
    write_texts(worded / "queries_texts.jsonl", [f"only{place}" for place in range(400)])
    write_texts(worded / "texts.jsonl", [f"item{row}" for row in range(50)])
    recorded = read(worded)
    train = recorded.splits["train"]
    assert train.words is not None
    itself = train.words.of(train.targets)[..., 1]
    asked = [f"only{place}" for place in range(400)]
    known = recorded.words.scores(asked).scores[..., 1].amax(dim=-1)  # type: ignore[union-attr]
    assert float(itself.mean()) < 0.5 * float(known.mean())


@pytest.mark.parametrize("law", ["rates of their own", "answered once"])
def test_a_log_that_misleads_is_no_channel(worded: Path, law: str) -> None:
    pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    np.save(worded / "corpus.npy", rng.standard_normal((330, 8)))
    write_texts(worded / "texts.jsonl", [f"item{row}" for row in range(330)])
    if law == "answered once":
        targets = rng.permutation(330)
    else:
        targets = rng.choice(330, size=330, p=rng.dirichlet(np.ones(330)))
    queries = rng.standard_normal((330, 8))
    np.save(worded / "queries.npy", queries)
    np.save(worded / "targets.npy", targets)
    write_texts(worded / "queries_texts.jsonl", [f"ask item{row}" for row in targets])
    recorded = read(worded)
    assert recorded.words is not None
    assert [*recorded.words.indexes] == (["text"] if law == "answered once" else ["text", "log"])
    follow(recorded)


@pytest.mark.parametrize("left_out", ["texts.jsonl", "queries_texts.jsonl", "setting"])
def test_without_all_texts_there_are_no_words(worded: Path, left_out: str) -> None:
    if left_out != "setting":
        (worded / left_out).unlink()
    recorded = read(worded, words=None if left_out == "setting" else PLAIN)
    assert recorded.words is None
    assert [recorded.splits[split].words for split in SPLITS] == [None] * 3


def test_without_bm25s_one_line_says_what_it_would_bring(
    worded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with caplog.at_level(logging.INFO, "nvf"):
        recorded = read(worded)
    assert recorded.words is None
    assert recorded.splits["train"].words is None
    (line,) = caplog.messages
    assert "pip install -e '.[lexical]'" in line


def second_line(text: str) -> Callable[[str], str]:
    return lambda before: "\n".join([before.splitlines()[0], text, *before.splitlines()[2:]]) + "\n"


BAD = [
    (second_line('{"text": "a"'), "after line 1: .*; write a JSON object a line"),
    (second_line('["a"]'), "after line 1: "),
    (second_line('{"txt": "a"}'), "line 2 has no 'text', but txt; add it"),
    (second_line('{"text": 7}'), "line 2: "),
    (second_line('{"text": null}'), "line 2: "),
    (second_line('{"text": "\\ud800"}'), "after line 1: .*surrogate"),
    (second_line(""), "49|399 texts for .* vectors"),
    (second_line("[" * 10**5), "after line 1: "),
    (lambda before: before.split("\n", 1)[1], "49|399 texts for .* vectors; give each its line"),
    (lambda before: before + '{"text": "a"}\n', "51|401 texts for .* vectors; give each its line"),
    (lambda before: "", "is empty"),
    (lambda before: "\n" + second_line("[]")(before), "after line 2: "),
]


@pytest.mark.parametrize("name", ["texts.jsonl", "queries_texts.jsonl"])
@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message + str(n) for n, (_, message) in enumerate(BAD)])
def test_bad_texts_are_named_with_file_and_line(
    worded: Path, name: str, spoil: Callable[[str], str], message: str
) -> None:
    (worded / name).write_text(spoil((worded / name).read_text()))
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        read(worded)


def test_texts_that_are_no_text_file_are_named(worded: Path) -> None:
    (worded / "texts.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"texts\.jsonl"):
        read(worded)
    (worded / "texts.jsonl").unlink()
    os.mkfifo(worded / "texts.jsonl")
    with pytest.raises(InputError, match=r"texts\.jsonl is missing, or no regular file"):
        read(worded)
    (worded / "texts.jsonl").unlink()
    (worded / "texts.jsonl").mkdir()
    with pytest.raises(InputError, match=r"texts\.jsonl"):
        read(worded)


def test_neither_a_byte_order_mark_nor_an_empty_line_is_a_text(worded: Path) -> None:
    path = worded / "texts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n \n")
    assert texts_of_rows(worded, read_memory(worded)) == [f"item{row}" for row in range(50)]


def test_rows_have_the_texts_of_their_vectors(tmp_path: Path) -> None:
    vectors = np.eye(4)[[2, 0, 2, 1, 0]]
    np.save(tmp_path / "corpus.npy", vectors)
    write_texts(tmp_path / "texts.jsonl", ["a", "b", "c", "d", "b"])
    memory = read_memory(tmp_path)
    found = texts_of_rows(tmp_path, memory)
    assert found is not None
    of = {tuple(row.tolist()): text for row, text in zip(memory.rows, found, strict=True)}
    assert of == {(0, 0, 1, 0): "a\nc", (1, 0, 0, 0): "b", (0, 1, 0, 0): "d"}
    assert texts_of_rows(tmp_path / "none", VectorMemory(unit(torch.eye(2)))) is None
