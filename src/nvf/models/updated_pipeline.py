"""A pipeline after items came, went or changed: all that rests on its rows and its log follows, nothing is fitted."""

import copy
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError
from nvf.files.ids import checked_ids, padded, shown, target_rows
from nvf.files.mapped_rows import as_bytes
from nvf.files.vectors import check_vectors, from_numpy
from nvf.models.ann_index import build_index
from nvf.models.evidence import FEATURES, NEIGHBOURS, SHARPNESS, Evidence
from nvf.models.memory import VectorMemory, check_dim, factorize, hubness, row_hashes, unit
from nvf.models.pipeline_search import checked
from nvf.models.words import Words
from nvf.ops.topk import blockwise_topk

ROUNDING = 1e-5  # more than two computations of a cosine differ by


class Change(NamedTuple):
    """A memory of N' rows in the place of one of N."""

    memory: VectorMemory
    old: Tensor  # (N',) the row that each row was, -1 for a new one
    left: Tensor  # (e,) former rows, ascending, each as often as its items now have different rows,
    right: Tensor  # (e,) and these rows

    def carry(self, values: Tensor) -> Tensor:
        """Return the values of rows, (N, ...), for those that stay, and zeros for new ones, (N', ...)."""
        carried = values.new_zeros(len(self.old), *values.shape[1:])
        carried[self.old >= 0] = values[self.old[self.old >= 0]]
        return carried

    def follow(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places, (f,), of those former rows, (p,), whose items are still there, and their rows now."""
        first, end = (torch.searchsorted(self.left, rows, right=right) for right in (False, True))
        place = torch.arange(len(rows), device=rows.device).repeat_interleave(end - first)
        before = (end - first).cumsum(0) - (end - first)
        return place, self.right[first[place] + torch.arange(len(place), device=rows.device) - before[place]]


@torch.no_grad()
def updated(pipeline: Any, items: Any, ids: Any, texts: Any, remove: Any, log: Any, log_texts: Any) -> Any:
    """Return another pipeline, see `Pipeline.updated`."""
    _check_texts(pipeline, "texts", texts, items)
    _check_texts(pipeline, "log_texts", log_texts, None if log is None else log[0])
    change = _changed(pipeline.memory, *_checked_items(pipeline.memory, items, ids), texts, remove)
    if (rows := len(change.memory)) < pipeline.k:
        raise InputError(f"remove: {rows} rows would stay, fewer than k={pipeline.k}; remove fewer, or add some")
    queries, targets = _checked_log(pipeline, change.memory, log)
    attention, evidence, bias = pipeline.attention, pipeline.evidence, _bias(pipeline, change)
    if evidence is not None:
        evidence = _evidence(evidence, change, queries, targets)
    others = {id(pipeline.memory): change.memory, id(pipeline.evidence): evidence}
    new = copy.deepcopy(pipeline, {**others, id(pipeline.words): None, id(pipeline.index): None})
    if attention.delta is not None:
        new.attention.delta = nn.Parameter(change.carry(attention.delta), attention.delta.requires_grad)
    new.attention.bias = bias
    if pipeline.words is not None:
        new.words = _words(pipeline.words, change, targets, log_texts)
    if pipeline.index is not None:
        keys, settings = new.attention.keys(), dict(pipeline.index.settings)
        if "nlist" in settings:
            settings["nlist"] = min(settings["nlist"], rows)
        same = torch.equal(keys, attention.keys())
        new.index = pipeline.index if same else build_index(keys, pipeline.index.kind, **settings)
    return new


def _check_texts(pipeline: Any, name: str, texts: Any, vectors: Any) -> None:
    """Raise an InputError unless these vectors, if there are any, come with texts just where the pipeline has words."""
    memory, words = pipeline.memory, pipeline.words
    if words is None and (texts is not None or pipeline.attention.word_weights is not None):
        raise InputError(f"{name}: the pipeline was fitted without texts, or bm25s is missing; give none, or install it")
    if words is not None and (memory.texts is None or words.texts is None):
        raise InputError(f"{name}: the pipeline does not hold the texts that its words are from; train it again")
    count = 0 if vectors is None else len(vectors)
    if words is not None and (len(texts or ()) != count or not all(isinstance(text, str) for text in texts or ())):
        raise InputError(f"{name} holds {len(texts or ())} texts for {count} vectors; give each its own")


def _checked_items(memory: VectorMemory, items: Any, ids: Any) -> tuple[Tensor, list[Any] | None]:
    """Return the items' unit vectors, (m, D), as the memory keeps them, and their ids, if it has any."""
    given = memory.rows.new_empty(0, memory.dim) if items is None else items
    given = from_numpy(given) if isinstance(given, np.ndarray) else given
    if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point():
        raise InputError(f"add: {type(items).__name__} of shape {np.shape(items)}; give floats, (m, {memory.dim})")
    check_dim(given.shape[1], memory.dim, "add")
    if (ids is None) != (memory.ids is None) and len(given):
        raise InputError("ids: give each added vector its id where the memory has ids, and none where it has none")
    names = None if memory.ids is None else checked_ids(ids, len(given), "ids").tolist() if len(given) else []
    if names and memory.ids is not None and isinstance(names[0], str) != isinstance(memory.ids[0], str):
        fault = f"{shown(names[0])} is not of the type of the memory's, whose first is {shown(memory.ids[0])}"
        raise InputError(f"ids: {fault}; give ids of that type")
    check_vectors(given, "add", None if names is None else np.array(names, dtype=object))
    return unit(given.to(memory.rows.device)).to(memory.rows.dtype), names


def _changed(memory: VectorMemory, fresh: Tensor, ids: list[Any] | None, texts: Any, remove: Any) -> Change:
    """Return the memory without some items and with others, its rows numbered as if it were made from vectors."""
    names = [*range(memory.given)] if memory.ids is None else memory.ids.tolist()
    gone = checked_ids(remove, len(remove), "remove").tolist() if len(remove) else []
    for fault, wrong in (("no item of the memory", {*gone} - {*names}), ("added too", {*gone} & {*(ids or ())})):
        if wrong:
            raise InputError(f"remove: {shown(min(wrong, key=gone.index))} is {fault}; leave it out")
    ids = [*range(len(names), len(names) + len(fresh))] if ids is None else ids
    known = {*names}
    names += [name for name in ids if name not in known]
    number = {name: place for place, name in enumerate(names)}
    places, stays = [number[name] for name in ids], np.ones(len(names), dtype=bool)
    stays[[number[name] for name in gone]] = False
    count, given, device = len(memory), memory.given, memory.rows.device
    if not places and stays.all():
        every = torch.arange(count, device=device)
        return Change(memory, every, every, every)
    if not stays.any():
        raise InputError(f"remove: none of {given} items would stay; remove fewer, or add some")

    table = torch.cat([memory.rows, fresh])
    hashes, content = row_hashes(table.cpu()), np.arange(len(table))
    if memory.row_of_vector is not None or len(np.unique(hashes[:count])) == count:  # equal vectors are one row
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        content = first[group]
    before = memory.rows_of(torch.arange(given, device=device)).cpu().numpy()
    source = np.concatenate([before, np.zeros(len(names) - given, dtype=np.int64)])  # in the table, of each item
    source[places] = content[count:]
    same = np.zeros(len(table), dtype=bool)  # rows that an item keeps
    same[before[stays[:given] & (source[:given] == before)]] = True
    row_of_vector = factorize(source[stays])
    origin = source[stays][np.unique(row_of_vector, return_index=True)[1]]
    rows = table[torch.from_numpy(origin).to(device)]
    now = row_of_vector[(np.cumsum(stays) - 1)[:given][stays[:given]]]
    pairs = np.unique(before[stays[:given]] * len(rows) + now)

    digest = hashlib.sha256(bytes(as_bytes(rows)) + row_of_vector.tobytes()).hexdigest()
    own = None if memory.ids is None else np.array(names, dtype=object)[stays]
    merged = torch.from_numpy(row_of_vector).to(device) if len(rows) < len(row_of_vector) else None
    new = VectorMemory.restore(rows, f"sha256:{digest}", own, merged)
    new.distance = memory.distance
    if memory.texts is not None and (texts is not None or not places):
        every = dict(enumerate(memory.texts)) | dict(zip(places, texts or (), strict=True))
        new.texts = [every[place] for place in np.flatnonzero(stays).tolist()]
    parts = (np.where(same[origin], origin, -1), pairs // len(rows), pairs % len(rows))
    return Change(new, *(torch.from_numpy(part).to(device) for part in parts))


def _checked_log(pipeline: Any, memory: VectorMemory, log: Any) -> tuple[Tensor, Tensor]:
    """Return the queries that are logged, (n, D), and their targets, (n, m) rows of the new memory, padded with -1."""
    device = memory.rows.device
    if log is None:
        return memory.rows.new_empty(0, 1), torch.full((0, 1), -1, device=device)
    if pipeline.evidence is None:
        raise InputError("log: the pipeline keeps no log; leave it out, or train one with reranker=evidence")
    queries, targets = checked(pipeline, log[0]), log[1].tolist() if hasattr(log[1], "tolist") else log[1]
    named = [[*one] if isinstance(one, list | tuple) else [one] for one in targets]
    named = [[target for target in some if target != -1] for some in named]
    if len(named) != len(queries) or not all(named):
        which = next((query for query, some in enumerate(named) if not some), min(len(named), len(queries)))
        raise InputError(f"log: query {which} of {len(queries)} has no target; give it one, or remove it")
    flat = np.array(sum(named, []), dtype=object)
    if memory.ids is None and not all(isinstance(target, int) for target in flat):
        raise InputError("log: the memory has no ids; name the targets by their rows, integers")
    every = range(memory.given) if memory.ids is None else memory.ids
    rows = target_rows(every, flat, np.array([len(some) for some in named]), "log")
    return unit(queries.to(device)).to(pipeline.evidence.queries.dtype), memory.rows_of(torch.from_numpy(rows).to(device))


def _bias(pipeline: Any, change: Change) -> Tensor | None:
    """Return the hub correction of the new memory's rows; that of new ones is measured as the fit measured the others'.

    The fit's bank of queries is the log, of which the pipeline has a copy.
    """
    attention, new = pipeline.attention, change.old < 0
    if attention.bias is None or not new.any():
        return None if attention.bias is None else change.carry(attention.bias)
    if attention.hubs is None or pipeline.evidence is None:
        fault = "the pipeline corrects hubs, but does not hold the queries that say which rows are hubs"
        raise InputError(f"add: {fault}; train it again with reranker=evidence, or attention.hub_correction=false")
    (share, beta), bias, keys = attention.hubs, change.carry(attention.bias), change.memory.rows[new]
    if attention.delta is not None:
        keys = F.normalize(keys + attention.delta.new_zeros(1), dim=-1)
    bias[new] = -share * hubness(attention.moved(pipeline.evidence.queries), keys, beta).to(bias.dtype)
    return bias


def _evidence(evidence: Evidence, change: Change, queries: Tensor, targets: Tensor) -> Evidence:
    """Return evidence about the new memory; logged queries whose items are gone stay in the bank of its hubness."""
    rows, known, new = change.memory.rows, len(evidence.queries), change.old < 0
    bank, place = evidence.queries, torch.arange(known, device=rows.device)
    if len(queries):
        bank, place = torch.cat([bank, queries]).unique(dim=0, return_inverse=True)
    pair, row = change.follow(evidence.pairs // known)
    query, column = (targets >= 0).nonzero(as_tuple=True)
    asked = torch.cat([place[evidence.pairs[pair] % known], place[known + query]])
    pairs = (torch.cat([row, targets[query, column]]) * len(bank) + asked).unique()
    if not len(pairs):
        raise InputError("remove: no logged query would keep an answer; remove fewer items, or train again")
    fresh, hubs = torch.ones(len(bank), dtype=torch.bool, device=rows.device), change.carry(evidence.hubness)
    fresh[place[:known]] = False
    if fresh.any():
        total = SHARPNESS * hubness(bank[fresh], rows, SHARPNESS) + math.log(int(fresh.sum()))
        total = torch.logaddexp(SHARPNESS * hubs + math.log(known), total.to(hubs.dtype))
        hubs = (total - math.log(len(bank))) / SHARPNESS
    if new.any():
        hubs[new] = hubness(bank, rows[new], SHARPNESS).to(hubs.dtype)
    density, similar = _density(evidence, change)
    worded = evidence.features != FEATURES
    updated = Evidence(change.memory, queries=bank, pairs=pairs, hubness=hubs, density=density, worded=worded)
    updated.similar = similar
    return updated.train(evidence.training)


def _density(evidence: Evidence, change: Change) -> tuple[Tensor, Tensor]:
    """Return the density of rows, and how similar their neighbours are; only rows with other neighbours are computed."""
    rows, former, new = change.memory.rows, evidence.memory.rows, change.old < 0
    near, stale, gone = min(NEIGHBOURS, len(rows) - 1), new.clone(), torch.ones(len(former), dtype=torch.bool)
    gone = gone.to(rows.device).index_fill(0, change.old[~new], False)
    if evidence.similar is None or evidence.similar.shape != (len(former), near):
        similar, stale = rows.new_zeros(len(rows), near, dtype=torch.float32), torch.ones_like(new)
    else:
        similar = change.carry(evidence.similar)
        if gone.any() and not new.all():
            lost = blockwise_topk(rows[~new], former[gone], 1).scores[:, 0]
            stale[~new] = lost >= similar[~new, -1] - ROUNDING
        if new.any() and not new.all():
            nearer = blockwise_topk(rows[~new], rows[new], min(near, int(new.sum()))).scores
            similar[~new] = torch.cat([similar[~new], nearer], dim=-1).topk(near, dim=-1).values
    if stale.any():
        similar[stale] = blockwise_topk(rows[stale], rows, near + 1).scores[:, 1:]
    density = change.carry(evidence.density)
    changed = stale
    if evidence.similar is not None and not stale.all():
        changed = stale | (similar != change.carry(evidence.similar)).any(dim=-1)
    density[changed] = similar[changed].sum(dim=-1) / max(1, near)
    return density, similar


def _words(words: Words, change: Change, targets: Tensor, log_texts: Sequence[str] | None) -> Words:
    """Return the index of the new rows' words, and of the logged queries', unless these must not be used."""
    assert words.texts is not None
    logged, rows, answers = words.texts["log"], len(change.memory), words.answers.to(targets.device)
    query, column = (answers >= 0).nonzero(as_tuple=True)
    place, row = change.follow(answers[query, column])
    query = query[place]
    if logged and log_texts:
        new, column = (targets >= 0).nonzero(as_tuple=True)
        query, row = torch.cat([query, len(answers) + new]), torch.cat([row, targets[new, column]])
        logged = [*logged, *log_texts]
    pairs = (query * rows + row).unique().cpu()
    counts = torch.bincount(pairs // rows, minlength=max(len(answers), len(logged)))
    known = torch.from_numpy(padded((pairs % rows).numpy(), counts.numpy()))
    known = F.pad(known, (0, int(not known.shape[1])), value=-1)  # a row of -1 at least
    return Words.gather(change.memory.texts_of_rows() or [], logged, known, known=words, **words.settings)
