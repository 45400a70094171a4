"""An approximate first stage: about the best rows for stage 1, from a FAISS index over its keys.

FAISS is the extra `nvf[faiss]`, imported on first use. Its wheel may bring an OpenMP runtime beside torch's, so threads
are set in both; on macOS two may crash (github.com/faiss-wheels/faiss-wheels/issues/73): use conda-forge's packages.

FAISS trusts its own files: a forged one could lead a search out of its memory. So an index is saved as plain tensors,
and every number that a search follows is checked when they are read.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nvf.errors import InputError, check_number, one_line
from nvf.files.records import own_file, sha256
from nvf.files.tensors import DAMAGE, read_tensors
from nvf.ops.frozen_cache import FrozenCache
from nvf.ops.products import joined, split
from nvf.ops.random_streams import stream
from nvf.ops.topk import TopK, blockwise_topk

FILE = "index.safetensors"
KINDS: dict[str, dict[str, int | None]] = {  # with their default settings, the same as in conf/index/
    "flat": {},
    "ivf": {"nlist": None, "nprobe": 64},
    "hnsw": {"m": 32, "ef_construction": 200, "ef_search": 128},
}
LARGEST_M = 512  # neighbours a key
KEYS_PER_CELL = 39  # FAISS warns that fewer keys train a poor cell
TRAINED_ON = 256  # keys a cell
BLOCK = 65_536  # keys added or checked at a time
SAMPLE = 4096  # rows that stand for those that the index did not return
GATHERED = 2**22  # numbers of gathered keys held at a time
FILTERED = 0.1  # share of allowed keys up to which exact search is as fast, and FAISS finds too few of the best


class Index:
    """A FAISS index of inner products over N keys, (N, D'), with its kind, `ivf` or `hnsw`, and all its settings."""

    def __init__(self, made: Any, kind: str, settings: Mapping[str, Any]) -> None:
        self.kind, self.settings, self._made = kind, dict(settings), made
        if kind == "ivf":
            made.nprobe = settings["nprobe"]
        else:
            made.hnsw.efSearch = min(settings["ef_search"], made.ntotal)  # FAISS makes room for as many
        chosen = torch.randperm(made.ntotal, generator=stream(0, "index sample"))[:SAMPLE]
        self.sample = chosen.sort().values  # rows, drawn once, so that one query gets one answer
        self.keys_of_sample = FrozenCache()

    def __len__(self) -> int:
        return self._made.ntotal

    def search(self, queries: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return about the k largest inner products and their rows, (B, k) each; if it finds fewer, the last are -1.

        Where rows are `allowed`, (N,) bool, it finds no others.
        """
        faiss, how = _faiss(), {}
        faiss.omp_set_num_threads(torch.get_num_threads())
        if allowed is not None:
            only = faiss.IDSelectorBitmap(np.packbits(allowed.cpu().numpy(), bitorder="little"))
            same = {"nprobe": self._made.nprobe} if self.kind == "ivf" else {"efSearch": self._made.hnsw.efSearch}
            how["params"] = getattr(faiss, f"SearchParameters{self.kind.upper()}")(sel=only, **same)
        scores, rows = self._made.search(_array(queries), k, **how)
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)

    def check_fits(self, keys: Tensor) -> None:
        """Raise an InputError unless the index has as many keys, as wide as these."""
        if (len(self), self._made.d) != tuple(keys.shape):
            has = f"{len(self)} keys of width {self._made.d}, but the pipeline {len(keys)} of width {keys.shape[1]}"
            raise InputError(f"the index has {has}; build it from the pipeline's own keys")

    def write(self, path: Path) -> dict[str, Any]:
        """Write what the index adds to its keys, and return what `read_index` needs to know beside the file."""
        save_file((_packed_ivf if self.kind == "ivf" else _packed_hnsw)(self._made), path)
        return {"kind": self.kind, "settings": self.settings, "sha256": sha256(path)}


def build_index(keys: Tensor, kind: str = "hnsw", **settings: int | None) -> Index | None:
    """Build an index over keys, (N, D'): `pipeline.index = build_index(pipeline.attention.keys(), "hnsw")`.

    Settings replace those in KINDS. `flat` is exact search, which needs no index: None is returned. The same keys make
    the same `ivf`, and with one thread the same `hnsw`; several threads insert keys in varying order.
    """
    count, dim = keys.shape
    check_index({"kind": kind, **settings}, rows=count)
    if kind == "flat":
        return None
    faiss = _faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    complete = {**KINDS[kind], **{name: value and int(value) for name, value in settings.items()}}
    if kind == "ivf":
        nlist = complete["nlist"] or max(1, min(round(4 * math.sqrt(count)), count // KEYS_PER_CELL))
        complete = {"nlist": nlist, "nprobe": min(complete["nprobe"] or 0, nlist)}
        made = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
        made.cp.min_points_per_centroid = 1  # no warning of few keys a cell: the user has asked for them
        taught = torch.randperm(count, generator=stream(0, "index training"))[: TRAINED_ON * nlist]
        made.train(_array(keys[taught.sort().values.to(keys.device)]))
    else:
        made = faiss.IndexHNSWFlat(dim, complete["m"], faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = complete["ef_construction"]
    for block in keys.split(BLOCK):
        made.add(_array(block))
    return Index(made, kind, complete)


def check_index(settings: Mapping[str, Any], *, rows: int, fits: Sequence[str] = ("reranker",)) -> None:
    """Raise an InputError unless a run that `fits` these stages can build an index of N rows with these settings."""
    if (kind := settings["kind"]) not in KINDS:
        raise InputError(f"index.kind={kind} is unknown; choose one of {', '.join(KINDS)}")
    for name in settings.keys() - {"kind"}:
        if name not in KINDS[kind]:
            has = ", ".join(KINDS[kind]) or "none"
            raise InputError(f"index.{name} is no setting of index={kind}; its settings: {has}")
        if (value := settings[name]) is not None or name != "nlist":
            limits = {"minimum": 2, "below": LARGEST_M + 1} if name == "m" else {"minimum": 1}
            remedy = f"{KINDS[kind][name] or 'null'} is the default"
            check_number(f"index.{name}", value, **limits, whole=True, remedy=remedy)
    if (nlist := settings.get("nlist") or 0) > rows:
        raise InputError(f"index.nlist={nlist} exceeds the memory's {rows} rows; lower it, or give null")
    if kind != "flat":
        if "reranker" not in fits:
            what = f"index={kind} is for the search of a pipeline, which stage=attention does not make"
            raise InputError(f"{what}; choose stage=reranker, or index=flat")
        _faiss()


def read_index(path: Path, about: Mapping[str, Any], keys: Tensor) -> Index | None:
    """Make an index again from keys, its file and what `write` returned; without FAISS it is None, with a warning."""
    remedy = "save the pipeline again, or search exactly with index=flat, Pipeline.load(..., index=False)"
    if not own_file(path):
        raise InputError(f"{path} is missing, or no regular file in its folder; {remedy}")
    try:
        _faiss()
    except InputError as fault:
        logging.getLogger("nvf").warning("%s: searched exactly instead: %s", path, fault)
        return None
    kind, settings = about["kind"], about["settings"]
    if kind not in ("ivf", "hnsw") or set(settings) != set(KINDS[kind]):
        raise InputError(f"{path}: kind {kind!r} with settings {settings} is unknown; {remedy}")
    check_index({"kind": kind, **settings}, rows=len(keys))
    if sha256(path) != about["sha256"]:
        raise InputError(f"{path} is damaged, or of another pipeline; {remedy}")
    try:
        made = (_unpacked_ivf if kind == "ivf" else _unpacked_hnsw)(read_tensors(path), settings, _array(keys))
        return Index(made, kind, settings)
    except DAMAGE as fault:
        raise InputError(f"{path} does not fit the pipeline ({one_line(fault)}); {remedy}") from None


@torch.no_grad()
def approximate_topk(index: Index, queries: Tensor, keys: Tensor, k: int, allowed: Tensor | None = None) -> TopK:
    """Return about what `blockwise_topk(queries, keys, k, logsumexp=True)` does, from an index of the keys.

    The rows are about the k best, with exact scores; queries for which the index finds fewer are answered exactly, and
    so are all if different rows are `allowed` for each, (B, N), or no more than the share FILTERED for all, (1, N). The
    sum of exp(score) is exact over these rows; over the others, R, it is estimated without bias from those in a fixed
    uniform sample, S, as (|R| / |S|) sum over S. The expectation of its logarithm, which is returned, is a little low.
    """
    count, sample = len(keys), index.sample.to(keys.device)  # (S,), sorted
    drawn_keys = index.keys_of_sample(lambda: keys[sample], [keys, index.sample])  # (S, D')
    if allowed is not None:
        drawn_keys = drawn_keys[allowed[0, sample]]
        count, sample = int(allowed.sum()), sample[allowed[0, sample]]
    if k >= len(sample) or (allowed is not None and (len(allowed) > 1 or count <= FILTERED * len(keys))):
        return blockwise_topk(queries, keys, k, logsumexp=True, allowed=allowed)
    _, rows = index.search(queries, k, None if allowed is None else allowed[0])
    if (short := (rows < 0).any(dim=-1)).any():
        rows[short] = blockwise_topk(queries[short], keys, k, allowed=allowed).rows
    rows = rows.sort(dim=-1).values  # so that of equal scores the smallest rows come first
    size = max(1, GATHERED // (k * keys.shape[1]))
    blocks = zip(split(queries, size), split(rows, size), strict=True)
    scores = joined([(keys[r].to(q.dtype) @ q.unsqueeze(-1)).squeeze(-1) for q, r in blocks])  # (B, k)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    rows = rows.gather(-1, order)
    size, place = len(sample), torch.searchsorted(sample, rows).clamp(max=len(sample) - 1)
    drawn = sample[place] == rows  # (B, k)
    others = queries @ drawn_keys.to(queries.dtype).T  # (B, S)
    others.scatter_reduce_(-1, place, torch.where(drawn, -math.inf, math.inf).to(others.dtype), "amin")
    rest = others.logsumexp(dim=-1) + ((count - k) / (size - drawn.sum(dim=-1))).log()
    return TopK(scores, rows, scores.logsumexp(dim=-1).logaddexp(rest))


def _packed_ivf(made: Any) -> dict[str, Tensor]:
    """Return the centroids, (nlist, D'), and each key's cell, (N,)."""
    faiss, cells = _faiss(), np.zeros(made.ntotal, np.int64)
    for cell in range(made.nlist):
        if size := made.invlists.list_size(cell):
            cells[faiss.rev_swig_ptr(made.invlists.get_ids(cell), size)] = cell
    centroids = faiss.downcast_index(made.quantizer).reconstruct_n(0, made.nlist)
    return {"centroids": torch.from_numpy(centroids), "cells": torch.from_numpy(cells)}


def _unpacked_ivf(tensors: dict[str, Tensor], settings: dict[str, Any], keys: np.ndarray) -> Any:
    faiss, (count, dim), nlist = _faiss(), keys.shape, settings["nlist"]
    if nlist is None or settings["nprobe"] > nlist:
        raise ValueError(f"{settings} are not those of an index")
    centroids = _taken(tensors, "centroids", (nlist, dim), torch.float32)
    cells = _taken(tensors, "cells", (count,), torch.int64, 0, nlist)
    if not np.isfinite(centroids).all():
        raise ValueError("centroids have NaN or infinite values")
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centroids)
    made = faiss.IndexIVFFlat(quantizer, dim, nlist, faiss.METRIC_INNER_PRODUCT)
    made.is_trained = True
    made.add_core(count, faiss.swig_ptr(keys), None, faiss.swig_ptr(cells))
    return made


def _packed_hnsw(made: Any) -> dict[str, Tensor]:
    """Return each key's number of levels, (N,), all neighbours, by key and level, -1 for none, and the first key."""
    graph, arrays = made.hnsw, _faiss().vector_to_array
    levels, neighbors = torch.from_numpy(arrays(graph.levels)), torch.from_numpy(arrays(graph.neighbors))
    return {"levels": levels, "neighbors": neighbors, "entry": torch.tensor([graph.entry_point], dtype=torch.int32)}


def _unpacked_hnsw(tensors: dict[str, Tensor], settings: dict[str, Any], keys: np.ndarray) -> Any:
    faiss, (count, dim) = _faiss(), keys.shape
    made = faiss.IndexHNSWFlat(dim, settings["m"], faiss.METRIC_INNER_PRODUCT)
    made.hnsw.efConstruction = settings["ef_construction"]
    starts = faiss.vector_to_array(made.hnsw.cum_nneighbor_per_level).astype(np.int64)  # of each level in a key's list
    levels = _taken(tensors, "levels", (count,), torch.int32, 1, made.hnsw.assign_probas.size() + 1)
    offsets = np.concatenate([[0], np.cumsum(starts[levels])])
    neighbors = _taken(tensors, "neighbors", (int(offsets[-1]),), torch.int32, -1, count)
    entry = _taken(tensors, "entry", (1,), torch.int32, 0, count)
    if levels[entry[0]] != levels.max():
        raise ValueError("entry is no key of the highest level")
    for level in range(levels.max()):
        slots = np.arange(starts[level], starts[level + 1])
        theirs = neighbors[offsets[:-1][levels > level, None] + slots]
        if (levels[theirs] <= level)[theirs >= 0].any():  # a search would read slots that they do not have
            raise ValueError(f"neighbors of level {level} are not all on that level")
    faiss.downcast_index(made.storage).add(keys)
    for name, array in (("levels", levels), ("offsets", offsets.astype(np.uint64)), ("neighbors", neighbors)):
        faiss.copy_array_to_vector(array, getattr(made.hnsw, name))
    made.hnsw.entry_point, made.hnsw.max_level = int(entry[0]), int(levels.max()) - 1
    made.ntotal = count
    return made


def _taken(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, least: int = 0, end: int = 0
) -> np.ndarray:
    """Return the tensor's array; a ValueError for another shape or type, or values outside least..end - 1."""
    if (tensor := tensors.get(name)) is None or tensor.shape != shape or tensor.dtype != dtype:
        found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} is {found}, but should be {shape} {dtype}")
    array = tensor.contiguous().numpy()
    if end and len(array) and not least <= array.min() <= array.max() < end:
        raise ValueError(f"{name} has {array.min()} to {array.max()}, but should have {least} to {end - 1}")
    return array


def _array(keys: Tensor) -> Any:
    return keys.detach().float().cpu().contiguous().numpy()


def _faiss() -> Any:
    if "faiss" not in sys.modules:
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it names the processors it was built for
    try:
        return import_module("faiss")
    except ImportError as fault:
        remedy = "pip install -e '.[faiss]' in NVF's folder, or search exactly with index=flat"
        raise InputError(f"an index needs FAISS, which cannot be imported ({one_line(fault)}); {remedy}") from None
