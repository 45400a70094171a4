"""BM25 of rows' and queries' texts, in full and by two ways of taking texts apart: the baselines that need words."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvf.data.beside import read_texts
from nvf.data.queries import Recorded
from nvf.data.splits import SPLITS
from nvf.files.npy import open_vectors
from nvf.files.vectors import row_hashes
from nvf.models.memory import unit
from nvf.models.words import K1, B, WordScores, terms

LISTED = 500  # rows that are scored for a query; all others match its words less
Tokens = list[list[str]]


def stemmed(texts: Sequence[str]) -> Tokens:
    """Take texts apart as for English search: words, stemmed by Snowball, without stop words."""
    import bm25s
    import Stemmer

    how: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "return_ids": False}
    return bm25s.tokenize(list(texts), **how, show_progress=False)


LEXICONS: dict[str, tuple[Callable[[Sequence[str]], Tokens], float, float]] = {
    "parts of words": (terms, K1, B),  # NVF's own
    "English stems": (stemmed, 1.5, 0.75),  # the defaults of bm25s
}


def scores(texts: Sequence[str], queries: Sequence[Sequence[str]], lexicon: str) -> list[WordScores]:
    """Score the rows' texts for several lists of queries: (B, L) rows, padded with -1, and (B, L, 1) scores each."""
    import bm25s

    apart, k1, b = LEXICONS[lexicon]
    index = bm25s.BM25(k1=k1, b=b)
    index.index(apart(texts), show_progress=False)
    found = []
    for some in queries:
        rows, best = map(torch.from_numpy, index.retrieve(apart(some), k=min(LISTED, len(texts)), show_progress=False))
        found.append(WordScores(rows.long().where(best > 0, -1), best.unsqueeze(-1)))
    return found


def dense(words: WordScores, rows: int) -> Tensor:
    """Spread scores over all rows, (B, N); what is not listed has zero."""
    everywhere = words.scores.new_zeros(len(words.rows), rows)
    return everywhere.scatter_add(-1, words.rows.clamp(min=0), words.scores.squeeze(-1))


def asked(folder: Path, source: Recorded) -> dict[str, list[str]] | None:
    """Find the text of each query of each split by its vector; None where a .npy folder or bm25s does not give any."""
    text_of: dict[bytes, str] = {}
    for stem in ("queries", *SPLITS):
        vectors = folder / ("queries.npy" if stem == "queries" else f"{stem}_queries.npy")
        if vectors.exists():
            given = unit(torch.from_numpy(open_vectors(vectors, "queries").read()))
            for key, text in zip(row_hashes(given), read_texts(folder, stem, len(given)) or (), strict=False):
                text_of.setdefault(key.tobytes(), text)
    if source.texts is None or not text_of or find_spec("bm25s") is None:
        return None
    return {
        name: [text_of[key.tobytes()] for key in row_hashes(split.queries)] for name, split in source.splits.items()
    }
