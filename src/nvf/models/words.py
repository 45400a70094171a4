"""Words beside vectors: how well a query's words match the text of each row, and the queries that the row has answered.

Both are BM25 scores by `bm25s`, the extra `nvf[lexical]`, which is imported on first use.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.errors import InputError, refused
from nvf.files.npy import NpyFile
from nvf.files.records import read_record

CHANNELS = ("text", "log")  # what a query is matched with: a row's text, and the logged queries that the row answers
LISTED = 64  # rows that each channel lists for a query; all others count as rows without its words
K1, B = 0.9, 0.4  # how soon a repeated word, and the length of a text, cease to matter
GRAM, STEM = 4, 5  # letters of a part of a word, and of the beginning that stands for a word in a pair
TEXTS_AT_ONCE = 1024
SETTINGS, ANSWERS = "settings.json", "answers.npy"  # files beside the folders of the channels
HOW = {  # an index is made, and read, whatever its own file says
    **{"k1": K1, "b": B, "method": "lucene", "idf_method": "lucene", "delta": 0.5, "corpus": None},
    **{"dtype": "float32", "int_dtype": "int32", "backend": "numpy", "csc_backend": "numpy"},
}
REMEDY = "pip install -e '.[lexical]' in NVF's folder"


class WordScores(NamedTuple):
    """The rows that match the words of each of B queries best; every other row has scores of zero."""

    rows: Tensor  # (B, L) int64, different ones, padded with -1
    scores: Tensor  # (B, L, 2) at least zero, in the order of CHANNELS

    def of(self, rows: Tensor) -> Tensor:
        """Return the scores of some rows, (B, w) -> (B, w, 2)."""
        same = rows.unsqueeze(-1) == self.rows.unsqueeze(1)  # (B, w, L)
        return same.to(self.scores.dtype) @ self.scores


@dataclass(eq=False)
class Words:
    """An index of the words in the rows' texts, and one of the words in the logged queries."""

    indexes: dict[str, Any]  # of `bm25s`, by channel; a log that must not be used has none
    answers: Tensor  # rows that answer each logged query, (n, m) int64, padded with -1
    settings: dict[str, Any]  # `stemmer`, PyStemmer's language, and `stopwords`, bm25s's or a list; None for neither
    texts: dict[str, list[str]] | None = None  # what was indexed, by channel, if it is known

    @classmethod
    def gather(
        cls, texts: Sequence[str], logged: Sequence[str], answers: Tensor, *, stemmer: Any = None, stopwords: Any = None
    ) -> "Words":
        """Index the text of each row, and each logged query with the rows that answer it; no `logged` are no channel.

        No bm25s, no such stemmer or list of stop words, and no word in any row's text raise an InputError.
        """
        settings, indexes = {"stemmer": stemmer, "stopwords": stopwords}, {}
        for channel, some in zip(CHANNELS, (texts, logged), strict=True):
            if any(words := terms(some, **settings)):
                indexes[channel] = _bm25s().BM25(**HOW)
                indexes[channel].index(words, show_progress=False)
        if "text" not in indexes:
            raise InputError(f"none of the {len(texts)} texts has a word to search for; set data.words=null")
        return cls(indexes, answers, settings, dict(zip(CHANNELS, (list(texts), list(logged)), strict=True)))

    def scores(self, texts: Sequence[str], *, logged: bool = False, allowed: Tensor | None = None) -> WordScores:
        """Return what the words of some queries match, if need be among `allowed` rows, (n, N) bool, or (1, N) for all.

        If the texts are the `logged` queries, in their order, each is matched as if it had not been logged itself.
        """
        masks: Any = repeat(None) if allowed is None else allowed if len(allowed) > 1 else repeat(allowed[0])
        size = 1 if masks is allowed else TEXTS_AT_ONCE  # bm25s masks all texts of a call alike
        given = zip(range(0, len(texts), size), masks, strict=False)
        blocks = [self._block(texts[start : start + size], start if logged else None, mask) for start, mask in given]
        none = WordScores(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1, len(CHANNELS)))
        return WordScores(*(torch.cat(parts) for parts in zip(*(blocks or [none]), strict=True)))

    def _block(self, texts: Sequence[str], first: int | None, allowed: Tensor | None) -> WordScores:
        """Return what a block of texts matches, of which the first is the logged query of that number, if any."""
        asked, found, mask = terms(texts, **self.settings), [], None
        answers = self.answers if allowed is None else self.answers.where(allowed[self.answers], -1)
        for channel, index in self.indexes.items():
            count = min(LISTED + (channel == "log"), index.scores["num_docs"])
            if allowed is not None:
                mask = (allowed if channel == "text" else (answers >= 0).any(dim=-1)).float().numpy()
            listed_by = index.retrieve(asked, k=count, show_progress=False, weight_mask=mask)
            places, scores = map(torch.from_numpy, listed_by)
            places = places.long().where(scores > 0, -1)
            if channel == "log":
                if first is not None:
                    places = places.masked_fill(places == torch.arange(first, first + len(places)).unsqueeze(-1), -1)
                rows = answers[places].where((places >= 0).unsqueeze(-1), -1)  # (b, count, m)
                places, scores = rows.flatten(1), scores.unsqueeze(-1).expand(rows.shape).flatten(1)
            listed = _by_row(places, scores.unsqueeze(-1))
            best, order = listed.scores.squeeze(-1).topk(min(LISTED, listed.rows.shape[1]), dim=-1)
            both = best.unsqueeze(-1) * torch.eye(len(CHANNELS))[CHANNELS.index(channel)]
            found.append((listed.rows.gather(-1, order).where(best > 0, -1), both))
        rows, scores = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return _by_row(rows, scores)

    def matched(self, text: str, rows: Sequence[int]) -> list[list[str]]:
        """Return the words of a query that the text of each of some rows has, those that count most first.

        Words that more than half of all texts have are left out.
        """
        words = [*dict.fromkeys(re.findall(r"\w+", text.lower()))]
        term_of = {word: of[:1] for word, of in zip(words, terms(words, **self.settings), strict=True) if of}
        scores = {word: self.indexes["text"].get_scores(term) for word, term in term_of.items()}
        telling = {word: of for word, of in scores.items() if 2 * (of > 0).sum() <= len(of)}
        worth = [{word: float(of[row]) for word, of in telling.items() if of[row] > 0} for row in rows]
        return [sorted(of_row, key=of_row.__getitem__, reverse=True) for of_row in worth]

    def save(self, folder: Path) -> None:
        """Write the folder that `load` reads: bm25s's own files, which hold no pickle, the answers and the settings."""
        folder.mkdir()
        for channel, index in self.indexes.items():
            index.save(folder / channel, show_progress=False)
        np.save(folder / ANSWERS, self.answers.numpy(), allow_pickle=False)
        (folder / SETTINGS).write_text(json.dumps(self.settings))

    @classmethod
    def load(cls, folder: Path, rows: int) -> "Words | None":
        """Read a folder over so many rows; an InputError, a ValueError or what bm25s raises, if it is damaged.

        Without bm25s the result is None, with a warning: texts are then not searched.
        """
        if find_spec("bm25s") is None:
            logging.getLogger("nvf").warning("%s: searched without texts: words need bm25s: %s", folder, REMEDY)
            return None
        settings = read_record(folder / SETTINGS)
        answers = torch.from_numpy(NpyFile(folder / ANSWERS, "answers").read())
        terms([""], **settings)  # fails unless they are settings
        if answers.dtype != torch.int64 or answers.ndim != 2 or bool(((answers < -1) | (answers >= rows)).any()):
            raise ValueError("the answers to logged queries do not fit the memory")
        sizes = {"text": rows, "log": len(answers)}
        found = [channel for channel in CHANNELS if channel == "text" or (folder / channel).is_dir()]
        return cls({channel: _read(folder / channel, sizes[channel]) for channel in found}, answers, settings)


def _read(folder: Path, size: int) -> Any:
    """Return an index over so many texts; an error, see `Words.load`, unless every query can be answered from it."""
    for path in folder.glob("*.npy"):
        NpyFile(path, "an index of words")  # which is as large as it claims
    index = _bm25s().BM25.load(folder, show_progress=False, **HOW)
    vocabulary, scores = index.vocab_dict, index.scores
    data, places, starts = (scores[name] for name in ("data", "indices", "indptr"))
    count = len(starts) - 1
    if (
        type(scores["num_docs"]) is not int
        or scores["num_docs"] != size
        or {part.ndim for part in (data, places, starts)} != {1}
        or (data.dtype, places.dtype.kind, starts.dtype.kind) != (np.float32, "i", "i")
        or not len(data) == len(places) == starts[-1] > starts[0] == 0
        or (np.diff(starts) < 0).any()
        or not 0 <= places.min() <= places.max() < size
        or not 0 <= data.min() <= data.max() < np.inf
        or sorted(vocabulary.values()) != [*range(count + 1)]  # the last of which is no word
        or vocabulary[""] != count
    ):
        raise ValueError(f"{folder.name} is no index of {size} texts")
    return index


def terms(texts: Sequence[str], *, stemmer: Any = None, stopwords: Any = None) -> list[list[str]]:
    """Return the terms of each text: its words, their parts of GRAM letters, and pairs of words' first STEM letters.

    Parts of words, whose ends have the mark #, do in every language what a stemmer does in one, and find words
    where there are no spaces between them. Pairs of neighbouring words tell a phrase from its words.
    """
    remedy = "null needs none; a language needs pip install PyStemmer"
    with refused(f"data.words.stemmer={stemmer} cannot be used", remedy, ImportError, KeyError, AttributeError):
        stem = None if stemmer is None else import_module("Stemmer").Stemmer(stemmer)
    how = {"token_pattern": r"(?u)\w+", "stemmer": stem, "return_ids": False, "show_progress": False}
    with refused(f"data.words.stopwords={stopwords} cannot be used", "null keeps all words", ValueError, TypeError):
        found: list[list[str]] = _bm25s().tokenize(list(texts), stopwords=stopwords or [], **how)
    for words in found:
        marked, short = [f"#{word}#" for word in words], [word[:STEM] for word in words]
        words += [f"~{word[at : at + GRAM]}" for word in marked for at in range(max(1, len(word) - GRAM + 1))]
        words += [f"{one} {other}" for one, other in pairwise(short)]
    return found


def _by_row(rows: Tensor, scores: Tensor) -> WordScores:
    """Put the entries of a row together, with the best score of each channel; rows (b, t), scores (b, t, c)."""
    rows, order = rows.sort(dim=-1, descending=True)  # the padding, -1, comes last
    scores = scores.gather(1, order.unsqueeze(-1).expand_as(scores)).masked_fill((rows < 0).unsqueeze(-1), 0)
    place = F.pad(rows.diff(dim=-1) != 0, (1, 0)).cumsum(dim=-1)  # of each entry's row
    best = torch.zeros_like(scores).scatter_reduce(1, place.unsqueeze(-1).expand_as(scores), scores, "amax")
    return WordScores(torch.full_like(rows, -1).scatter(1, place, rows), best)


def _bm25s() -> Any:
    with refused("words need bm25s, which cannot be imported", REMEDY, ImportError):
        bm25s = import_module("bm25s")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG, and would say what it does
    return bm25s
