"""What NVF is compared with: searches over the same frozen vectors, each tuned on validation queries.

Plain torch. Top-1 on validation chooses, and MRR@10 between equals. Every search starts at exact search, which
competes, so none validates worse than that.
"""

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf import Reranker
from nvf.data.queries import QueryBatch, blocks
from nvf.models.attention import attention_loss
from nvf.models.memory import blockwise_topk, hubness
from nvf.models.reranker import reranker_loss
from nvf.ops.random_streams import stream, stream_seed
from nvf.ops.ranks import DEEPEST, are_targets, target_ranks

BETAS = (5.0, 10.0, 20.0, 40.0, 80.0)  # of query-bank normalisation: inverse temperatures
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the log-sum-exp that it subtracts
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the training queries in a document
MARGINS = (0.05, 0.1, 0.2)
TRIPLET_RATES = (3e-4, 1e-4, 1e-3)  # the first is that at which negatives and margin are chosen
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RERANKER_RATES = (1e-3, 3e-3)
SCALAR_RATIO = 100  # conf/reranker: the learning rate of the reranker's two scalars over its network's
EPOCHS, PATIENCE = 20, 5
NEIGHBOURS = 10  # of a target, from which hard negatives are drawn
CANDIDATES = 5


class Problem(NamedTuple):
    """What a baseline may see: no test query."""

    rows: Tensor  # (N, D) unit
    train: QueryBatch
    val: QueryBatch
    seed: int


class Search(NamedTuple):
    """Scores move(q) K^T + b, (B, N)."""

    move: Callable[[Tensor], Tensor]  # (B, D) -> (B, D)
    keys: Tensor  # (N, D)
    bias: Tensor | float = 0.0  # (N,)
    beta: float = 20.0  # the inverse temperature that it was fitted with, which orders no row anew

    def __call__(self, queries: Tensor) -> Tensor:
        return self.move(queries) @ self.keys.T + self.bias


class Figures(NamedTuple):
    """What is compared on validation, in this order."""

    top1: float
    mrr10: float


class Method(NamedTuple):
    """A tuned search, and what its choice rested on."""

    score: Callable[[Tensor], Tensor]  # (B, D) -> (B, N)
    val: Figures
    chosen: str  # on validation
    seconds: float = 0.0  # of tuning and fitting, the search that it builds on included


class Adapter(nn.Module):
    """z = normalize(q + W q + c) against K = V, or K = normalize(V + delta) if keys are learned; exact search at first.

    The query's side is that of SantanderAI/linear-adapter-trainer. Every row is free to move.
    """

    def __init__(self, rows: Tensor, *, learned_keys: bool = False) -> None:
        super().__init__()
        self.rows = rows
        self.linear = nn.Linear(rows.shape[1], rows.shape[1])
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.log_beta = nn.Parameter(torch.tensor(math.log(20.0)))
        self.delta = nn.Parameter(torch.zeros_like(rows)) if learned_keys else None

    def move(self, queries: Tensor) -> Tensor:
        """z, (B, D)."""
        return F.normalize(queries + self.linear(queries), dim=-1)

    def keys(self) -> Tensor:
        """K, (N, D) unit rows."""
        return self.rows if self.delta is None else F.normalize(self.rows + self.delta, dim=-1)

    def forward(self, queries: Tensor) -> Tensor:
        return self.log_beta.exp() * self.move(queries) @ self.keys().T  # (B, N)

    def search(self) -> Search:
        """The adapter as it is now."""
        return Search(self.move, self.keys().detach(), beta=float(self.log_beta.detach().exp()))


@torch.no_grad()
def ranks(score: Callable[[Tensor], Tensor], batch: QueryBatch) -> Tensor:
    """The rank, from 1, of each query's best-ranked target, (B,)."""
    return torch.cat([target_ranks(score(part.queries), part.targets) for part in blocks(batch, 1024)])


def figures(score: Callable[[Tensor], Tensor], batch: QueryBatch) -> Figures:
    """Top-1 and MRR@10."""
    found = ranks(score, batch).double()
    return Figures(float((found == 1).double().mean()), float((1 / found).where(found <= DEEPEST, 0.0).mean()))


def tuned(problem: Problem, searches: Iterable[tuple[str, Search]]) -> Method:
    """The search that validates best; of equals, the first."""
    return best(Method(search, figures(search, problem.val), chosen) for chosen, search in searches)


def exact_search(problem: Problem) -> Method:
    """Brute-force cosine search with the raw query."""
    return tuned(problem, [("", Search(nn.Identity(), problem.rows))])


def bank_normalised(problem: Problem, method: Method) -> Method:
    """Query-bank normalisation (arXiv 2112.12777): less a share of log mean exp(beta q k) / beta over the bank."""
    base = method.score
    assert isinstance(base, Search)

    def searches() -> Iterator[tuple[str, Search]]:
        yield "share 0", base
        for beta in BETAS:
            hubs = hubness(base.move(problem.train.queries), base.keys, beta)
            for share in SHARES:
                yield f"beta {beta:g}, share {share:g}", base._replace(bias=-share * hubs)

    with torch.no_grad():
        return tuned(problem, searches())


def moved_documents(problem: Problem) -> Method:
    """PEFA-like: rows normalize((1 - w) v + w mean of their training queries); the others stay."""
    query, place = (problem.train.targets >= 0).nonzero(as_tuple=True)
    target = problem.train.targets[query, place]
    total = torch.zeros_like(problem.rows).index_add_(0, target, problem.train.queries[query])
    count = target.bincount(minlength=len(problem.rows)).unsqueeze(-1)
    mean = (total / count.clamp(min=1)).where(count > 0, problem.rows)
    keys = ((f"weight {w:g}", F.normalize((1 - w) * problem.rows + w * mean, dim=-1)) for w in WEIGHTS)
    return tuned(problem, ((chosen, Search(nn.Identity(), k)) for chosen, k in keys))


def triplet_adapter(problem: Problem) -> Method:
    """A linear adapter of the query by triplet margin loss: negatives, margin, learning rate and epochs are tuned."""
    near = blockwise_topk(problem.rows, problem.rows, min(NEIGHBOURS + 1, len(problem.rows))).rows[:, 1:]

    def fitted(negatives: str, margin: float, lr: float) -> Method:
        adapter, generator = Adapter(problem.rows), stream(problem.seed, "adapters/negatives")

        def loss(batch: QueryBatch) -> Tensor:
            positive = batch.targets[:, 0]
            drawn = torch.rand(len(positive), generator=generator)
            if negatives == "hard":
                negative = near[positive, (drawn * near.shape[1]).long()]
            else:
                negative = (drawn * len(problem.rows)).long()
            cosines = adapter.move(batch.queries) * (problem.rows[negative] - problem.rows[positive])
            wrong = ~are_targets(negative.unsqueeze(-1), batch.targets).squeeze(-1)
            return ((cosines.sum(dim=-1) + margin).relu() * wrong).sum() / wrong.sum().clamp(min=1)

        return fit_adapter(problem, adapter, loss, lr, f"{negatives} negatives, margin {margin:g}", batch_size=64)

    first, *others = TRIPLET_RATES
    coarse = {choice: fitted(*choice, first) for choice in itertools.product(("random", "hard"), MARGINS)}
    choice = max(coarse, key=lambda choice: coarse[choice].val)
    return best([coarse[choice], *(fitted(*choice, lr) for lr in others)])


def softmax_adapter(problem: Problem, *, learned_keys: bool) -> Method:
    """A linear adapter of the query by cross-entropy over all rows; learning rate and epochs are tuned."""

    def fitted(lr: float) -> Method:
        adapter = Adapter(problem.rows, learned_keys=learned_keys)
        return fit_adapter(problem, adapter, lambda batch: attention_loss(adapter(batch.queries), batch.targets), lr)

    return best(fitted(lr) for lr in RATES)


def reranked(problem: Problem, method: Method) -> Method:
    """NVF's residual reranker over a search's first rows; learning rate and epochs are tuned."""
    base, rows, k = method.score, problem.rows, min(CANDIDATES, len(problem.rows))
    assert isinstance(base, Search)
    beta = torch.tensor(base.beta)
    with torch.no_grad():
        found = [base(part.queries).topk(k) for part in blocks(problem.train, 1024)]
    logits, places = beta * torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])
    labels = are_targets(places, problem.train.targets)

    def fitted(lr: float) -> Method:
        torch.manual_seed(stream_seed(problem.seed, "adapters/reranker"))
        reranker = Reranker(rows.shape[1], kind="residual")

        def loss(part: Tensor) -> Tensor:
            return reranker_loss(
                reranker(problem.train.queries[part], rows[places[part]], logits[part], beta), labels[part]
            )

        def score(queries: Tensor) -> Tensor:
            scores = base(queries)
            top = scores.topk(k)
            order = reranker(queries, rows[top.indices], beta * top.values, beta).argsort(dim=-1, descending=True)
            return scores.scatter(-1, top.indices.gather(-1, order), top.values)  # the same scores, dealt anew

        network = [parameter for name, parameter in reranker.named_parameters() if name != "evidence"]
        groups = [{"params": network, "lr": lr}, {"params": [reranker.evidence], "lr": SCALAR_RATIO * lr}]
        valid = labels.any(dim=-1).nonzero().squeeze(-1)
        val, epochs = fit(reranker, groups, loss, valid, lambda: figures(score, problem.val), seed=problem.seed)
        return told(Method(score, val, f"lr {lr:g}, {epochs} epochs"))

    return best(fitted(lr) for lr in RERANKER_RATES)


def fit_adapter(
    problem: Problem,
    adapter: Adapter,
    loss: Callable[[QueryBatch], Tensor],
    lr: float,
    settings: str = "",
    *,
    batch_size: int | None = None,
) -> Method:
    """The search of an adapter that is fitted by a loss over batches of training queries."""
    val, epochs = fit(
        adapter,
        [{"params": list(adapter.parameters()), "lr": lr}],
        lambda places: loss(QueryBatch(*(part[places] for part in problem.train))),
        torch.arange(len(problem.train.queries)),
        lambda: figures(adapter.search(), problem.val),
        seed=problem.seed,
        batch_size=batch_size,
    )
    chosen = ", ".join(part for part in (settings, f"lr {lr:g}, {epochs} epochs") if part)
    return told(Method(adapter.search(), val, chosen))


def fit(
    model: nn.Module,
    groups: list[dict],
    loss: Callable[[Tensor], Tensor],
    places: Tensor,
    validate: Callable[[], Figures],
    *,
    seed: int,
    batch_size: int | None = None,
) -> tuple[Figures, int]:
    """Adam with early stopping; leaves the weights that validate best, and returns how well and after which epoch.

    Args:
        groups: the parameters with their learning rates.
        loss: of the training samples at some places.
        places: of all of them, (n,).
        batch_size: if None at most 256, and at least 8 batches an epoch unless they fall below 64, as in nvf.
    """
    optimizer, generator = torch.optim.Adam(groups), stream(seed, "adapters/order")
    size = batch_size or min(256, max(64, len(places) // 8))
    found, epochs, state = Figures(-1.0, -1.0), 0, model.state_dict()
    for epoch in range(EPOCHS + 1):
        model.train()
        for part in places[torch.randperm(len(places), generator=generator)].split(size) if epoch else ():
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()
        model.eval()
        if (score := validate()) > found:
            found, epochs, state = score, epoch, copy.deepcopy(model.state_dict())
        if epoch - epochs >= PATIENCE:
            break
    model.load_state_dict(state)
    return found, epochs


def best(methods: Iterable[Method]) -> Method:
    """The one that validates best; of equals, the first."""
    return max(methods, key=lambda method: method.val)


def told(method: Method) -> Method:
    """The method, after a line of progress."""
    print(f"  {100 * method.val.top1:5.1f} on validation: {method.chosen}", file=sys.stderr, flush=True)
    return method


def baselines(problem: Problem) -> Iterator[tuple[str, Method]]:
    """Every baseline under its name, exact search first, each as soon as it is tuned."""

    def timed(build: Callable[..., Method], *on: Method, **settings: bool) -> Method:
        started = time.perf_counter()
        method = build(problem, *on, **settings)
        return method._replace(seconds=time.perf_counter() - started + sum(other.seconds for other in on))

    exact = timed(exact_search)
    yield "exact search", exact
    yield "query-bank normalisation", timed(bank_normalised, exact)
    yield "linear adapter, triplet loss", timed(triplet_adapter)
    linear = timed(softmax_adapter, learned_keys=False)
    yield "linear adapter, full softmax", linear
    yield "documents moved to their queries", timed(moved_documents)
    keys = timed(softmax_adapter, learned_keys=True)
    yield "linear adapter + learned keys", keys
    yield "the same + query-bank normalisation", timed(bank_normalised, keys)
    yield "linear adapter + residual reranker", timed(reranked, linear)
