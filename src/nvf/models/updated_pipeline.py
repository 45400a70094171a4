"""A pipeline after items came, went or changed: all that rests on its rows and its log follows, nothing is fitted."""

import copy
import hashlib
import math
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError
from nvf.files.ids import checked_ids, padded, shown, target_rows
from nvf.files.mapped_rows import as_bytes
from nvf.files.vectors import check_vectors, factorize, from_numpy, row_hashes
from nvf.models.ann_index import build_index
from nvf.models.evidence import FEATURES, NEIGHBOURS, SHARPNESS, Evidence, evenly, similar_to
from nvf.models.memory import VectorMemory, check_dim, unit
from nvf.models.pipeline_search import checked
from nvf.models.queries_and_keys import hubness
from nvf.models.words import Words
from nvf.ops.topk import blockwise_topk

AMONG = 2**15  # rows at most, among which a row's density is measured anew
ROUNDING = 1e-5  # two computations of a cosine differ by less


class Change(NamedTuple):
    """A memory of N' rows in the place of one of N."""

    memory: VectorMemory
    old: Tensor  # (N',) the row that each row was, -1 for a new one
    now: Tensor  # (N,) the row that the items of each former row have, -1 if they are gone

    def carry(self, values: Tensor) -> Tensor:
        """Return the values of rows, (N, ...), for those that stay, and zeros for new ones, (N', ...)."""
        carried, kept = values.new_zeros(len(self.old), *values.shape[1:]), self.old >= 0
        carried[kept] = values[self.old[kept]]
        return carried


@torch.no_grad()
def updated(pipeline: Any, items: Any, ids: Any, texts: Any, remove: Any, log: Any, log_texts: Any) -> Any:
    """Return another pipeline, see `Pipeline.updated`."""
    _check_texts(pipeline, "texts", texts, items)
    _check_texts(pipeline, "log_texts", log_texts, log and log[0])
    change = _changed(pipeline.memory, items, ids, texts, remove)
    if (rows := len(change.memory)) < pipeline.k:
        raise InputError(f"remove: {rows} rows would stay, fewer than k={pipeline.k}; remove fewer, or add some")
    queries, targets = _checked_log(pipeline, change.memory, log)
    bias, evidence = _bias(pipeline, change), pipeline.evidence
    evidence = None if evidence is None else _evidence(evidence, change, queries, targets)
    parts = {id(pipeline.memory): change.memory, id(pipeline.evidence): evidence}
    new = copy.deepcopy(pipeline, {**parts, id(pipeline.words): None, id(pipeline.index): None})
    if (delta := pipeline.attention.delta) is not None:
        if pipeline.attention.moving is None:
            carried = change.carry(delta)
        else:
            places = pipeline.attention.places()[change.old].where(change.old >= 0, -1)
            new.attention.moving, carried = (places >= 0).nonzero().squeeze(-1), delta[places[places >= 0]]
        new.attention.delta = nn.Parameter(carried, delta.requires_grad)
    new.attention.bias = bias
    if pipeline.words is not None:
        new.words = _words(pipeline.words, change, targets, log_texts)
    if (index := pipeline.index) is not None:
        keys, settings = new.attention.keys(), dict(index.settings)
        settings |= {"nlist": min(settings["nlist"], rows)} if "nlist" in settings else {}
        same = torch.equal(keys, pipeline.attention.keys())
        new.index = index if same else build_index(keys, index.kind, **settings)
    return new


def _check_texts(pipeline: Any, name: str, texts: Any, vectors: Any) -> None:
    """Raise an InputError unless each vector has a text if the pipeline has words, which it must be able to extend."""
    words, given = pipeline.words, texts or ()
    if words is None and (texts is not None or pipeline.attention.word_weights is not None):
        raise InputError(f"{name}: the pipeline has no texts, or bm25s is missing; give none, or install it")
    if words is not None and (pipeline.memory.texts is None or words.texts is None):
        raise InputError(f"{name}: the pipeline does not hold the texts that its words are from; train it again")
    count = 0 if vectors is None or words is None else len(vectors)
    if len(given) != count or not all(isinstance(text, str) for text in given):
        raise InputError(f"{name}: {len(given)} texts are not one string for each of {count} vectors; give as many")


def _checked_items(memory: VectorMemory, items: Any, ids: Any) -> tuple[Tensor, list[Any]]:
    """Return the items' unit vectors, (m, D), as the memory keeps them, and their ids, or else their numbers."""
    given = memory.rows[:0] if items is None else from_numpy(items) if isinstance(items, np.ndarray) else items
    if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point():
        raise InputError(f"add: {type(items).__name__} of shape {np.shape(items)}; give floats, (m, {memory.dim})")
    check_dim(given.shape[1], memory.dim, "add")
    if len(given) and (ids is None) != (memory.ids is None):
        raise InputError("ids: give each added vector its id where the memory has ids, and none where it has none")
    names = None if ids is None else checked_ids(ids, len(given), "ids")
    known = [] if memory.ids is None or names is None else [*memory.ids[:1].tolist(), *names[:1].tolist()]
    if len({isinstance(name, str) for name in known}) > 1:
        raise InputError(f"ids: {shown(known[1])} is not of the type of the memory's {shown(known[0])}; give such ids")
    check_vectors(given, "add", names)
    numbers = range(memory.given, memory.given + len(given))
    return unit(given.to(memory.rows.device)).to(memory.rows.dtype), [*numbers] if names is None else names.tolist()


def _changed(memory: VectorMemory, items: Any, given_ids: Any, texts: Any, remove: Any) -> Change:
    """Return the memory without some items and with others, its rows numbered as if it were made from vectors."""
    fresh, ids = _checked_items(memory, items, given_ids)
    gone, count, device = checked_ids(remove, len(remove), "remove").tolist(), len(memory), memory.rows.device
    names = range(memory.given) if memory.ids is None else memory.ids.tolist()
    table = torch.cat([memory.rows, fresh])
    hashes, content = row_hashes(table.cpu()), np.arange(len(table))
    if memory.row_of_vector is not None or len(np.unique(hashes[:count])) == count:  # equal vectors are one row
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        content = first[group]
    before = dict(zip(names, memory.rows_of(torch.arange(memory.given, device=device)).tolist(), strict=True))
    after, added = before.copy(), {*ids}  # the row in the table of each item
    for name in gone:
        if after.pop(name, None) is None or name in added:
            raise InputError(f"remove: {shown(name)} is no item of the memory, or is added too; leave it out")
    after |= zip(ids, content[count:].tolist(), strict=True)
    if not after:
        raise InputError(f"remove: none of {len(before)} items would stay; remove fewer, or add some")

    number = factorize(np.array([*after.values()]))
    origin = np.array([*after.values()])[np.unique(number, return_index=True)[1]]
    rows, row_of = table[torch.from_numpy(origin).to(device)], dict(zip(after, number.tolist(), strict=True))
    stays = np.isin(origin, [row for name, row in before.items() if after.get(name) == row])
    moved = {row: row_of[name] for name, row in reversed(before.items()) if name in after}  # to the first item's
    moved |= zip(origin[stays].tolist(), np.flatnonzero(stays).tolist(), strict=True)
    old, now = np.where(stays, origin, -1), [moved.get(row, -1) for row in range(count)]
    content_hash = hashlib.sha256(bytes(as_bytes(rows)) + number.tobytes()).hexdigest()
    new = VectorMemory.restore(
        rows,
        f"sha256:{content_hash}" if ids or gone else memory.fingerprint,
        None if memory.ids is None else np.array([*after], dtype=object),
        torch.from_numpy(number).to(device) if len(rows) < len(number) else None,
    )
    new.distance = memory.distance
    if memory.texts is not None and (texts or not ids):
        text_of = dict(zip(before, memory.texts, strict=True)) | dict(zip(ids, texts or (), strict=True))
        new.texts = [text_of[name] for name in after]
    new = new if memory.alignment is None else new.aligned_with(memory.alignment)
    return Change(new, torch.from_numpy(old).to(device), torch.tensor(now, device=device))


def _checked_log(pipeline: Any, memory: VectorMemory, log: Any) -> tuple[Tensor, Tensor]:
    """Return the queries to log, unit (n, D), and their targets, (n, m) rows of the new memory, padded with -1."""
    device = memory.rows.device
    if log is None:
        return torch.empty(0, 1, device=device), torch.full((0, 1), -1, device=device)
    if pipeline.evidence is None:
        raise InputError("log: the pipeline keeps no log; leave it out, or train one with reranker=evidence")
    queries, targets = checked(pipeline, log[0]), log[1]
    plain = [one.tolist() if hasattr(one, "tolist") else one for one in targets]
    named = [[name for name in (one if isinstance(one, list | tuple) else [one]) if name != -1] for one in plain]
    if len(named) != len(queries) or not all(named):
        raise InputError(f"log: {sum(map(bool, named))} of {len(queries)} queries have targets; give each its own")
    flat = np.array([*chain.from_iterable(named)], dtype=object)
    if memory.ids is None and not all(isinstance(target, int) for target in flat):
        raise InputError("log: the memory has no ids; name the targets by their rows, integers")
    every = range(memory.given) if memory.ids is None else memory.ids
    rows = torch.from_numpy(target_rows(every, flat, np.array([*map(len, named)]), "log"))
    return unit(queries.to(device)).to(pipeline.evidence.queries.dtype), memory.rows_of(rows.to(device))


def _bias(pipeline: Any, change: Change) -> Tensor | None:
    """Return the hub correction of the new memory's rows; of new ones it is measured as the fit did, on its queries.

    These are the log. What share it took cannot be told from the others' corrections once stage 1 was trained on.
    """
    attention, new = pipeline.attention, change.old < 0
    if attention.bias is None:
        return None
    bias = change.carry(attention.bias)
    if new.any():
        if attention.hubs is None or pipeline.evidence is None:
            remedy = "train it again with reranker=evidence, or attention.hub_correction=false"
            raise InputError(f"add: the pipeline corrects hubs, but lacks the queries that tell them; {remedy}")
        (share, beta), keys = attention.hubs, change.memory.keys[new]
        if attention.delta is not None:
            keys = F.normalize(keys.to(attention.delta.dtype), dim=-1)
        bias[new] = -share * hubness(attention.moved(pipeline.evidence.queries), keys, beta).to(bias.dtype)
    return bias


def _joined(change: Change, query: Tensor, row: Tensor, asked: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of query and row as they are now: of the log, (p,) each, and of queries with targets, (n, m)."""
    left, (new, column) = change.now[row] >= 0, (targets >= 0).nonzero(as_tuple=True)
    return torch.cat([query[left], asked[new]]), torch.cat([change.now[row[left]], targets[new, column]])


def _evidence(evidence: Evidence, change: Change, queries: Tensor, targets: Tensor) -> Evidence:
    """Return evidence about the new memory; logged queries whose items are gone still say which rows are hubs."""
    memory, known, new, bank = change.memory, len(evidence.queries), change.old < 0, evidence.queries
    place = torch.arange(known, device=bank.device)
    if len(queries):
        bank, place = torch.cat([bank, queries]).unique(dim=0, return_inverse=True)
    query, row = _joined(change, place[evidence.pairs % known], evidence.pairs // known, place[known:], targets)
    if not len(row):
        raise InputError("remove: no logged query would keep an answer; remove fewer items, or train again")
    fresh, hubs = torch.ones_like(bank[:, 0], dtype=torch.bool), change.carry(evidence.hubness)
    fresh[place[:known]] = False
    if fresh.any():
        nearness = hubness(memory.aligned_queries(bank[fresh]), memory.keys, SHARPNESS)
        total = SHARPNESS * nearness + math.log(int(fresh.sum()))
        hubs = (torch.logaddexp(SHARPNESS * hubs + math.log(known), total) - math.log(len(bank))) / SHARPNESS
    if new.any():
        hubs[new] = hubness(memory.aligned_queries(bank), memory.keys[new], SHARPNESS).to(hubs.dtype)
    similar, worded = _similar(evidence, change), evidence.features != FEATURES
    density, pairs = similar.sum(dim=-1) / max(1, similar.shape[1]), (row * len(bank) + query).unique()
    updated = Evidence(memory, queries=bank, pairs=pairs, hubness=hubs, density=density, worded=worded)
    updated.similar = similar if len(memory) <= AMONG or evidence.similar is not None else None
    return updated.train(evidence.training)


def _similar(evidence: Evidence, change: Change) -> Tensor:
    """Return how similar each row is to its nearest others, (N', m); only those of rows with new ones are computed."""
    rows, former, new = change.memory.rows, evidence.memory.rows, change.old < 0
    kept, near, gone = ~new, min(NEIGHBOURS, len(rows) - 1), torch.ones_like(evidence.hubness, dtype=torch.bool)
    gone[change.old[kept]] = False
    if evidence.similar is None or evidence.similar.shape != (len(former), near):
        return similar_to(rows, evenly(len(rows), AMONG))
    similar, stale = change.carry(evidence.similar), new.clone()
    if gone.any() and kept.any():
        stale[kept] = blockwise_topk(rows[kept], former[gone], 1).scores[:, 0] >= similar[kept, -1] - ROUNDING
    if new.any() and kept.any():
        nearer = blockwise_topk(rows[kept], rows[new], min(near, int(new.sum()))).scores
        similar[kept] = torch.cat([similar[kept], nearer], dim=-1).topk(near, dim=-1).values
    if stale.any():
        similar[stale] = blockwise_topk(rows[stale], rows, near + 1).scores[:, 1:]
    return similar


def _words(words: Words, change: Change, targets: Tensor, log_texts: Any) -> Words:
    """Return an index of the new rows' words, and of the logged queries', unless these must not be used."""
    assert words.texts is not None
    logged, count, answers = words.texts["log"], len(words.answers), words.answers.to(targets.device)
    if logged and log_texts:
        logged = [*logged, *log_texts]
    (query, column), numbers = (answers >= 0).nonzero(as_tuple=True), torch.arange(len(targets), device=targets.device)
    query, row = _joined(change, query, answers[query, column], count + numbers, targets)
    order = query.argsort(stable=True).cpu()
    counts = torch.bincount(query.cpu(), minlength=count + len(targets))
    table = padded(row.cpu()[order].numpy(), counts.numpy()) if len(row) else np.full((len(counts), 1), -1)
    return Words.gather(change.memory.texts_of_rows() or [], logged, torch.from_numpy(table), **words.settings)
