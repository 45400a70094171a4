"""`python -m nvf.search`: answer a file of query vectors with a pipeline that a run saved."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from nvf.errors import InputError
from nvf.options import Option, path, run, whole
from nvf.statistics import two_digits

OPTIONS = (
    Option("pipeline", "the folder that a run saved: outputs/<date>/<time>/pipeline", read=path),
    Option("queries", "the vectors: .npy (n, D), or .parquet", read=path),
    Option("output", "the answers, best first: .npy, .jsonl, or .trec, a TREC run", read=path),
    Option("k", "answers a query; null: as many as the pipeline has candidates", None, whole),
    Option("texts", '.jsonl, a line {"text": ...} a query: has words searched too; null: vectors alone', None, path),
    Option("allowed", "ids or rows that may answer: .json, a list; .jsonl, a list a query; null: all", None, path),
    Option("candidates", "of another engine, to be ordered: .npy (n, m), or .jsonl, as answers; null", None, path),
    Option("column", "of a .parquet file, the column that holds the vectors", "vector"),
    Option("index", "flat: search exactly; null: with the index that the pipeline was saved with, if any", None),
    Option("device", "cpu, cuda, cuda:1; auto: the GPU where there is one, else the CPU", "auto"),
)


def search(
    *,
    pipeline: Path,
    queries: Path,
    output: Path,
    k: Any,
    texts: Path | None,
    allowed: Path | None = None,
    candidates: Path | None = None,
    column: str,
    index: str | None,
    device: str,
) -> str:
    """Answer every query in the file, a block at a time; return the line that says how many, how fast, and where."""
    # Imported here so that --help and an option's error answer without importing torch.
    from tqdm import tqdm

    from nvf.data.beside import text_lines
    from nvf.data.search_files import check_ids, check_output, open_queries, read_ids_of, write_answers
    from nvf.models.filters import Filter
    from nvf.models.memory import check_k
    from nvf.models.pipeline import Pipeline
    from nvf.ops.products import QUERY_BLOCK

    check_output(output, queries, texts, allowed, candidates)
    if allowed is not None and candidates is not None:
        raise InputError("allowed= and candidates= exclude each other; give candidates that are allowed")
    if index not in (None, "flat"):
        raise InputError(f"index={index} is neither null nor flat; others are built in training: nvf.train index=hnsw")
    model = Pipeline.load(pipeline, device, index=index is None)
    check_ids(output, model.memory.ids)
    k = model.k if k is None else k
    check_k(k, len(model.memory))
    vectors = open_queries(queries, column, dim=model.attention.query_dim)
    each: dict[str, Any] = {}  # what has a value for each query
    if texts is not None:
        each["texts"] = text_lines(texts, len(vectors))
    answer: Any = partial(model.search, k=k) if candidates is None else model.rerank
    if (path := allowed or candidates) is not None:
        name, given = "allowed" if candidates is None else "candidates", read_ids_of(path)
        only = Filter(model.memory, given, len(vectors), name)  # so that all is checked before any work
        if (only if candidates is None else only.candidates()).nested:
            each[name] = given
        else:
            answer = partial(answer, allowed=given)

    start = time.perf_counter()
    blocks = zip(range(0, len(vectors), QUERY_BLOCK), vectors.blocks(QUERY_BLOCK), strict=True)
    blocks = tqdm(blocks, total=-(-len(vectors) // QUERY_BLOCK), unit=" blocks", leave=False, delay=1, disable=None)
    parts = ((block, {name: of[at : at + QUERY_BLOCK] for name, of in each.items()}) for at, block in blocks)
    write_answers(output, (answer(block, **own) for block, own in parts), count=len(vectors), k=k)
    seconds = time.perf_counter() - start
    rate = two_digits(len(vectors) / seconds)
    how = f"k={k}" if model.index is None else f"k={k}, index={model.index.kind}"
    return f"{len(vectors):,} queries in {two_digits(seconds)} s ({rate} queries/s, {how}); answers in {output}"


if __name__ == "__main__":
    run(search, program="nvf.search", summary=(__doc__ or "").partition(": ")[2], options=OPTIONS)
