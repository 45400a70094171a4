"""The points of TensorBoard's projector: some rows, queries and transformed queries, each with its name."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from nvf.data.queries import QueryBatch
from nvf.models.attention import SoftAttention


@torch.no_grad()
def add_points(
    writer: SummaryWriter,
    attention: SoftAttention,
    batch: QueryBatch,
    limit: int,
    texts: Sequence[str] | None,
    labels: Sequence[int] | None,
) -> None:
    """Write at most `limit` points, at least 4, each with its kind and the row that it is or is answered by.

    A quarter are queries, evenly spaced, a quarter the same queries transformed, and the rest are rows: the queries'
    targets if there is room, then others, evenly spaced. Texts and labels (clusters) are of the N rows.
    """
    first = (batch.targets >= 0).int().argmax(dim=-1, keepdim=True)  # a query's first target; others may be padding
    targets = batch.targets.gather(-1, first).squeeze(-1).cpu().numpy()
    queries = _spread(len(targets), limit // 4)
    room = limit - 2 * len(queries)
    rows = np.sort([*dict.fromkeys([*targets[queries], *_spread(len(attention.memory), room)])][:room])
    raw = batch.queries[torch.from_numpy(queries).to(batch.queries.device)]
    shown = attention.memory.take(torch.from_numpy(rows).to(raw.device))
    vectors = [shown, raw, F.normalize(attention.moved(raw), dim=-1)]
    of = [*rows.tolist(), *targets[queries].tolist() * 2]  # the row that each point is, or is answered by
    kinds = ["row"] * len(rows) + ["query"] * len(queries) + ["transformed query"] * len(queries)
    columns: dict[str, Sequence[object]] = {"kind": kinds, "row": of}  # the first column colours and names the points
    if labels is not None:
        columns["cluster"] = [int(labels[row]) for row in of]
    if texts is not None:
        columns["text"] = [" ".join(texts[row][:100].split()) for row in of]  # without tabs, which separate columns
    columns["query"] = [""] * len(rows) + queries.tolist() * 2
    points = torch.cat(vectors).double().cpu().numpy().round(6)  # the file is text, of fewer digits
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    writer.add_embedding(points, lines, metadata_header=list(columns), tag="rows and queries", global_step=0)


def _spread(count: int, limit: int) -> np.ndarray:
    """Return at most `limit` of the numbers 0..count - 1, evenly spaced."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit
