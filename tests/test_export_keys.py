"""Files of keys: all keys in order, with their ids, in every format; what fails leaves what was there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nvf.export import ENDINGS, write_keys
from nvf.files.ids import checked_ids

KEYS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
IDS = {
    "strings": ["b", "a", "ü", ""],
    "integers": [7, -3, 0, 2**62],
    "without a sign": [2**64 - 1, 0, 2**63, 5],
    "none": None,
}


def read(path: Path) -> tuple[np.ndarray, list[Any] | None]:
    """The keys and ids that files hold, by readers other than ours."""
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        assert table.column_names == ["id", "vector"]
        return np.array(table["vector"].to_pylist()), table["id"].to_pylist()
    beside = path.with_name(f"{path.stem}.ids.json")
    keys = np.load(path) if path.suffix == ".npy" else load_file(path)["keys"].float().numpy()
    return keys, json.loads(beside.read_text()) if beside.exists() else None


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_and_ids_can_be_read_again(tmp_path: Path, ending: str, ids: list[Any] | None, dtype: torch.dtype) -> None:
    keys = KEYS.to(dtype)
    write_keys(tmp_path / f"keys{ending}", keys, None if ids is None else checked_ids(ids, 4, "test"))
    found, names = read(tmp_path / f"keys{ending}")
    assert np.array_equal(found.astype(np.float32), keys.float().numpy())
    assert names == (list(range(4)) if ids is None and ending == ".parquet" else ids)
    beside = {"keys.ids.json"} if ids is not None and ending != ".parquet" else set()
    assert {path.name for path in tmp_path.iterdir()} == {f"keys{ending}", *beside}


@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_ids_of_earlier_keys_do_not_stay(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"keys{ending}"
    write_keys(path, KEYS, np.arange(4))
    write_keys(path, 2 * KEYS, np.arange(4, 8))
    assert read(path)[1] == [4, 5, 6, 7]
    write_keys(path, 3 * KEYS, None)
    found, ids = read(path)
    assert np.array_equal(found, 3 * KEYS.numpy())
    assert ids is None


def test_keys_are_not_replaced_without_their_ids(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.npy", KEYS, None)
    (tmp_path / "keys.ids.json").mkdir()
    with pytest.raises(OSError, match=r"keys\.ids\.json"):
        write_keys(tmp_path / "keys.npy", 2 * KEYS, np.arange(4))
    assert np.array_equal(np.load(tmp_path / "keys.npy"), KEYS.numpy())
    assert {path.name for path in tmp_path.iterdir()} == {"keys.npy", "keys.ids.json"}
