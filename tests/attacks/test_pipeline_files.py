"""Files of pipelines and runs that are damaged, forged or no files: refused or read right, and nobody is let in."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_doors import CHECKPOINTS, DOORS, PIPELINE, UNHASHED, furnish, opened

from conftest import SMALL, SMALL_STEPS, compose_config
from nvf.errors import InputError
from nvf.files.tensors import check_archive, read_archive
from nvf.models.pipeline import Pipeline
from nvf.train import train
from programs import PATIENCE


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with every file that there is a door for."""

    def run(folder: Path, cache: Path) -> None:
        folder.mkdir()
        config = compose_config(*SMALL, *SMALL_STEPS, f"cache={cache}", "dashboards=none", "save_every=1")
        config["trainer"]["enable_progress_bar"] = False
        train(config, folder, started=0.0)

    place = tmp_path_factory.mktemp("furnished")
    furnish(place, run)
    return place


@pytest.fixture
def place(furnished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(furnished, tmp_path / "place", symlinks=True))


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test that hangs on a pipe would hang for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    yield
    signal.alarm(0)


class Evil:
    """What a pickle of it would do to whoever loads it."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


def saved(thing: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file, **how)
    return file.getvalue()


def evils(sentinel: Path) -> dict[str, bytes]:
    """Files that would make a folder if they could."""
    evil, array = Evil(sentinel), io.BytesIO()
    np.save(array, np.array([evil], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("answered.npy", array.getvalue())
    return {
        "pickle": pickle.dumps(evil),
        "old pickle": pickle.dumps(evil, protocol=0),
        "torch": saved({"nvf": {"stage": "attention"}, "state_dict": {"model.x": evil}}),
        "legacy torch": saved({"state_dict": evil}, _use_new_zipfile_serialization=False),
        "array": array.getvalue(),
        "arrays": archive.getvalue(),
    }


def test_every_door_opens_and_no_pickle_gets_through_it(place: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    for door in DOORS:
        assert not opened(place / door, door).startswith(("refused", "nothing", "fault")), door
        before = (place / door).read_bytes()
        for kind, data in evils(sentinel).items():
            (place / door).write_bytes(data)
            assert opened(place / door, door) in ("refused", "nothing"), (door, kind)
            assert not sentinel.exists(), (door, kind)
        (place / door).write_bytes(before)
    pickle.loads(evils(sentinel)["pickle"])
    assert sentinel.exists()  # they are as evil as they look


@pytest.mark.parametrize("hashes", ["plain", "forged"])
def test_damaged_copies(place: Path, hashes: str, attempts: Callable[[int, int], int]) -> None:
    count = attempts(10, 1000)
    program = [sys.executable, str(Path(__file__).with_name("pipeline_doors.py")), str(place), str(count), "0", hashes]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE + 2 * count, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    expected = {line["door"]: line["expected"] for line in lines if "expected" in line}
    found = [line for line in lines if "found" in line]
    assert len(found) == count * len(DOORS)
    right = {"refused", "nothing"}
    for line in found:
        assert not line["found"].startswith("fault"), line
        if hashes == "plain" and line["door"] not in UNHASHED:
            assert line["found"] in {*right, expected[line["door"]]}, line
    for door in DOORS:
        assert any(line["found"] in right for line in found if line["door"] == door), door


def make_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


NO_FILES: dict[str, Callable[[Path, Path], None]] = {
    "pipe": make_pipe,
    "folder": lambda path, _: path.mkdir(),
    "device": lambda path, _: path.symlink_to("/dev/zero"),
    "nowhere": lambda path, _: path.symlink_to("nowhere"),
    "itself": lambda path, _: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused(place: Path, tmp_path: Path, kind: str) -> None:
    for door in DOORS:
        kept = tmp_path / "kept"
        (place / door).rename(kept)
        NO_FILES[kind](place / door, kept)
        signal.alarm(PATIENCE)
        found = opened(place / door, door)
        signal.alarm(0)
        assert found in ("refused", "nothing", "False"), (door, found)
        (place / door).rmdir() if (place / door).is_dir() else (place / door).unlink()
        kept.rename(place / door)


def test_a_pipeline_has_its_files_in_its_folder(place: Path, tmp_path: Path) -> None:
    for name in PIPELINE:
        path, kept = place / "hnsw" / name, tmp_path / name
        path.rename(kept)
        path.symlink_to(kept)
        with pytest.raises(InputError, match="no regular file in its folder"):
            Pipeline.load(place / "hnsw")
        path.unlink()
        kept.rename(place / "hnsw" / f"own {name}")
        path.symlink_to(f"own {name}")  # inside
    (tmp_path / "link").symlink_to(place / "hnsw")
    assert Pipeline.load(tmp_path / "link").index is not None


def claims(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["nvf"]["settings"] |= {name: value}

    return change


def not_finite(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["model.attention.log_beta"].fill_(torch.inf)


def repeated(checkpoint: dict[str, Any]) -> None:
    name = next(name for name, tensor in checkpoint["state_dict"].items() if tensor.ndim == 2)
    checkpoint["state_dict"][name] = torch.zeros(1).expand(checkpoint["state_dict"][name].shape)


def sparse(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["model.attention.log_beta"] = torch.zeros(2, 2).to_sparse()


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "wide": (claims("hidden", 10**9), r"should be \(1000000000, 8\)"),
    "name": (claims("os", "system"), "is damaged .TypeError"),
    "settings": (lambda c: c["nvf"].update(settings=[1]), "is damaged"),
    "about": (lambda c: c.update(nvf=["stage"]), "not a checkpoint of NVF"),
    "stage": (lambda c: c["nvf"].update(stage=7), "not a checkpoint of NVF"),
    "weights": (lambda c: c.update(state_dict=3), "not a checkpoint of NVF"),
    "weight": (lambda c: c["state_dict"].update({"model.attention.log_beta": 3}), "is no plain tensor"),
    "infinite": (not_finite, "has NaN or infinite values"),
    "repeated": (repeated, "is no plain tensor"),
    "sparse": (sparse, "its pickle names 'torch._utils _rebuild_sparse_tensor'"),
    "whole": (lambda c: c["state_dict"].update({"model.attention.log_beta": torch.tensor(3)}), "torch.int64, but"),
}


@pytest.mark.parametrize(("change", "message"), CLAIMS.values(), ids=CLAIMS)
def test_a_checkpoint_takes_no_more_than_it_has(
    place: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = place / CHECKPOINTS / "reranker/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=message):
        DOORS[f"{CHECKPOINTS}/reranker/best.ckpt"](path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip again, each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_archives_that_claim_more_than_they_have(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"

    def save() -> None:
        torch.save(OrderedDict(weight=torch.arange(251.0)), path)

    save()
    assert torch.equal(read_archive(path)["weight"], torch.arange(251.0))
    rewritten(path, lambda name, data: data + bytes(2**27) * name.endswith("data/0"), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match="compressed or encrypted records"):
        check_archive(path)
    save()
    rewritten(path, lambda _, data: data.replace(b"K\xfb", b"J\x00\x00\x00\x40"))  # 251 numbers: 2**30
    with pytest.raises(RuntimeError, match=r"resize|out of bounds|storage"):
        read_archive(path)
    save()
    rewritten(path, lambda _, data: data.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n"))
    with pytest.raises(ValueError, match="names 'builtins bytearray'"):
        check_archive(path)
    save()
    data = bytearray(path.read_bytes())
    data[data.index(np.arange(251, dtype=np.float32).tobytes()) + 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"'bomb/data/0' is damaged"):
        check_archive(path)


def test_an_array_that_claims_more_than_it_has(place: Path) -> None:
    path = place / "run/answered.npy"
    path.write_bytes(path.read_bytes().replace(b"(300,)", b"(9" + b"0" * 14 + b",)", 1))
    assert opened(path, "run/answered.npy") == "nothing"
