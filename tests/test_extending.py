"""The examples of docs/extending.md, as they stand there: each command trains with the classes above it."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import nvf.train
from conftest import SMALL, SMALL_STEPS, compose_config
from nvf import InputError
from nvf.files.records import sealed, write_record
from nvf.overrides import resumed_settings

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python -m nvf\.train (.+)$", PAGE, re.MULTILINE)
WORDS = [*SMALL, *SMALL_STEPS, "dashboards=none", "cache=off", "trainer.enable_progress_bar=false", "threads=1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with mine.py, from where the commands are typed."""
    code = "\n".join(re.findall(r"^```python\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL))
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_part_of_ones_own_is_trained_with(place: Path, command: str) -> None:
    words = [*WORDS, *shlex.split(command), "hydra.run.dir=run"]
    found = nvf.train.run(*words)
    assert found["test"]["pipeline"]["top1"]["value"] > 0
    if "Ours" in command:
        assert (place / "run/tables/attention/metrics.csv").is_file()
    if "Masked" in command:
        assert found["test"]["oracle"] is None
    if "Scaled" in command:
        assert found["selection"][0]["transform"] == "Scaled"
    if "Bilinear" in command:
        assert found["test"]["pipeline"]["top1"]["value"] >= found["test"]["attention"]["top1"]["value"]


def test_a_run_with_a_class_of_ones_own_is_resumed_if_that_is_named_again(place: Path) -> None:
    own = "reranker.model._target_=mine.Bilinear"
    found = nvf.train.run(*WORDS, own, "hydra.run.dir=run")
    (place / "run/results.json").unlink()
    with pytest.raises(InputError, match=r"mine\.Bilinear"):
        nvf.train.run("resume=run")
    assert nvf.train.run("resume=run", own)["test"] == found["test"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("queries.source._target_=mine.Nothing", "queries.source"),
        ("+queries.source.tails=2", "queries.source: .*tails"),
        ("+callbacks.mine._target_=os.nothing", "callbacks.mine"),
        ("+trainer.tails=2", "tails"),
        ("+optimizer.tails=2", "optimizer"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(place: Path, word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        nvf.train.run(*WORDS, word, "hydra.run.dir=run")
    assert not (place / "run").exists()


@pytest.mark.parametrize("target", ["torch.load", "nvf.runs.resume.shutil.rmtree", "mine.Bilinear"])
def test_a_record_has_nothing_built_that_conf_does_not_name(tmp_path: Path, target: str) -> None:
    config = compose_config("stage=attention", "cache=off")
    for allowed in (True, False):
        config["callbacks"]["other"] = {
            "_target_": "lightning.pytorch.callbacks.TQDMProgressBar" if allowed else target
        }
        write_record(tmp_path / "run.json", sealed({"config": config}))
        if allowed:
            assert resumed_settings(tmp_path, []) == config
        else:
            with pytest.raises(InputError, match=re.escape(target)):
                resumed_settings(tmp_path, [])
