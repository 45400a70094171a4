"""One distribution over all rows from both stages, and a relaxation in which the choice of candidates is smooth too."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSEST = 1e-30  # log-attentions nearer than this count as this far apart, since the logarithm of a gap needs one


class Retrieval(NamedTuple):
    """A pipeline's distribution of each of B queries; all but the choice of the candidates is differentiable."""

    log_probs: Tensor  # (B, N), the logarithm of the distribution over all rows
    logits: Tensor  # (B, N), stage 1's
    candidates: Tensor  # (B, k) int64 rows, in stage 1's order
    scores: Tensor  # (B, k), the reranker's
    answer: Tensor | None  # (B, D), the soft-retrieved vector: the memory's rows, weighed by their probabilities

    @property
    def ranking(self) -> Tensor:
        """Scores, (B, N), that order the rows as `search` does: the candidates, then the rest by stage 1's logits."""
        log_probs = self.log_probs.gather(-1, self.candidates)
        candidates, log_probs = most_probable_first(self.candidates, log_probs)
        best = self.logits.amax(dim=-1, keepdim=True)
        places = torch.arange(candidates.shape[-1], 0, -1, device=best.device)
        above = best + (1 + best.abs()) * places  # different from each other, whatever the size of the logits
        return self.logits.scatter(-1, candidates, above.masked_fill(log_probs.isnan(), math.nan))


def joint(log_attention: Tensor, rows: Tensor, scores: Tensor, *, k: int, temperature: float | None) -> Tensor:
    """Return the log-probabilities of all rows, (B, N): `exact`, or `relaxed` where there is a temperature."""
    if temperature is None:
        return exact(log_attention, rows, scores)
    return relaxed(log_attention, rows, scores, k=k, temperature=temperature)


def shared_out(log_attention: Tensor, scores: Tensor) -> Tensor:
    """Return the candidates' log-probabilities, (B, k): their share in stage 1's total for them is softmax(scores)."""
    return log_attention.logsumexp(dim=-1, keepdim=True) + scores.log_softmax(dim=-1)


def exact(log_attention: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
    """Return the log-probabilities of all rows, (B, N): the candidates share their mass out, the others keep theirs.

    The candidates are rows with scores, (B, k); `log_attention` is (B, N), stage 1's. The gradient is exact but for the
    jumps where another row becomes a candidate.
    """
    return log_attention.scatter(-1, rows, shared_out(log_attention.gather(-1, rows), scores))


def relaxed(log_attention: Tensor, rows: Tensor, scores: Tensor, *, k: int, temperature: float) -> Tensor:
    """Return the average of `exact` over a random threshold of attention, above which rows are candidates, (B, N).

    The threshold's logarithm is logistic around the midpoint between the k-th and the next row's: row i is a candidate
    with the probability m_i = sigmoid((log a_i - midpoint) / temperature), and the first j rows are the candidates with
    the probability m_j - m_{j+1}. The average over j needs no sampling, sums to one, is continuous where rows change
    places, and tends to `exact` as the temperature, in units of the logits, tends to zero. `rows` are (B, w), w > k,
    best first, with scores (B, w); no other row is ever a candidate.
    """
    ours = log_attention.gather(-1, rows)  # (B, w)
    degree = (ours - ours[..., k - 1 : k + 1].mean(dim=-1, keepdim=True)) / temperature
    log_in, log_out = F.logsigmoid(degree), F.logsigmoid(-degree)
    # log(m_j - m_{j+1}) = log m_j + log(1 - m_{j+1}) + log(1 - exp(-(x_j - x_{j+1}))) for m = sigmoid(x)
    gaps = (degree[..., :-1] - degree[..., 1:]).clamp(min=CLOSEST)
    of_first = log_in[..., :-1] + log_out[..., 1:] + (-torch.expm1(-gaps)).log()
    of_first = torch.cat([of_first, log_in[..., -1:]], dim=-1)  # (B, w): the log-probability that the first j are in
    # Row i, where the first j >= i are in, has the share exp(s_i) of their total, and with it that of their mass.
    given_first = of_first + ours.logcumsumexp(dim=-1) - scores.logcumsumexp(dim=-1)
    inside = scores + given_first.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return log_attention.scatter(-1, rows, inside.logaddexp(log_out + ours))


def most_probable_first(candidates: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates and their log-probabilities, (B, k), the most probable first; of equals the smallest row."""
    rows, order = candidates.sort(dim=-1)
    best, order = log_probs.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return rows.gather(-1, order), best
