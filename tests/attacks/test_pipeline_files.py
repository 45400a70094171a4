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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_doors import CHECKPOINTS, DOORS, PIPELINE, UNHASHED, furnish, opened
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import SMALL, SMALL_STEPS, compose_config
from nvf.errors import InputError
from nvf.files.records import sealed
from nvf.models.pipeline import Pipeline
from nvf.train import train
from nvf.training.build import build
from nvf.training.checkpoints import hashed
from nvf.training.select import fit_attention
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


@pytest.mark.slow
@pytest.mark.parametrize("hashes", ["plain", "forged"])
def test_damaged_copies(place: Path, hashes: str, attempts: Callable[[int, int], int]) -> None:
    count = attempts(6, 1000)  # at each of some thirty doors
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


Weights, About = dict[str, torch.Tensor], dict[str, Any]


def claims(**settings: Any) -> Callable[[Weights, About], None]:
    return lambda _, about: about["settings"].update(settings)


def weighs(value: torch.Tensor) -> Callable[[Weights, About], None]:
    return lambda weights, _: weights.update({"attention.log_beta": value})


CLAIMS: dict[str, tuple[Callable[[Weights, About], Any], str]] = {
    "wide": (claims(hidden=10**9), r"should be \(1000000000, 8\)"),
    "name": (claims(os="system"), "is damaged .TypeError"),
    "settings": (lambda _, about: about.update(settings=[1]), "is damaged"),
    "stage": (lambda _, about: about.update(stage=7), "not a checkpoint of NVF"),
    "deep": (claims(hidden=json.loads("[" * 40 + "]" * 40)), "is damaged .InputError: attention.hidden"),
    "infinite": (weighs(torch.tensor(torch.inf)), "has NaN or infinite values"),
    "whole": (weighs(torch.tensor(3)), "torch.int64, but"),
    "shape": (weighs(torch.zeros(2)), "but should be"),
    "missing": (lambda weights, _: weights.pop("attention.log_beta"), "is missing or unknown"),
}


@pytest.mark.parametrize(("change", "message"), CLAIMS.values(), ids=CLAIMS)
def test_a_checkpoint_takes_no_more_than_it_has(
    place: Path, change: Callable[[Weights, About], Any], message: str
) -> None:
    door = f"{CHECKPOINTS}/reranker/best.safetensors"
    weights = load_file(place / door)
    with safe_open(place / door, "pt") as file:
        about = json.loads(file.metadata()["nvf"])
    change(weights, about)
    about = sealed({name: value for name, value in about.items() if name != "digest"} | {"weights": hashed(weights)})
    save_file(weights, place / door, {"nvf": json.dumps(about)})
    with pytest.raises(InputError, match=message):
        DOORS[door](place / door)


def test_a_last_checkpoint_runs_no_code(place: Path, tmp_path: Path) -> None:
    folder, sentinel = place / CHECKPOINTS / "attention", tmp_path / "sentinel"
    for kind in ("torch", "legacy torch"):
        (folder / "last.ckpt").write_bytes(evils(sentinel)[kind])
        config = compose_config(*SMALL, *SMALL_STEPS, "dashboards=none", "cache=off", "stage=attention")
        with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
            fit_attention(build(config), place / "run")
        assert not sentinel.exists()


def test_an_array_that_claims_more_than_it_has(place: Path) -> None:
    path = place / "run/answered.npy"
    path.write_bytes(path.read_bytes().replace(b"(300,)", b"(9" + b"0" * 14 + b",)", 1))
    assert opened(path, "run/answered.npy") == "nothing"
