"""The points of TensorBoard's projector: some rows, queries and transformed queries, with what they are called."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from nvf.data.queries import QueryBatch
from nvf.models.attention import SoftAttention

CHARACTERS = 100  # of a row's text
DECIMALS = 6  # of a coordinate in the file, which is text


def spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers 0..count - 1, evenly spaced."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit


@torch.no_grad()
def add_points(
    writer: SummaryWriter,
    attention: SoftAttention,
    batch: QueryBatch,
    limit: int,
    texts: Sequence[str] | None,
    labels: Sequence[int] | None,
) -> None:
    """Write at most `limit` points, each with its kind and the row that it is or is answered by.

    A quarter are queries, evenly spaced, a quarter the same queries transformed, and the rest are rows: the queries'
    targets as far as there is room, then others, evenly spaced.

    Args:
        writer: of the run's folder.
        attention: stage 1.
        batch: queries and targets.
        limit: at least 4.
        texts: of the N rows.
        labels: the clusters of the N rows.
    """
    first = (batch.targets >= 0).int().argmax(dim=-1, keepdim=True)  # of several targets; the others are padding
    targets = batch.targets.gather(-1, first).squeeze(-1).cpu().numpy()
    queries = spread(len(targets), limit // 4)
    room = limit - 2 * len(queries)
    rows = np.sort([*dict.fromkeys([*targets[queries], *spread(len(attention.memory), room)])][:room])
    raw = batch.queries[torch.from_numpy(queries).to(batch.queries.device)]
    shown = attention.memory.take(torch.from_numpy(rows).to(raw.device))
    vectors = [shown, raw, F.normalize(attention.moved(raw), dim=-1)]
    of = [*rows.tolist(), *targets[queries].tolist() * 2]  # the row that each point is, or is answered by
    kinds = ["row"] * len(rows) + ["query"] * len(queries) + ["transformed query"] * len(queries)
    columns: dict[str, Sequence[object]] = {"kind": kinds, "row": of}  # the first colours the points and names them
    if labels is not None:
        columns["cluster"] = [int(labels[row]) for row in of]
    if texts is not None:
        columns["text"] = [" ".join(texts[row][:CHARACTERS].split()) for row in of]  # no tab: the file has columns
    columns["query"] = [""] * len(rows) + queries.tolist() * 2
    points = torch.cat(vectors).double().cpu().numpy().round(DECIMALS)
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    writer.add_embedding(points, lines, metadata_header=list(columns), tag="rows and queries", global_step=0)
