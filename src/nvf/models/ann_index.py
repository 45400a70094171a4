"""An approximate first stage: about the best rows for stage 1, from a FAISS index over its keys.

FAISS is the extra `nvf[faiss]`, imported on first use. Its wheel brings an OpenMP runtime of its own. On Linux it uses
torch's if torch is imported first, as here; in the other order both have their own, and threads are set in both. On
macOS two may crash with `OMP: Error #15` (github.com/faiss-wheels/faiss-wheels/issues/73): use conda-forge's packages.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvf.errors import InputError, check_number, one_line
from nvf.files.records import own_file, sha256
from nvf.files.tensors import DAMAGE, read_tensors
from nvf.models.ann_index_files import packed, unpacked
from nvf.ops.frozen_cache import FrozenCache
from nvf.ops.random_streams import stream
from nvf.ops.topk import TopK, blockwise_topk

FILE = "index.safetensors"
KINDS: dict[str, dict[str, int | None]] = {  # with their default settings, the same as in conf/index/
    "flat": {},
    "ivf": {"nlist": None, "nprobe": 64},
    "hnsw": {"m": 32, "ef_construction": 200, "ef_search": 128},
}
SMALLEST_M, LARGEST_M = 2, 512
KEYS_PER_CELL = 39  # fewer train a poor cell: FAISS warns of it
TRAINED_ON = 256  # keys a cell
ADDED = 65_536  # keys that are added at a time
SAMPLE = 4096  # rows that stand for those that the index did not return
GATHERED = 2**22  # numbers of gathered keys held at a time
REMEDY = "pip install -e '.[faiss]' in NVF's folder, or search exactly with index=flat"


class Index:
    """A FAISS index of inner products over N keys, (N, D'), from `build_index` or `read_index`.

    Args:
        made: the FAISS object.
        kind: `ivf` or `hnsw`.
        settings: all of that kind's.
    """

    def __init__(self, made: Any, kind: str, settings: Mapping[str, Any]) -> None:
        self.kind = kind
        self.settings = dict(settings)
        self._made = made
        if kind == "ivf":
            made.nprobe = settings["nprobe"]
        else:
            made.hnsw.efSearch = min(settings["ef_search"], made.ntotal)  # FAISS makes room for as many
        chosen = torch.randperm(made.ntotal, generator=stream(0, "index sample"))[:SAMPLE]
        self.sample = chosen.sort().values  # rows, drawn once, so that one query gets one answer
        self._sampled = FrozenCache()

    def __len__(self) -> int:
        return self._made.ntotal

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return about the k largest inner products and their rows, (B, k) each; if it finds fewer, the last are -1."""
        _faiss().omp_set_num_threads(torch.get_num_threads())
        scores, rows = self._made.search(_array(queries), k)
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)

    def sampled(self, keys: Tensor) -> Tensor:
        """Return the keys of the sample."""
        return self._sampled(lambda: keys[self.sample.to(keys.device)], [keys])

    def check_fits(self, keys: Tensor) -> None:
        """Raise an InputError unless the index has as many keys, as wide as these."""
        if (len(self), self._made.d) != tuple(keys.shape):
            raise InputError(
                f"the index has {len(self)} keys of width {self._made.d}, but the pipeline {len(keys)} of width "
                f"{keys.shape[1]}; build it from the pipeline's own keys"
            )

    def write(self, path: Path) -> dict[str, Any]:
        """Write what the index adds to its keys, and return what `read_index` needs to know beside the file."""
        save_file(packed(_faiss(), self._made, self.kind), path)
        return {"kind": self.kind, "settings": self.settings, "sha256": sha256(path)}


def build_index(keys: Tensor, kind: str = "hnsw", **settings: int | None) -> Index | None:
    """Build an index over a pipeline's keys: `pipeline.index = build_index(pipeline.attention.keys(), "hnsw")`.

    The same keys make the same `ivf`; they make the same `hnsw` where torch has one thread, as several insert keys in
    an order of their own.

    Args:
        keys: (N, D') of any float type, on any device.
        kind: `ivf`, `hnsw`, or `flat`, exact search, which needs no index: None is returned.
        settings: of the kind, in place of those in KINDS.

    Raises:
        InputError: no such kind or setting, a value out of its limits, or no FAISS.
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
        made.cp.min_points_per_centroid = 1  # what FAISS would warn of, the user has asked for
        taught = torch.randperm(count, generator=stream(0, "index training"))[: TRAINED_ON * nlist]
        made.train(_array(keys[taught.sort().values.to(keys.device)]))
    else:
        made = faiss.IndexHNSWFlat(dim, complete["m"], faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = complete["ef_construction"]
    for block in keys.split(ADDED):
        made.add(_array(block))
    return Index(made, kind, complete)


def check_index(settings: Mapping[str, Any], *, rows: int, fits: Sequence[str] = ("reranker",)) -> None:
    """Raise an InputError unless an index can be built.

    Args:
        settings: `kind`, and some or all of the kind's own.
        rows: of the memory, N.
        fits: the stages that a run fits: without a reranker there is no pipeline, whose search would use the index.
    """
    given = {name: value for name, value in settings.items() if name != "kind"}
    if (kind := settings["kind"]) not in KINDS:
        raise InputError(f"index.kind={kind} is unknown; choose one of {', '.join(KINDS)}")
    for name, value in given.items():
        if name not in KINDS[kind]:
            has = ", ".join(KINDS[kind]) or "none"
            raise InputError(f"index.{name} is no setting of index={kind}; its settings: {has}")
        if name != "nlist" or value is not None:
            smallest, remedy = SMALLEST_M if name == "m" else 1, f"{KINDS[kind][name] or 'null'} is the default"
            check_number(f"index.{name}", value, minimum=smallest, whole=True, remedy=remedy)
    if given.get("m", 0) > LARGEST_M:
        raise InputError(f"index.m={given['m']} exceeds {LARGEST_M} neighbours a key; lower it, 16 to 64 serve most")
    if (given.get("nlist") or 0) > rows:
        raise InputError(f"index.nlist={given['nlist']} exceeds the memory's {rows} rows; lower it, or give null")
    if kind != "flat" and "reranker" not in fits:
        raise InputError(
            f"index={kind} is for the search of a pipeline, which stage=attention does not make; "
            "choose stage=reranker, or index=flat"
        )
    if kind != "flat":
        _faiss()


def read_index(path: Path, about: Mapping[str, Any], keys: Tensor) -> Index | None:
    """Read the index that `write` wrote; without FAISS return None with a warning: search is then exact.

    Args:
        path: the file.
        about: what `write` returned.
        keys: of the pipeline, over which the index is made again.

    Raises:
        InputError: the file is missing, is not the one that was written, or is no such index over so many keys.
    """
    remedy = "save the pipeline again, or search exactly with index=flat, Pipeline.load(..., index=False)"
    if not own_file(path):
        raise InputError(f"{path} is missing, or no regular file in its folder; {remedy}")
    try:
        faiss = _faiss()
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
        return Index(unpacked(faiss, read_tensors(path), kind, settings, _array(keys)), kind, settings)
    except DAMAGE as fault:
        raise InputError(f"{path} does not fit the pipeline ({one_line(fault)}); {remedy}") from None


@torch.no_grad()
def approximate_topk(index: Index, queries: Tensor, keys: Tensor, k: int) -> TopK:
    """Return about what `blockwise_topk(queries, keys, k, logsumexp=True)` does, from an index of the keys.

    The rows are about the k best, with their exact scores, from the keys; queries for which the index finds fewer than
    k rows are answered exactly. The sum of exp(score) is exact over the rows returned, and over the other rows R it is
    estimated without bias from those of a fixed uniform sample, S, that are among them: (|R| / |S|) sum over S. The
    expectation of its logarithm, which is returned, is a little too low.
    """
    if k >= min(SAMPLE, len(keys)):
        return blockwise_topk(queries, keys, k, logsumexp=True)
    _, rows = index.search(queries, k)
    short = (rows < 0).any(dim=-1)
    if short.any():
        rows[short] = blockwise_topk(queries[short], keys, k).rows
    rows = rows.sort(dim=-1).values  # so that of equal scores the smallest rows come first
    size = max(1, GATHERED // (k * keys.shape[1]))
    blocks = zip(queries.split(size), rows.split(size), strict=True)
    scores = torch.cat([(keys[r].to(q.dtype) @ q.unsqueeze(-1)).squeeze(-1) for q, r in blocks])  # (B, k)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    scores, rows = scores.gather(-1, order), rows.gather(-1, order)
    rest = _logsumexp_of_rest(queries, rows, index.sample.to(rows.device), index.sampled(keys), len(keys))
    return TopK(scores, rows, scores.logsumexp(dim=-1).logaddexp(rest))


def _logsumexp_of_rest(queries: Tensor, rows: Tensor, sample: Tensor, sampled: Tensor, count: int) -> Tensor:
    """Estimate the log-sum-exp over all but the rows that were returned, (B,), from the keys of a sorted sample."""
    scores = queries @ sampled.to(queries.dtype).T  # (B, S)
    place = torch.searchsorted(sample, rows).clamp(max=len(sample) - 1)  # (B, k)
    drawn = sample[place] == rows
    beyond = len(sample)  # a last column for rows that were not drawn
    scores = torch.cat([scores, scores[:, :1]], dim=-1).scatter(-1, place.where(drawn, beyond), -math.inf)[:, :beyond]
    left = beyond - drawn.sum(dim=-1)
    return scores.logsumexp(dim=-1) + ((count - rows.shape[1]) / left).log()


def _array(keys: Tensor) -> Any:
    return keys.detach().float().cpu().contiguous().numpy()


def _faiss() -> Any:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # which processors it was built for is no news
    try:
        return import_module("faiss")
    except ImportError as fault:
        raise InputError(f"an index needs FAISS, which cannot be imported ({one_line(fault)}); {REMEDY}") from None
