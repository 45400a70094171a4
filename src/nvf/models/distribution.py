"""One distribution over all rows from two stages; and a relaxation, in which the choice of candidates is smooth too.

Both take stage 1's log-probabilities `log_attention`, (B, N), the `rows` that were reranked, and their `scores`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSEST = 1e-30  # attentions nearer than this count as this far apart: the logarithm of a gap needs one


def shared_out(log_attention: Tensor, scores: Tensor) -> Tensor:
    """The candidates' log-probabilities, (B, k): stage 1's total for them, shared out by softmax(scores)."""
    return log_attention.logsumexp(dim=-1, keepdim=True) + scores.log_softmax(dim=-1)


def exact(log_attention: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
    """The log-probabilities of all rows, (B, N): the candidates share their mass out, the others keep theirs.

    Which rows are candidates is piecewise constant in every weight: the gradient is exact between the places where the
    candidates change, and blind to the jumps there.

    Args:
        log_attention: (B, N).
        rows: (B, k), the candidates.
        scores: (B, k).
    """
    inside = shared_out(log_attention.gather(-1, rows), scores)
    return log_attention.scatter(-1, rows, inside)


def relaxed(log_attention: Tensor, rows: Tensor, scores: Tensor, *, k: int, temperature: float) -> Tensor:
    """The same where the candidates are the rows above a random threshold, averaged over the threshold.

    Its logarithm is logistic around the midpoint between the k-th and the next row's, so that row i is a candidate
    with the probability m_i = sigmoid((log a_i - midpoint) / temperature), and the first j rows are the candidates with
    the probability m_j - m_{j+1}. The average of `exact` over j needs no sampling, sums to one, is continuous where
    rows change places, and tends to `exact` as the temperature tends to zero. Rows outside feel the reranker.

    Args:
        log_attention: (B, N).
        rows: (B, w), more than k, in descending order of attention; there are never more candidates than these.
        scores: (B, w).
        k: the number of candidates.
        temperature: above 0, in units of the logits.
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
