"""Both stages as one module: one differentiable distribution over the memory, a search, a folder on disk."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nvf.errors import InputError, check_number, one_line
from nvf.files.atomic import written_whole
from nvf.files.ids import FILE as IDS_FILE
from nvf.files.ids import read_ids, write_ids
from nvf.files.records import check_settings, is_whole, own_file, read_record, sealed, sha256
from nvf.files.tensors import DAMAGE, fill, read_tensors
from nvf.files.vectors import check_vectors, from_numpy
from nvf.models.ann_index import FILE as INDEX_FILE
from nvf.models.ann_index import OLD_FILE as OLD_INDEX_FILE
from nvf.models.ann_index import Index, approximate_topk, read_index
from nvf.models.attention import FLOATS, SoftAttention, checked
from nvf.models.distribution import exact, relaxed, shared_out
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import DTYPES, VectorMemory, check_k, unit
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.ops.cross_entropy import check_targets, logsumexp, mean_of, scores_of
from nvf.ops.products import (
    QUERY_BLOCK,
    TopK,
    best_rows,
    blockwise_topk,
    first_topk,
    inner_products,
    may_look,
    weighted_sum,
)

FORMAT = "nvf-pipeline-1"
FILES = ("config.json", "memory.safetensors", "weights.safetensors")
SETTINGS = {"format", "k", "memory", "ids", "attention", "reranker", "index", "sha256", "digest"}
SAVE_AGAIN = "save the pipeline again"
WINDOW = 2  # times k rows are scored where candidates are relaxed


class Retrieval(NamedTuple):
    """What the pipeline says of B queries; all but the candidates' choice is differentiable."""

    log_probs: Tensor  # (B, N), of the candidates and of the rest: the distribution's logarithm
    logits: Tensor  # (B, N), stage 1's
    candidates: Tensor  # (B, k) int64 rows, in stage 1's order
    scores: Tensor  # (B, k), the reranker's
    answer: Tensor | None  # (B, D), the soft-retrieved vector: the memory's rows, weighed by their probabilities

    @property
    def ranking(self) -> Tensor:
        """Scores, (B, N), in whose order `search` lists the rows: the candidates above stage 1's logits of the rest."""
        candidates, log_probs = listed(self.candidates, self.log_probs.gather(-1, self.candidates))
        first = self.logits.amax(dim=-1, keepdim=True)
        places = torch.arange(candidates.shape[-1], 0, -1, device=first.device)
        above = first + (1 + first.abs()) * places  # apart, whatever the logits' size
        return self.logits.scatter(-1, candidates, above.masked_fill(log_probs.isnan(), math.nan))


class Hits(NamedTuple):
    """A list of k rows for each query, best first: numpy arrays for numpy queries, tensors for tensors."""

    rows: Any  # (B, k) int64, numbered as the vectors were given; of equal vectors the first
    probabilities: Any  # (B, k) float32
    ids: np.ndarray | None = None  # (B, k), of the rows, numpy always; None where the memory has none


class Pipeline(nn.Module):
    """Stage 1, its k best rows, and stage 2, as one distribution over all N rows.

    Outside the candidates a row keeps stage 1's probability. Inside, softmax(scores) shares out stage 1's total
    candidate mass. It sums to one, and its arg max is the reranker's choice: the largest of k shares is at least
    mass / k, which no row outside exceeds. The choice of the candidates is piecewise constant; gradients flow through
    masses and scores to the query and every weight of both stages.

    Args:
        attention: stage 1.
        reranker: stage 2; an `EvidenceReranker` needs `evidence`.
        k: the number of candidates.
        evidence: what it weighs.

    With `index` set to one over its keys (`nvf.models.ann_index.build_index`), `search` takes stage 1's best rows from
    there; the distribution, and with it training, stays exact. Keys that are trained on want the index built anew.

    Raises:
        InputError: k is not in 1..N, or evidence and reranker do not go together.
    """

    def __init__(
        self,
        attention: SoftAttention,
        reranker: Reranker | EvidenceReranker,
        *,
        k: int = 5,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__()
        check_k(k, len(attention.memory))
        if (evidence is None) == isinstance(reranker, EvidenceReranker):
            raise InputError("an EvidenceReranker needs evidence=, and no other reranker takes it")
        self.attention = attention
        self.reranker = reranker
        self.k = int(k)  # config.json takes no number of numpy's
        self.evidence = evidence
        self._index: Index | None = None

    @property
    def memory(self) -> VectorMemory:
        """The rows that are searched."""
        return self.attention.memory

    @property
    def index(self) -> Index | None:
        """Where `search` finds stage 1's best rows; None: among all of them, exactly."""
        return self._index

    @index.setter
    def index(self, index: Index | None) -> None:
        if index is not None:
            index.check_fits(self.attention.keys())
        self._index = index

    def keys(self) -> Tensor:
        """Stage 1's keys, to load into any index of inner products, which is then asked for `transform(queries)`.

        (N, D) unit rows; (N, D + 1) where stage 1 corrects hubs, the correction as the last column. They come in the
        order in which the memory's vectors were given, equal ones too.
        """
        with torch.no_grad():
            keys = self.attention.keys()
            return keys.clone() if self.memory.place is None else keys[self.memory.place]

    def export_keys(self, path: str | Path) -> None:
        """Write `keys()` to a .npy file, or to a .safetensors file under the name `keys`; whole or not at all.

        Raises:
            InputError: the name ends in neither.
        """
        path = Path(path)
        if path.suffix not in (".npy", ".safetensors"):
            raise InputError(f"{path} ends in neither .npy nor .safetensors; choose one of them")
        keys = self.keys().cpu().contiguous()
        with written_whole(path) as partial:
            if path.suffix == ".safetensors":
                save_file({"keys": keys}, partial)
            else:
                half = keys.dtype == torch.bfloat16  # which numpy has not
                with partial.open("wb") as file:
                    np.save(file, (keys.float() if half else keys).numpy())

    @torch.no_grad()
    def transform(self, queries: np.ndarray | Tensor) -> Any:
        """What to ask an index of `keys()` for: queries of any length and float type, as numpy or torch, as given.

        Raises:
            InputError: queries of another shape or type, zero or not finite.
        """
        given, weights = self._checked(queries), self.attention.log_beta
        moved = self.attention.transformed(unit(given.to(weights.device), weights.dtype))
        return moved.cpu().numpy() if isinstance(queries, np.ndarray) else moved.to(given.device)

    def forward(
        self,
        queries: Tensor,
        *,
        logged_as: Tensor | None = None,
        relaxation: float | None = None,
        answer: bool = True,
    ) -> Retrieval:
        """The distribution and the soft-retrieved vector, differentiable in the queries and in every weight.

        Any leading dimensions take the place of B, none included: a pipeline is a layer.

        Args:
            queries: (B, D), of any length but zero.
            logged_as: (B,), each query's place in the log of the evidence, -1 for none: see `Evidence`.
            relaxation: the temperature at which rows are candidates by degrees, in units of the logits, for training;
                with None, the exact distribution. See `distribution.relaxed`.
            answer: whether the soft-retrieved vector is wanted; it costs what stage 1's logits cost.

        Raises:
            InputError: queries that are not floats of the memory's width, or a relaxation that is not above 0.
        """
        _check_relaxation(relaxation)
        queries = checked(queries, self.memory.dim)
        lead = queries.shape[:-1]
        queries = unit(queries.reshape(-1, self.memory.dim), self.attention.log_beta.dtype)
        projected, keys = self.attention.project(queries), self.attention.keys()
        logits = inner_products(projected, keys)  # (B, N)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast has halved them
        total = logits.logsumexp(dim=-1)
        if self.k == len(self.memory):
            relaxation = None  # no row is outside
        scored = self.k if relaxation is None else min(WINDOW * self.k, len(self.memory))
        rows = best_rows(logits, projected, keys, scored)
        scores = self.rerank(queries, TopK(logits.gather(-1, rows), rows, total), logged_as).to(logits.dtype)
        log_attention = logits - total.unsqueeze(-1)  # (B, N)
        if relaxation is None:
            log_probs = exact(log_attention, rows, scores)
        else:
            log_probs = relaxed(log_attention, rows, scores, k=self.k, temperature=relaxation)
        soft = weighted_sum(log_probs.exp(), self.memory.rows) if answer else None  # (B, D)
        return Retrieval(
            log_probs=log_probs.reshape(*lead, len(self.memory)),
            logits=logits.reshape(*lead, len(self.memory)),
            candidates=rows[:, : self.k].reshape(*lead, self.k),
            scores=scores[:, : self.k].reshape(*lead, self.k),
            answer=None if soft is None else soft.reshape(*lead, self.memory.dim),
        )

    def loss(
        self,
        queries: Tensor,
        targets: Tensor,
        *,
        logged_as: Tensor | None = None,
        relaxation: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attention_loss` of the distribution and of stage 1 alone, to their first gradients, never holding (B, N).

        Of the distribution no more is computed than the rows that are reranked and the targets have of it.

        Args:
            queries: (B, D), of any length but zero.
            targets: (B, m) rows, padded with -1.
            logged_as: as for `forward`, and `relaxation` too.

        Raises:
            InputError: queries or a relaxation as for `forward`, or targets that are no rows.
        """
        _check_relaxation(relaxation)
        check_targets(targets, len(checked(queries, self.memory.dim)), len(self.memory))
        queries = unit(queries, self.attention.log_beta.dtype)
        projected, keys, count = self.attention.project(queries), self.attention.keys(), len(self.memory)
        if self.k == count:
            relaxation = None  # no row is outside
        scored = self.k if relaxation is None else min(WINDOW * self.k, count)
        rows = blockwise_topk(projected, keys, scored).rows
        total = logsumexp(projected, keys)
        of_rows, of_targets = (
            scores_of(projected, self.attention.keys_of(some.clamp(min=0)), some) for some in (rows, targets)
        )  # (B, w) and (B, m)
        scores = self.rerank(queries, TopK(of_rows, rows, total), logged_as).to(total.dtype)
        log_attention = torch.cat([of_rows, of_targets], dim=-1) - total.unsqueeze(-1)  # (B, w + m)
        places = torch.arange(scored, device=rows.device).expand_as(rows)
        if relaxation is None:
            log_probs = exact(log_attention, places, scores)
        else:
            log_probs = relaxed(log_attention, places, scores, k=self.k, temperature=relaxation)
        same = targets.unsqueeze(-1) == rows.unsqueeze(1)  # (B, m, w)
        alone = scored + torch.arange(targets.shape[1], device=rows.device)
        right = log_probs.gather(-1, same.int().argmax(dim=-1).where(same.any(dim=-1), alone))
        return -mean_of(right, targets >= 0).mean(), (total - mean_of(of_targets, targets >= 0)).mean()

    def rerank(self, queries: Tensor, top: TopK, logged_as: Tensor | None = None) -> Tensor:
        """The reranker's scores of stage 1's best rows, of which the first k are the candidates."""
        evidence = None
        if self.evidence is not None:
            evidence = self.evidence(self.attention, queries, top, k=self.k, logged_as=logged_as)
        return self.score(queries, top.rows, top.scores, evidence)

    def score(self, queries: Tensor, rows: Tensor, logits: Tensor, evidence: Tensor | None) -> Tensor:
        """The reranker's scores, (B, k), where the evidence, (B, k, F), if it weighs any, is known already."""
        if isinstance(self.reranker, EvidenceReranker):
            return self.reranker(logits, evidence)
        return self.reranker(queries, self.memory.take(rows), logits, self.attention.beta)

    @torch.no_grad()
    def search(self, queries: np.ndarray | Tensor, k: int | None = None) -> Hits:
        """A list of k rows for each query, with their probabilities and ids, in blocks that never hold (B, N).

        The candidates come first, the most probable ahead; then all other rows in stage 1's order. So the first of all
        is the reranker's choice, and where it is wrong about the rest, no row that stage 1 has among its best is lost
        to one that the reranker never saw. In each of the two parts probabilities descend. They are those of `forward`:
        a candidate of which the reranker thinks little may be less probable than a row of the second part.

        Of equal probabilities the smallest rows come first; on a CPU equal rows among the candidates are equally
        probable, unless evidence tells them apart. The first k of more are the answer to k.

        With an index they are the best of those it finds. What they have of the whole is then an estimate,
        see `approximate_topk`; the order among them does not depend on it, but for an `EvidenceReranker`, which weighs
        stage 1's probabilities too.

        Args:
            queries: (B, D) of any float type and length; numpy or torch.
            k: how many rows; the pipeline's own number of candidates if None.

        Raises:
            InputError: queries of another shape or type, zero or not finite; k not in 1..N.
        """
        check_k(self.k if k is None else k, len(self.memory))
        k = self.k if k is None else int(k)
        given = self._checked(queries)
        training = self.training
        self.eval()  # no dropout in a search
        try:
            blocks = [self._search_block(block, k) for block in given.split(QUERY_BLOCK)]
        finally:
            self.train(training)
        rows, probabilities = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        rows = self.memory.vectors_of(rows)
        ids = None if self.memory.ids is None else self.memory.ids[rows.cpu().numpy()]
        if isinstance(queries, np.ndarray):
            return Hits(rows.cpu().numpy(), probabilities.cpu().numpy(), ids)
        return Hits(rows.to(given.device), probabilities.to(given.device), ids)

    def _checked(self, queries: np.ndarray | Tensor) -> Tensor:
        form = f"floats, (B, {self.memory.dim})"
        if not isinstance(queries, np.ndarray | Tensor):
            raise InputError(f"queries are a {type(queries).__name__}; give an array or a tensor of {form}")
        if isinstance(queries, np.ndarray):
            floats = queries.dtype.kind == "f" and queries.dtype.itemsize <= 8
        else:
            floats = queries.dtype in FLOATS
        if queries.ndim != 2 or queries.shape[1] != self.memory.dim or not floats:
            raise InputError(f"queries have shape {tuple(queries.shape)} and type {queries.dtype}; give {form}")
        given = from_numpy(queries) if isinstance(queries, np.ndarray) else queries
        if len(given):
            check_vectors(given, "queries")
        return given

    def _search_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = unit(queries.to(self.memory.rows.device), self.attention.log_beta.dtype)
        top = self._best(queries, max(k, self.k))
        assert top.logsumexp is not None
        candidates = TopK(top.scores[:, : self.k], top.rows[:, : self.k], top.logsumexp)
        scores = self._alike(self.rerank(queries, candidates), candidates)
        # Scores that were settled anew may round above those that were summed: no mass exceeds one even so.
        total = torch.maximum(top.logsumexp, top.scores.logsumexp(dim=-1))
        log_attention = top.scores - total.unsqueeze(-1)
        inside = shared_out(log_attention[:, : self.k], scores)
        rows, inside = listed(candidates.rows, inside)
        rows = torch.cat([rows, top.rows[:, self.k :]], dim=-1)[:, :k]
        log_probs = torch.cat([inside, log_attention[:, self.k :]], dim=-1)[:, :k]
        return rows, log_probs.exp().clamp(max=1).float()

    def _alike(self, scores: Tensor, top: TopK) -> Tensor:
        """The scores, in which equal candidates have the first one's: alone, their last bits differ."""
        alike = top.scores[:, 1:] == top.scores[:, :-1]
        if isinstance(self.reranker, EvidenceReranker) or not may_look(scores) or not alike.any():
            return scores
        vectors = self.memory.take(top.rows)
        alike &= (vectors[:, 1:] == vectors[:, :-1]).all(dim=-1)
        place = torch.arange(scores.shape[1])
        first = place.where(~F.pad(alike, (1, 0)), 0).cummax(dim=-1).values
        return scores.gather(-1, first)

    def _best(self, queries: Tensor, count: int) -> TopK:
        """Stage 1's best rows, or with an index about the best."""
        if self.index is None:
            return self.attention.candidates(queries, count, logsumexp=True)
        return approximate_topk(self.index, self.attention.project(queries), self.attention.keys(), count)

    def save(self, folder: str | Path) -> None:
        """Write the folder that `load` reads, whole or not at all.

        It holds config.json, with hashes of itself and of the others; two safetensors files; ids.json where the memory
        has ids; and index.safetensors where the pipeline has an index.

        Raises:
            InputError: the path holds something that is not a pipeline.
        """
        folder = Path(folder)
        folder = Path(os.path.realpath(folder))  # a link stays one, to what is saved
        if os.path.lexists(folder):
            _check_replaceable(folder)
        config = {
            "format": FORMAT,
            "k": self.k,
            "memory": self.memory.fingerprint,
            "ids": self.memory.ids is not None,
            "attention": self.attention.settings,
            "reranker": self.reranker.settings,
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(folder) as partial:
            partial.mkdir()
            config["index"] = None if self.index is None else self.index.write(partial / INDEX_FILE)
            if self.memory.ids is not None:
                write_ids(self.memory.ids, partial / IDS_FILE)
            rows = self.memory.rows if self.memory.rows.dtype in DTYPES.values() else self.memory.rows.float()
            place = {} if self.memory.place is None else {"place": self.memory.place}
            save_file({"rows": rows.contiguous(), **place}, partial / "memory.safetensors")
            save_file({n: t.contiguous() for n, t in self.state_dict().items()}, partial / "weights.safetensors")
            config["sha256"] = {name: sha256(partial / name) for name in _hashed(config)}
            (partial / "config.json").write_text(json.dumps(sealed(config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", *, index: bool = True) -> "Pipeline":
        """Read a folder that `save` wrote, frozen: `requires_grad_()` makes it trainable. Nothing in it can run code.

        Nor can it take more room than its files have, or have files elsewhere read. What has changed since it was
        saved is noticed by its hash, unless whoever changed it changed the hash too, or an older version saved it,
        without hashes.

        Args:
            folder: of the pipeline, or of the run that saved it.
            device: where it goes.
            index: whether to read the index, if there is one: without it, or where FAISS is not installed, the search
                is exact.

        Raises:
            InputError: a file is missing, damaged, or does not fit the others; or there is no such device.
        """
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError, TypeError) as fault:  # torch's, of a device that is not there
            raise InputError(f"device={device} cannot be used ({one_line(fault)}); cpu always can") from None
        folder = Path(folder)
        if not (folder / "config.json").exists() and (folder / "pipeline").is_dir():
            folder = folder / "pipeline"
        for name in FILES:
            _check_own(folder / name)
        try:
            config = read_record(folder / "config.json")
            check_settings(config)
            if config["format"] != FORMAT:
                raise InputError(f"{folder}: format {config['format']!r} is not {FORMAT!r}; save it with this version")
            _check_hashes(folder, config)
            kept, ids = read_tensors(folder / "memory.safetensors"), None
            rows, place = kept["rows"], kept.get("place")
            if rows.dtype not in DTYPES.values():
                raise InputError(f"{folder}: rows of {rows.dtype} are none of {', '.join(DTYPES)}; {SAVE_AGAIN}")
            if config.get("ids"):
                ids = read_ids(folder / IDS_FILE, len(rows if place is None else place), remedy=SAVE_AGAIN)
            memory = VectorMemory.restore(rows, config["memory"], ids, place)
            weights = read_tensors(folder / "weights.safetensors")
            with torch.device("meta"):  # where settings may claim any size: the weights say which it is
                attention = SoftAttention(memory, **config["attention"])
            pipeline = cls(attention, **_second_stage(memory, config["reranker"], weights), k=config["k"])
            fill(pipeline, weights)
            pipeline.requires_grad_(False).eval()
            if index and config.get("index") is not None:
                pipeline.index = read_index(folder / INDEX_FILE, config["index"], attention.keys())
        except InputError:
            raise
        except DAMAGE as fault:
            raise InputError(f"{folder} is damaged ({one_line(fault)}); {SAVE_AGAIN}") from None
        return pipeline.to(device)


def listed(candidates: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates and their log-probabilities, (B, k), the most probable first; of equals the smallest row."""
    rows, order = candidates.sort(dim=-1)
    log_probs = log_probs.gather(-1, order)
    best = first_topk(log_probs, rows.shape[-1])
    return rows.gather(-1, best), log_probs.gather(-1, best)


def _check_replaceable(folder: Path) -> None:
    """Raise an InputError unless what a saved pipeline takes the place of is one, and nothing besides."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if len(there.intersection(FILES)) < 2 or not (folder / "config.json").is_file():
        raise InputError(f"{folder} exists and is not a pipeline folder; choose another path")
    if others := sorted(there.difference(FILES, (IDS_FILE, INDEX_FILE, OLD_INDEX_FILE))):
        raise InputError(f"{folder} holds {others[0]}, which is no pipeline's; move it, or choose another path")


def _check_own(path: Path) -> None:
    if not own_file(path):
        missing = "is no regular file in its folder" if path.exists() or path.is_symlink() else "is missing"
        raise InputError(f"{path} {missing}; a pipeline folder holds {', '.join(FILES)}; {SAVE_AGAIN}")


def _hashed(config: dict[str, Any]) -> list[str]:
    """The files whose hashes are in config.json; the index, which can be left out, has its own beside its settings."""
    return [*(name for name in FILES if name != "config.json"), *([IDS_FILE] if config.get("ids") else [])]


def _check_hashes(folder: Path, config: dict[str, Any]) -> None:
    """Raise an InputError unless every file is as it was saved; of an older version's there is nothing to check."""
    if strange := config.keys() - SETTINGS:
        raise ValueError(f"{sorted(strange)[0]!r} is no setting of a pipeline")
    if not isinstance(config["memory"], str) or not isinstance(config.get("ids", False), bool):
        raise ValueError("config.json has a value of another type")
    if config.get("ids"):
        _check_own(folder / IDS_FILE)
    if "digest" not in config and "sha256" not in config:
        return
    hashes = {name: sha256(folder / name) for name in _hashed(config)} if is_whole(config) else {"config.json": None}
    for name, found in hashes.items():
        if found is None or config["sha256"].get(name) != found:
            raise InputError(f"{folder / name} is damaged, or of another pipeline; {SAVE_AGAIN}")


def _check_relaxation(relaxation: float | None) -> None:
    if relaxation is not None:
        check_number("relaxation", relaxation, above=0, remedy="None is exact")


def _second_stage(memory: VectorMemory, settings: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """The reranker of a saved pipeline, untrained and without room for weights, and its evidence."""
    if settings["kind"] != "evidence":
        with torch.device("meta"):
            return {"reranker": Reranker(memory.dim, **settings)}
    given = {name: value for name, value in settings.items() if name != "kind"}
    parts = {n.removeprefix("evidence."): tensor for n, tensor in weights.items() if n.startswith("evidence.")}
    if any(not tensor.is_floating_point() for name, tensor in parts.items() if name != "pairs"):
        raise ValueError("its log of queries has whole numbers in place of floats")
    with torch.device("meta"):
        reranker = EvidenceReranker(len(FEATURES), **given)
    return {"reranker": reranker, "evidence": Evidence(memory, **parts)}
