"""The memory's rows are unit and frozen, wherever and in whatever type they are kept."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nvf.errors import InputError
from nvf.models.memory import DTYPES, VectorMemory, unit
from nvf.models.queries_and_keys import neighbours
from nvf.ops.products import QUERY_BLOCK


def test_search_takes_more_queries_than_a_block(memory: VectorMemory) -> None:
    queries = torch.randn(2 * QUERY_BLOCK + 3, memory.dim)
    found = memory.search(3 * queries, k=2)  # the length of a query does not matter
    cosine = torch.cosine_similarity(queries.unsqueeze(1), memory.rows, dim=-1)
    torch.testing.assert_close(found.scores, cosine.topk(2).values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_rows_are_unit_whatever_is_given(dtype: torch.dtype, length: float) -> None:
    vectors = (length * torch.rand(5, 3) + length).to(dtype)
    rows = VectorMemory(vectors).rows
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(rows, torch.nn.functional.normalize(vectors.double(), dim=-1).float())


def test_lengths_at_the_ends_of_the_float_range() -> None:
    vectors = torch.tensor([[3e-300, 4e-300], [3e300, 4e300], [3e-38, 4e-38]], dtype=torch.float64)
    torch.testing.assert_close(unit(vectors), torch.tensor([[0.6, 0.8]] * 3))


@pytest.mark.parametrize("place", [[0, 1, 3], [0, 1], [0, 0, 1], [-1, 0, 1, 2], [0.0, 1.0, 2.0], [[0, 1, 2]]])
def test_a_memory_is_not_restored_with_vectors_that_are_not_its_rows(place: list[int]) -> None:
    with pytest.raises(InputError, match="memory: the rows of its vectors are not its 3 rows"):
        VectorMemory.restore(torch.eye(3), "sha256:0", row_of_vector=torch.tensor(place))
    kept = VectorMemory.restore(torch.eye(3), "sha256:0", np.arange(5), torch.tensor([0, 1, 0, 2, 1]))
    assert kept.vectors_of(torch.arange(3)).tolist() == [0, 1, 3]


def test_rows_stay_out_of_checkpoints_and_gradients(memory: VectorMemory) -> None:
    assert memory.state_dict() == {}
    assert list(memory.parameters()) == []
    assert not memory.rows.requires_grad


def test_fingerprint_is_the_content(memory: VectorMemory) -> None:
    again = VectorMemory.synthetic(rows=30, dim=8, seed=0)
    other = VectorMemory.synthetic(rows=30, dim=8, seed=1)
    assert memory.fingerprint == again.fingerprint != other.fingerprint
    assert memory.fingerprint.startswith("sha256:")
    flat = torch.arange(1.0, 13.0)
    assert VectorMemory(flat.view(3, 4)).fingerprint != VectorMemory(flat.view(4, 3)).fingerprint


def test_ids_are_no_part_of_the_fingerprint() -> None:
    vectors = torch.eye(3)
    plain, named = VectorMemory(vectors), VectorMemory(vectors, ids=np.array(["a", "b", "c"]))
    assert plain.ids is None
    assert named.ids is not None
    assert named.ids.tolist() == ["a", "b", "c"]
    assert plain.fingerprint == named.fingerprint


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(2), "memory: 2 ids for 3 rows; give each row"),
        (np.array(4), "memory: 1 ids for 3 rows"),
        (np.eye(3), r"row 0 has the id \[1.0, 0.0, 0.0\], which is not an integer or a string"),
        (np.array([1.0, 2.0, 3.0]), "row 0 has the id 1.0, which is not an integer or a string"),
        (np.array([1, "b", 3], dtype=object), "row 1 has the id 'b', which is not"),
        (np.array([0, 1, True], dtype=object), "row 2 has the id True"),
        (np.array(["a", "b", "a"]), "row 2 has the id 'a' of row 0; give each row an integer or a string of its own"),
        (np.array([0, 1, 2**64], dtype=object), "do not fit into 64 bits"),
    ],
)
def test_bad_ids_are_refused(ids: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorMemory(torch.eye(3), ids=ids)


def test_a_bad_row_is_named_by_its_id_too() -> None:
    with pytest.raises(InputError, match=r"memory: row 1 \(id b\) is zero"):
        VectorMemory(torch.tensor([[1.0], [0.0]]), ids=np.array(["a", "b"]))


def test_clusters_hold_their_rows_together() -> None:
    rows = VectorMemory.clustered(clusters=20, rows_per_cluster=5, dim=64, sigma=0.05, seed=0).rows
    same = torch.arange(100) // 5
    nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(dim=-1)
    assert torch.equal(same[nearest], same)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0], [0.0]]), "row 1 is zero"),
        (torch.tensor([[1.0], [1.0], [float("nan")]]), "row 2 holds NaN"),
        (torch.tensor([[float("inf")], [1.0]]), "row 0 holds NaN or infinite"),
    ],
)
def test_bad_vectors_are_refused(vectors: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorMemory(vectors)


@pytest.mark.parametrize(
    ("k", "message"), [(31, "k=31 exceeds the memory's 30 rows; lower k"), (0, "k=0"), (-1, "k=-1")]
)
def test_k_is_checked(memory: VectorMemory, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        memory.search(torch.ones(1, 8), k)


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match=r"data.rows=0 is not a whole number of at least 1"):
        VectorMemory.synthetic(rows=0, dim=8, seed=0)
    with pytest.raises(InputError, match=r"data.sigma=-0.1"):
        VectorMemory.clustered(clusters=1, rows_per_cluster=1, dim=1, sigma=-0.1, seed=0)
    with pytest.raises(InputError, match=r"data.sigma=nan"):
        VectorMemory.clustered(clusters=1, rows_per_cluster=1, dim=1, sigma=np.nan, seed=0)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_kept_as_asked(dtype: str, mapped: bool, tmp_path: Path) -> None:
    vectors = 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "rows" if mapped else None
    memory = VectorMemory(vectors, dtype=dtype, mapped=folder)
    assert torch.equal(memory.rows, unit(vectors).to(DTYPES[dtype]))
    assert memory.fingerprint == VectorMemory(vectors).fingerprint
    assert torch.equal(memory.take(torch.tensor([[3, 3]])), memory.rows[[3, 3]].float().unsqueeze(0))
    asked = torch.randn(9, 8)
    found = memory.search(asked, 3)
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores, (unit(asked) @ memory.rows.float().T).topk(3).values)


def test_mapped_rows_are_written_once(tmp_path: Path) -> None:
    vectors = torch.randn(50, 8)
    first = VectorMemory(vectors, mapped=tmp_path)
    (file,) = tmp_path.glob("*.rows")
    assert not [*tmp_path.glob("*partial*")]
    assert file.stat().st_size == 4 * vectors.numel()
    assert not file.stat().st_mode & 0o222  # nobody writes to it by mistake
    written = file.stat().st_mtime_ns
    assert torch.equal(VectorMemory(vectors, mapped=tmp_path).rows, first.rows)
    assert file.stat().st_mtime_ns == written
    VectorMemory(vectors + 1, mapped=tmp_path)
    VectorMemory(vectors, dtype="float16", mapped=tmp_path)
    assert len([*tmp_path.glob("*.rows")]) == 3


@pytest.mark.parametrize("of", ["rows", "sha256"])
@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_mapped_rows_that_are_not_what_was_written_are_written_anew(tmp_path: Path, of: str, damage: str) -> None:
    vectors = torch.randn(50, 8)
    VectorMemory(vectors, mapped=tmp_path)
    (file,) = tmp_path.glob(f"*.{of}")
    content = file.read_bytes()
    file.unlink()
    if damage != "removed":
        file.write_bytes(content[:-1] if damage == "cut" else content[:5] + bytes([content[5] ^ 1]) + content[6:])
    memory = VectorMemory(vectors, mapped=tmp_path)
    assert torch.equal(memory.rows, unit(vectors))
    assert file.read_bytes() == content
    memory.check_unchanged()


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_mapped_rows_that_change_are_noticed(tmp_path: Path, change: str) -> None:
    vectors = torch.randn(50, 8)
    VectorMemory(vectors).check_unchanged()
    memory = VectorMemory(vectors, mapped=tmp_path)
    memory.check_unchanged()
    (file,) = tmp_path.glob("*.rows")
    content = file.read_bytes()
    if change == "written":
        file.chmod(0o644)
        os.utime(file, ns=(0, 0))
    else:
        file.unlink()
    if change == "replaced":
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"\.rows was changed or removed while its rows were used; start again"):
        memory.check_unchanged()


def test_a_restored_memory_has_the_rows_to_the_last_bit() -> None:
    rows = unit(torch.randn(5, 3)) * 1.0000001
    assert VectorMemory.restore(rows, "sha256:0").rows is rows
    with pytest.raises(InputError, match="row 1 is zero"):
        VectorMemory.restore(torch.tensor([[1.0], [0.0]]), "sha256:0")


def test_bad_ways_to_keep_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.dtype=int8 is unknown; choose one of float32, float16, bfloat16"):
        VectorMemory(torch.ones(2, 2), dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data.mapped=.*file cannot hold the rows"):
        VectorMemory(torch.ones(2, 2), mapped=tmp_path / "file")


def test_neighbours_equal_a_loop_and_are_never_the_row_itself() -> None:
    keys = unit(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    keys[10:17] = keys[10]  # more equal rows than neighbours
    found = neighbours(keys, 3)
    for row, others in enumerate(found.tolist()):
        scores = keys @ keys[row]
        assert row not in others
        assert len(set(others)) == 3
        expected = scores[[other for other in range(40) if other != row]].topk(3).values
        torch.testing.assert_close(scores[others], expected)
