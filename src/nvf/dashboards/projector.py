"""A folder that TensorBoard's projector reads: some rows, queries and transformed queries as named points."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nvf.data.queries import QueryBatch
from nvf.models.attention import SoftAttention

FOLDER = "projector"
TEXT = 100  # characters of a label
CONFIG = """embeddings {{
  tensor_name: "rows and queries"
  tensor_path: "{folder}/vectors.bytes"
  tensor_shape: [{points}, {dim}]
  metadata_path: "{folder}/points.tsv"
}}
"""


def spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` of 0..count - 1, evenly spaced."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit


def shown_points(targets: np.ndarray, rows: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Which queries are shown, each twice, and which rows: together at most `limit`, half of them rows where possible.

    The rows are the queries' first targets as far as there is room, then others, evenly spaced.

    Args:
        targets: (B, m) rows, the first of each never -1.
        rows: N.
        limit: at least 4.
    """
    queries = spread(len(targets), limit // 4)
    room = min(rows, limit - 2 * len(queries))
    named = np.unique(targets[queries, 0])
    named = named[spread(len(named), room)]
    others = np.setdiff1d(np.arange(rows), named)
    return queries, np.sort(np.append(named, others[spread(len(others), room - len(named))]))


def write_projector(folder: Path, vectors: np.ndarray, columns: dict[str, Sequence[object]]) -> None:
    """Write the points, (P, D), with their columns of labels; the first is the one that colours and names them."""
    inside = folder / FOLDER
    inside.mkdir(exist_ok=True)
    vectors.astype("<f4").tofile(inside / "vectors.bytes")
    lines = zip(*columns.values(), strict=True)
    table = ["\t".join(columns), *("\t".join(" ".join(str(cell).split()) for cell in line) for line in lines)]
    (inside / "points.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    points, dim = vectors.shape
    # A run's folder is where TensorBoard looks for this file; the paths in it are relative to it.
    (folder / "projector_config.pbtxt").write_text(CONFIG.format(folder=FOLDER, points=points, dim=dim))


@torch.no_grad()
def write_points(
    attention: SoftAttention,
    batch: QueryBatch,
    numbers: np.ndarray,
    limit: int,
    folder: Path,
    texts: Sequence[str] | None,
    labels: Sequence[int] | None,
) -> None:
    """Write rows, queries and transformed queries, with their kind, and the row that each is or is answered by.

    Args:
        attention: stage 1.
        batch: queries and targets.
        numbers: what the queries are called, (B,).
        limit: points, together.
        folder: the run's.
        texts: of the N rows.
        labels: clusters of the N rows.
    """
    targets = batch.targets.cpu().numpy()
    targets = np.take_along_axis(targets, (targets < 0).argsort(axis=1, kind="stable"), axis=1)  # padding last
    queries, rows = shown_points(targets, len(attention.memory), limit)
    raw = batch.queries[torch.from_numpy(queries).to(batch.queries.device)]
    vectors = [
        attention.memory.take(torch.from_numpy(rows).to(raw.device)),
        F.normalize(raw, dim=-1),
        F.normalize(attention.moved(raw), dim=-1),
    ]
    answers = targets[queries, 0]
    of = np.concatenate([rows, answers, answers]).tolist()  # the row that each point is, or is answered by
    kinds = ["row"] * len(rows) + ["query"] * len(queries) + ["transformed query"] * len(queries)
    columns: dict[str, Sequence[object]] = {"kind": kinds, "row": of}
    if labels is not None:
        columns["cluster"] = [int(labels[row]) for row in of]
    if texts is not None:
        columns["text"] = [texts[row][:TEXT] for row in of]
    columns["query"] = [""] * len(rows) + numbers[queries].tolist() * 2
    write_projector(folder, torch.cat(vectors).float().cpu().numpy(), columns)
