"""Vectors as callers name them, by id, by number or by a mask: those that may answer a query, or its candidates."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.files.ids import shown
from nvf.models.memory import VectorMemory
from nvf.ops.products import QUERY_BLOCK

MASKED_AT_ONCE = 2**26  # values of different queries' masks that are held at once; 256 MB where equal rows are merged


class Filter:
    """Which of a memory's V vectors are given for each of n queries, or for all, in a form that `search` takes.

    Another form or length, what names no vector, and a query for which nothing is given raise an InputError.
    """

    def __init__(self, memory: VectorMemory, given: Any, queries: int, name: str = "allowed") -> None:
        if not _is_list(given):
            raise InputError(f"{name} is {shown(given)}; give a list of ids, or else of rows, or a mask")
        plain = _plain(given)
        self.memory, self.nested = memory, all(map(_is_list, plain)) and (len(plain) > 0 or queries == 0)
        self.each: Any = plain if self.nested else [plain]  # a list or mask for each query, or one for all
        if self.nested and len(plain) != queries:
            raise InputError(f"{name}: {len(plain)} lists or masks for {queries} queries; give each query one")
        if not isinstance(plain, np.ndarray):
            self.each = self._numbers(name)
        elif plain.ndim > 2 or plain.shape[-1] != memory.given:
            raise InputError(f"{name}: a mask {plain.shape} for {memory.given} vectors; give each vector a value")
        sizes = [int(some.sum()) if some.dtype == bool else len(some) for some in self.each]
        if queries and 0 in sizes:
            raise InputError(f"{name}: nothing is given for query {sizes.index(0)}; give each at least one vector")
        self.width = max(sizes, default=0)
        self.size = QUERY_BLOCK if len(self.each) == 1 else min(QUERY_BLOCK, 1 + MASKED_AT_ONCE // memory.given)

    def _numbers(self, name: str) -> list[np.ndarray]:
        """Return the vectors' numbers, as given, from lists of ids, or of these numbers where the memory has no ids."""
        ids = self.memory.ids
        places: Any = range(self.memory.given) if ids is None else self.memory.number_of_id
        remedy = f"give rows below {len(places)}" if ids is None else f"give ids, such as {shown(next(iter(places)))}"
        pads = -1 not in places
        numbers: list[list[int]] = []
        for query, some in enumerate(self.each):
            numbers.append([])
            for value in _plain(some) if _is_list(some) else [[some]]:
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                if value is None or (pads and whole and value == -1):
                    continue
                if not ((whole or isinstance(value, str)) and value in places):
                    raise InputError(f"{name}: query {query} has {shown(value)}, which names no vector; {remedy}")
                numbers[-1].append(places[value])
        return [np.array(some, np.int64) for some in numbers]

    def candidates(self) -> "Filter":
        """Return itself if each query has its own list, without any vector twice; else raise an InputError."""
        for query, some in enumerate(self.each):
            if not self.nested or some.dtype == bool or len(np.unique(some)) < len(some):
                raise InputError(f"candidates: query {query} has no list of different ids of its own; give it one")
        return self

    def of(self, block: slice) -> tuple[Tensor, Tensor | None]:
        """Return which rows are given for a block of queries, (b, N) bool, with b = 1 if these are for all queries.

        Where equal vectors are merged, the number of the first given vector of each row, (b, N), comes with it.
        """
        each, row = self.each if len(self.each) == 1 else self.each[block], self.memory.row_of_vector
        array = np.zeros((len(each), self.memory.given), bool)
        for query, some in enumerate(each):
            array[query, some] = True
        mask = torch.from_numpy(array).to(self.memory.rows.device)
        if row is None:
            return mask, None
        none = torch.full((len(mask), len(self.memory)), mask.shape[1], dtype=torch.int32, device=mask.device)
        numbers = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device).where(mask, mask.shape[1])
        first = none.scatter_reduce(1, row.expand_as(mask), numbers, "amin")
        return first < mask.shape[1], first


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _plain(some: Any) -> Any:
    """Return a mask as an array of bool, and anything else as a list."""
    some = some.cpu().numpy() if isinstance(some, Tensor) else some
    if isinstance(some, np.ndarray) and some.dtype == bool:
        return some
    values = some.tolist() if isinstance(some, np.ndarray) else [*some]
    return np.array(values) if values and all(isinstance(value, bool | np.bool_) for value in values) else values
