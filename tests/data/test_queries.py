"""Each source makes what it says, and its oracle is the best that anyone can do."""

import pytest
import torch
import torch.nn.functional as F

from nvf.data.queries import Nearest, Noisy, QuerySource, Warped
from nvf.errors import InputError
from nvf.models.memory import VectorMemory
from nvf.ops.random_streams import stream

SOURCES = {
    "nearest": Nearest,
    "noisy": lambda memory: Noisy(memory, sigma=0.2),
    "rotation": lambda memory: Warped(memory, sigma=0.2, warp="rotation", warp_seed=0),
    "mlp": lambda memory: Warped(memory, sigma=0.2, warp="mlp", warp_seed=0),
}


@pytest.fixture(scope="module")
def large() -> VectorMemory:
    """The memory of the default run."""
    return VectorMemory.synthetic(rows=1000, dim=128, seed=0)


def oracle_top1(source: QuerySource, count: int = 4000) -> float:
    queries, targets, *_ = source.sample(count, stream(0, "test"))
    return float(((queries @ source.oracle.T).argmax(dim=-1) == targets[:, 0]).float().mean())


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_queries_are_unit_and_repeat_with_their_generator(make, memory: VectorMemory) -> None:
    source = make(memory)
    queries, targets, *_ = source.sample(50, stream(1, "train", 2, 3))
    again = source.sample(50, stream(1, "train", 2, 3))
    other = source.sample(50, stream(1, "train", 2, 4))
    torch.testing.assert_close(queries.norm(dim=-1), torch.ones(50))
    assert targets.shape == (50, 1)
    assert torch.equal(queries, again.queries)
    assert torch.equal(targets, again.targets)
    assert not torch.equal(queries, other.queries)


def test_nearest_targets_are_the_closest_rows(memory: VectorMemory) -> None:
    queries, targets, *_ = Nearest(memory).sample(100, stream(0, "test"))
    distances = torch.cdist(queries, memory.rows)
    assert torch.equal(distances.argmin(dim=-1), targets[:, 0])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("nearest", 1.0, 1.0), ("noisy", 0.93, 0.95), ("rotation", 0.92, 0.95), ("mlp", 0.91, 0.94)],
)
def test_oracles_reach_the_known_ceilings(large: VectorMemory, name: str, low: float, high: float) -> None:
    assert low <= oracle_top1(SOURCES[name](large)) <= high


@pytest.mark.parametrize("name", ["rotation", "mlp"])
def test_a_warp_hides_the_rows_from_exact_search(large: VectorMemory, name: str) -> None:
    queries, targets, *_ = SOURCES[name](large).sample(4000, stream(0, "test"))
    assert float((large.search(queries, 1).rows == targets).float().mean()) < 0.01


def test_a_rotation_keeps_angles(memory: VectorMemory) -> None:
    warped = Warped(memory, sigma=0.0, warp="rotation", warp_seed=3).oracle
    torch.testing.assert_close(warped @ warped.T, memory.rows @ memory.rows.T)


def test_the_hidden_map_depends_on_its_seed_alone(memory: VectorMemory) -> None:
    def warp(warp_seed: int, seed: int) -> torch.Tensor:
        memory = VectorMemory(torch.eye(8))  # the map's own rows
        Warped(memory, sigma=0.1, warp="rotation", warp_seed=warp_seed).sample(seed + 1, stream(seed, "train"))
        return Warped(memory, sigma=0.1, warp="rotation", warp_seed=warp_seed).oracle

    assert torch.equal(warp(0, 0), warp(0, 1))
    assert not torch.equal(warp(0, 0), warp(1, 0))


def test_a_map_and_a_memory_of_one_seed_share_no_numbers() -> None:
    memory = VectorMemory.synthetic(rows=64, dim=64, seed=5)
    rotation = Warped(VectorMemory(torch.eye(64)), sigma=0.0, warp="rotation", warp_seed=5).oracle
    assert (memory.rows @ rotation.T).abs().max() < 0.7  # QR of the memory itself would give 1


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), "wide"])
def test_sigma_is_checked(memory: VectorMemory, sigma: float) -> None:
    with pytest.raises(InputError, match=f"queries.sigma={sigma} is not a number of at least 0"):
        Noisy(memory, sigma=sigma)


def test_an_unknown_warp_is_refused(memory: VectorMemory) -> None:
    with pytest.raises(InputError, match=r"queries.warp=bend is unknown; choose one of rotation, mlp"):
        Warped(memory, sigma=0.1, warp="bend", warp_seed=0)


@pytest.mark.parametrize("warp", ["rotation", "mlp"])
@pytest.mark.parametrize("dim", [5, 8, 12])
def test_queries_may_have_another_width_and_keep_their_oracle(warp: str, dim: int) -> None:
    memory = VectorMemory.synthetic(rows=60, dim=8, seed=0)
    given = {"sigma": 0.02, "warp": warp, "warp_seed": 0}
    source = Warped(memory, dim=dim, **given)
    queries = source.sample(300, stream(0, "test")).queries
    assert queries.shape == (300, dim)
    assert source.foreign == (dim != 8)
    torch.testing.assert_close(source.oracle.norm(dim=-1), torch.ones(60))
    assert oracle_top1(source) > 0.9
    if warp == "rotation" and dim == 12:  # of rows padded with zeros
        torch.testing.assert_close(source.oracle @ source.oracle.T, memory.rows @ memory.rows.T)
    plain = Warped(memory, **given)
    if dim == 8:  # the same bits
        assert torch.equal(plain.oracle, source.oracle)
        assert torch.equal(plain.sample(300, stream(0, "test")).queries, queries)
        generator = stream(0, "warp")
        shapes = ((8, 8),) if warp == "rotation" else ((8, 32), (32, 8))
        layers = [torch.randn(*shape, generator=generator) for shape in shapes]
        if warp == "rotation":
            q, r = torch.linalg.qr(layers[0])
            expected = memory.rows @ (q * r.diagonal().sign())
        else:
            expected = torch.tanh(memory.rows @ layers[0]) @ layers[1]
        assert torch.equal(F.normalize(expected, dim=-1), plain.oracle)


@pytest.mark.parametrize("dim", [0, -1, 2.5, "wide", True])
def test_the_width_of_queries_is_checked(memory: VectorMemory, dim: object) -> None:
    with pytest.raises(InputError, match=f"queries.dim={dim}"):
        Warped(memory, sigma=0.1, warp="rotation", warp_seed=0, dim=dim)
