"""Queries of one embedding model over rows of another: a linear map for each, into a space where both are compared."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUFFERS = ("centre", "whitening", "mean", "map")


class Alignment(nn.Module):
    """Maps unit queries, (..., Dq), and unit rows, (..., D), to unit vectors that can be compared, (..., Dq).

    A query becomes normalize((q - centre) W), where W whitens the logged queries, and a row normalize((v - mean) M),
    where M is fitted by `fit`. Directions in which all queries are alike then count as much as the others. With a ridge
    towards whitened queries, M spans the canonical correlations (Hotelling, 1936) of rows and queries.

    The buffers are not part of checkpoints: like the memory's rows they are data.
    """

    centre: Tensor  # (Dq,)
    whitening: Tensor  # (Dq, Dq)
    mean: Tensor  # (D,)
    map: Tensor  # (D, Dq)

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        centre, whitening, mean, matrix = (buffers[name] for name in BUFFERS)
        fits = whitening.shape == (*centre.shape, *centre.shape) and matrix.shape == (*mean.shape, *centre.shape)
        sound = all(buffers[name].dtype == torch.float32 and buffers[name].isfinite().all() for name in BUFFERS)
        if not fits or not sound:
            raise ValueError("the maps of queries and of rows do not fit each other, or are no float32 numbers")
        for name in BUFFERS:
            self.register_buffer(name, buffers[name], persistent=False)

    @classmethod
    def whitening_of(cls, queries: Tensor, rows: Tensor, shrinkage: float) -> "Alignment":
        """Return the alignment that whitens queries as these, (n, Dq), and maps all rows, as these (N, D), to zero.

        So many times the mean variance is added to every direction's: a large shrinkage leaves queries as they are.
        """
        mean = sum(block.double().sum(dim=0) for block in rows.split(2**16)) / len(rows)
        wide = queries.double()
        centre = wide.mean(dim=0)
        variances, axes = torch.linalg.eigh((wide - centre).T @ (wide - centre) / len(wide))
        scales = (variances + shrinkage * variances.mean()).clamp(min=1e-12).rsqrt()
        buffers = {"centre": centre, "whitening": axes * scales @ axes.T, "mean": mean}
        nothing = wide.new_zeros(rows.shape[1], queries.shape[1])
        return cls(**{name: tensor.float() for name, tensor in buffers.items()}, map=nothing.float())

    @torch.no_grad()
    def fit(self, pairs: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float]) -> list[Tensor]:
        """Return the ridge maps, (D, Dq), from rows to queries as they are compared, one for each strength.

        Each of the pairs is (P, D) rows and (P, Dq) queries, or texts embedded by both models; each is centred by
        itself, so that it does not matter what sets its texts apart. A strength is relative to the mean eigenvalue.
        """
        parts = [(rows.double(), self.queries(queries).double()) for rows, queries in pairs]
        centred = [[part - part.mean(dim=0) for part in both] for both in parts]
        squares = sum(rows.T @ rows for rows, _ in centred)
        products = sum(rows.T @ queries for rows, queries in centred)
        assert isinstance(squares, Tensor)
        values, axes = torch.linalg.eigh(squares)
        turned, least = axes.T @ products, values.mean().clamp(min=1e-12)
        return [(axes @ (turned / (values + strength * least).unsqueeze(-1))).float() for strength in strengths]

    def with_map(self, fitted: Tensor) -> "Alignment":
        """Return an alignment that maps rows by another matrix, (D, Dq)."""
        return Alignment(**{**dict(self.named_buffers()), "map": fitted})

    def queries(self, queries: Tensor) -> Tensor:
        """Return queries as they are compared, (..., Dq)."""
        centre, whitening = self.centre.to(queries.dtype), self.whitening.to(queries.dtype)
        return F.normalize((queries - centre) @ whitening, dim=-1)

    def rows(self, rows: Tensor) -> Tensor:
        """Return rows as they are compared, (..., Dq), in float32 at least."""
        return F.normalize((rows - self.mean) @ self.map, dim=-1)
