"""Keys moved towards the logged queries that their rows answer, against a loop, and where a log says nothing."""

import pytest
import torch
import torch.nn.functional as F

from nvf.data.queries import QueryBatch
from nvf.evaluation.calibration import STRENGTHS, move_keys, quality
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory


def asked(rows: torch.Tensor, moves: torch.Tensor, count: int, seed: int, among: int) -> QueryBatch:
    """Queries for the first rows, each near its row moved by that row's own vector."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(among, (count, 1), generator=generator)
    noise = 0.1 * torch.randn(count, rows.shape[1], generator=generator)
    return QueryBatch(F.normalize(rows[targets[:, 0]] + moves[targets[:, 0]] + noise, dim=-1), targets)


def problem(size: float) -> tuple[SoftAttention, QueryBatch, QueryBatch]:
    """A stage 1 over 40 rows, a log of 30 of them, and held-out queries for all."""
    generator = torch.Generator().manual_seed(0)
    rows, moves = (torch.randn(40, 16, generator=generator) for _ in range(2))
    memory = VectorMemory(rows)
    moves = size * F.normalize(moves, dim=-1)
    log, held_out = asked(memory.rows, moves, 120, 1, 30), asked(memory.rows, moves, 300, 2, 40)
    return SoftAttention(memory, transform="identity", keys="moved"), log, held_out


def test_keys_that_help_are_moved_and_more_is_found() -> None:
    attention, log, held_out = problem(1.5)
    before = quality(attention, held_out).float().mean()
    strength = move_keys(attention, log, held_out)
    assert strength > 0
    assert quality(attention, held_out).float().mean() > before + 0.1
    assert torch.equal(attention.delta[30:], torch.zeros(10, 16))  # of rows that no logged query has
    assert attention.bias is None
    assert not attention.delta.requires_grad


def test_the_move_equals_a_loop() -> None:
    attention, log, held_out = problem(1.5)
    strength = move_keys(attention, log, held_out)
    mean = log.queries.mean(dim=0)
    for row in range(40):
        mine = [query - mean for query, target in zip(log.queries, log.targets[:, 0], strict=True) if target == row]
        expected = strength * sum(mine, torch.zeros(16)) / (len(mine) + 1)
        torch.testing.assert_close(attention.delta[row].detach(), expected)


def test_a_query_with_several_right_rows_moves_all_of_them_and_padding_moves_none() -> None:
    attention, log, held_out = problem(1.5)
    targets = torch.tensor([[3, 5], [4, -1]])
    move_keys(attention, QueryBatch(log.queries[:2], targets), held_out, strengths=(1.0,))
    assert attention.delta.abs().sum(dim=-1).nonzero().flatten().tolist() == [3, 4, 5]


def test_a_log_that_says_nothing_moves_no_key() -> None:
    attention, log, held_out = problem(0.0)
    shuffled = torch.randint(30, log.targets.shape, generator=torch.Generator().manual_seed(3))
    assert move_keys(attention, log._replace(targets=shuffled), held_out) == 0
    assert attention.delta is None
    assert attention.settings["keys"] == "frozen"


def test_rows_without_logged_queries_are_not_lost_for_the_others() -> None:
    attention, log, held_out = problem(1.5)
    new = held_out._replace(queries=held_out.queries.clone())
    unseen = held_out.targets[:, 0] >= 30
    rows = attention.memory.rows
    new.queries[unseen] = F.normalize(rows[held_out.targets[unseen, 0]] + 0.6 * log.queries[:1], dim=-1)
    found = {}
    for strength in STRENGTHS:
        attention = problem(1.5)[0]
        move_keys(attention, log, new, strengths=(strength,))
        found[strength] = float(quality(attention, new)[unseen].float().mean())
    chosen = move_keys(problem(1.5)[0], log, new)
    assert found[chosen] > found[0.0] - 0.1


@pytest.mark.parametrize("keys", ["moved", "learned"])
def test_moved_keys_are_saved_and_loaded_as_learned_ones(keys: str) -> None:
    attention = SoftAttention(VectorMemory(torch.eye(4)), transform="identity", keys=keys)
    assert attention.settings["keys"] == keys
    again = SoftAttention(attention.memory, **attention.settings)
    again.load_state_dict(attention.state_dict())
    assert again.delta.requires_grad == (keys == "learned")
