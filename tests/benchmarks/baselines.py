"""What NVF is compared with: searches over the same frozen vectors, and texts, each tuned on validation queries."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitting import Adapter, fit, fit_adapter
from lexical import LEXICONS
from nvf import Reranker
from nvf.data.queries import blocks
from nvf.models.attention import attention_loss
from nvf.models.queries_and_keys import hubness
from nvf.models.reranker import reranker_loss
from nvf.ops.random_streams import stream, stream_seed
from nvf.ops.ranks import are_targets
from tuned_search import (
    AT_ONCE,
    Asked,
    Method,
    Problem,
    Search,
    Step,
    best,
    figures,
    improved,
    search_of,
    some,
    stepped,
    told,
)

BETAS = (5.0, 10.0, 20.0, 40.0, 80.0)  # of query-bank normalisation: inverse temperatures
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the log-sum-exp that it subtracts
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the training queries in a document
OF_WORDS = tuple(np.geomspace(0.001, 0.4, 16).tolist())  # cosine that one point of BM25 is worth
RATES = (3e-4, 1e-3, 3e-3)
MNR_RATE, MNR_SCALE, MNR_BATCHES = 1e-3, 20.0, (32, 64, 128, 256)  # the scale is LlamaIndex's
RERANKER_RATES = (1e-3, 3e-3)
SCALAR_RATIO = 100  # conf/reranker: the learning rate of the reranker's two scalars over its network's
CANDIDATES = 20
FOLDS = 3


def exact_search(problem: Problem) -> Method:
    """Brute-force cosine search with the raw query."""
    search = Search(nn.Identity(), problem.rows)
    return Method(search, figures(search, problem.val), "", lambda other: Search(nn.Identity(), other.rows))


def words_alone(problem: Problem, base: Method) -> Method:
    """BM25 without vectors, by the lexicon that validates better."""

    def step(place: int) -> Step:
        return lambda _, search: search._replace(keys=torch.zeros_like(search.keys), lexicon=place, weight=1.0)

    return best(stepped(problem, base, ((lexicon, step(place)) for place, lexicon in enumerate(LEXICONS))))


def with_words(problem: Problem, base: Method) -> Method:
    """A search plus a share of BM25: lexicon and share are tuned."""

    def step(place: int, weight: float) -> Step:
        return lambda _, search: search._replace(lexicon=place, weight=weight)

    choices = ((place, lexicon, weight) for place, lexicon in enumerate(LEXICONS) for weight in OF_WORDS)
    return improved(problem, base, ((f"{name}, weight {w:.2g}", step(place, w)) for place, name, w in choices))


def bank_normalised(problem: Problem, base: Method) -> Method:
    """Query-bank normalisation (arXiv 2112.12777): less a share of log mean exp(beta q k) / beta over the bank."""

    def step(beta: float, share: float) -> Step:
        def less_hubs(on: Problem, search: Search) -> Search:
            with torch.no_grad():
                return search._replace(bias=-share * hubness(search.move(on.train.queries), search.keys, beta))

        return less_hubs

    choices = ((beta, share) for beta in BETAS for share in SHARES)
    return improved(problem, base, ((f"hubs: beta {b:g}, share {s:g}", step(b, s)) for b, s in choices))


def moved_documents(problem: Problem, base: Method) -> Method:
    """PEFA-like: rows normalize((1 - w) v + w mean of their training queries); the others stay."""

    def step(weight: float) -> Step:
        def moved(on: Problem, search: Search) -> Search:
            query, place = (on.train.targets >= 0).nonzero(as_tuple=True)
            target = on.train.targets[query, place]
            total = torch.zeros_like(on.rows).index_add_(0, target, on.train.queries[query])
            count = target.bincount(minlength=len(on.rows)).unsqueeze(-1)
            mean = (total / count.clamp(min=1)).where(count > 0, on.rows)
            return search._replace(keys=F.normalize((1 - weight) * on.rows + weight * mean, dim=-1))

        return moved

    return improved(problem, base, ((f"weight {weight:g}", step(weight)) for weight in WEIGHTS))


def nudge() -> Any:
    """NUDGE by its authors (arXiv 2409.02343), or None and a line that says how to install it."""
    try:
        return import_module("nudge")
    except ImportError:
        print("  NUDGE is left out: pip install nudge-ft has it compared too", file=sys.stderr, flush=True)
        return None


def nudged(package: Any, kind: str) -> Step:
    """Keys that NUDGE has moved, NUDGEM or NUDGEN; it chooses by how much on validation queries itself."""

    @torch.no_grad()
    def step(problem: Problem, search: Search) -> Search:
        def log_of(batch: Asked) -> dict[str, Any]:
            answers = [[row for row in rows if row >= 0] for rows in batch.targets.tolist()]
            return {"q_embs": search.move(batch.queries).numpy(), "q_ans_indx": answers}

        with contextlib.redirect_stdout(sys.stderr):
            method = getattr(package, kind)(device=torch.device("cpu"))
            keys = method.finetune_embeddings(search.keys.numpy(), log_of(problem.train), log_of(problem.val))
        return search._replace(keys=torch.from_numpy(keys).float())

    return step


def linear(problem: Problem, base: Method, *, learned_keys: bool = False) -> Method:
    """A linear adapter of the query by cross-entropy over all rows; learning rate and epochs are tuned."""

    def step(lr: float) -> Step:
        def fitted(on: Problem, search: Search) -> Search:
            seen = torch.zeros(len(on.rows) + 1, dtype=torch.bool)
            seen[on.train.targets] = True  # -1, the padding, is the last
            adapter = Adapter(search.keys, seen=seen[:-1] if learned_keys else None)

            def loss(places: Tensor) -> Tensor:
                return attention_loss(adapter(on.train.queries[places]), on.train.targets[places])

            return fit_adapter(on, adapter, loss, lr, count=len(on.train.queries))

        return fitted

    return improved(problem, base, ((f"lr {lr:g}", step(lr)) for lr in RATES))


def negatives_ranking(problem: Problem, base: Method) -> Method:
    """LlamaIndex's adapter: a linear map by multiple negatives ranking, whose negatives are the batch's other targets.

    Its scale, 20, and Adam with 1e-3 are LlamaIndex's; the size of a batch and the epochs are tuned.
    """

    def step(size: int) -> Step:
        def fitted(on: Problem, search: Search) -> Search:
            adapter = Adapter(search.keys)
            query, place = (on.train.targets >= 0).nonzero(as_tuple=True)
            answers = search.keys[on.train.targets[query, place]]

            def loss(pairs: Tensor) -> Tensor:
                cosines = adapter.move(on.train.queries[query[pairs]]) @ answers[pairs].T
                return F.cross_entropy(MNR_SCALE * cosines, torch.arange(len(pairs)))

            return fit_adapter(on, adapter, loss, MNR_RATE, count=len(query), batch_size=size)

        return fitted

    return improved(problem, base, ((f"batches of {size}", step(size)) for size in MNR_BATCHES))


def reranked(problem: Problem, base: Method) -> Method:
    """NVF's residual reranker over a search's first rows; learning rate and epochs are tuned.

    Each third of the training queries has the candidates of a search that was fitted to the other two, because a search
    ranks the targets of its own training queries too well to teach a reranker.
    """
    search, rows, train = search_of(base), problem.rows, problem.train
    k, beta = min(CANDIDATES, len(rows)), torch.tensor(search.beta)
    fold = torch.randperm(len(train.queries), generator=stream(problem.seed, "adapters/folds")) % FOLDS
    logits, places = torch.zeros(len(fold), k), torch.zeros(len(fold), k, dtype=torch.long)
    for part in range(FOLDS):
        unseen = (fold == part).nonzero().squeeze(-1)
        other = base.again(problem._replace(train=some(train, (fold != part).nonzero().squeeze(-1))))
        with torch.no_grad():
            top = [other(few).topk(k) for few in blocks(some(train, unseen), AT_ONCE)]
        logits[unseen] = beta * torch.cat([of_few.values for of_few in top])
        places[unseen] = torch.cat([of_few.indices for of_few in top])
    labels = are_targets(places, train.targets)
    valid = labels.any(dim=-1).nonzero().squeeze(-1)

    def fitted(lr: float) -> Method:
        torch.manual_seed(stream_seed(problem.seed, "adapters/reranker"))
        reranker = Reranker(rows.shape[1], kind="residual")

        def loss(part: Tensor) -> Tensor:
            found = reranker(train.queries[part], rows[places[part]], logits[part], beta)
            return reranker_loss(found, labels[part])

        def score(batch: Asked) -> Tensor:
            scores = search(batch)
            top = scores.topk(k)
            order = reranker(batch.queries, rows[top.indices], beta * top.values, beta).argsort(dim=-1, descending=True)
            return scores.scatter(-1, top.indices.gather(-1, order), top.values)  # the same scores, dealt anew

        network = [parameter for name, parameter in reranker.named_parameters() if name != "evidence"]
        groups = [{"params": network, "lr": lr}, {"params": [reranker.evidence], "lr": SCALAR_RATIO * lr}]
        epochs = fit(reranker, groups, loss, valid, lambda: figures(score, problem.val), seed=problem.seed)
        chosen = "; ".join(part for part in (base.chosen, f"lr {lr:g}, {epochs} epochs") if part)
        return told(Method(score, figures(score, problem.val), chosen, base.again))

    return best([base, *map(fitted, RERANKER_RATES)])


def baselines(problem: Problem) -> Iterator[tuple[str, Method]]:
    """Every baseline under its name, exact search first, each as soon as it is tuned."""

    def timed(build: Callable[..., Method], *on: Method, **settings: Any) -> Method:
        started = time.perf_counter()
        method = build(problem, *on, **settings)
        return method._replace(seconds=time.perf_counter() - started + sum(other.seconds for other in on))

    exact = timed(exact_search)
    yield "exact search", exact
    worded = problem.val.lexicons is not None
    if worded:
        yield "words alone", timed(words_alone, exact)
        yield "words + exact search", timed(with_words, exact)
    without_words = []
    for name, method in _without_words(timed, exact):
        without_words.append(method)
        yield name, method
    strongest = best(without_words)
    if worded:
        strongest = timed(with_words, strongest)
        yield "the best of these + words", strongest
    yield "residual reranker on the best of these", timed(reranked, strongest)


def _without_words(timed: Callable[..., Method], exact: Method) -> Iterator[tuple[str, Method]]:
    """Every baseline that knows vectors alone."""
    yield "query-bank normalisation", timed(bank_normalised, exact)
    yield "documents moved to their queries", timed(moved_documents, exact)
    package, nudge_n = nudge(), exact
    if package is not None:
        yield "NUDGE-M", timed(improved, exact, steps=[("NUDGE-M", nudged(package, "NUDGEM"))])
        nudge_n = timed(improved, exact, steps=[("NUDGE-N", nudged(package, "NUDGEN"))])
        yield "NUDGE-N", nudge_n
    yield "linear adapter, multiple negatives ranking", timed(negatives_ranking, exact)
    adapter = timed(linear, exact)
    yield "linear adapter, softmax over all rows", adapter
    if package is not None:
        after = timed(improved, adapter, steps=[("NUDGE-N", nudged(package, "NUDGEN"))])
        yield "NUDGE-N and linear", best([after, timed(linear, nudge_n)])
    keys = timed(linear, exact, learned_keys=True)
    yield "linear adapter + learned keys", keys
    yield "the same + query-bank normalisation", timed(bank_normalised, keys)
