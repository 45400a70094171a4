"""From words, name=value, to settings: texts stay as they were typed, and resume=folder brings a run's own words."""

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvf.console import follows
from nvf.errors import InputError, check_place
from nvf.runs import sweep as sweeps
from nvf.runs.resume import RECORD, recorded, requeued
from nvf.runs.signals import restarted

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf"  # in a wheel, or in the repository
PATHS = ("data.dir", "data.mapped", "data.path", "cache", "attention_checkpoint", "reranker_checkpoint")
PLACES = ("resume", "hydra.run.dir", "hydra.sweep.dir")
COLUMNS = tuple(f"data.columns.{role}" for role in ("id", "vector", "targets", "time", "text", "gains"))
TEXTS = (*PATHS, *PLACES, *COLUMNS, "data.url", "data.collection", "data.vector", "data.text", "hydra.sweep.subdir")
PARTS = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\\.|[^,])+""")  # between the commas of a sweep
MEANT = re.compile(r"""$|null$|false$|['"]|.*\$\{|(choice|glob|shuffle|sort|tag)\(""", re.DOTALL)  # is Hydra's to read
# What is built from a `_target_` takes arguments that conf/ does not list.
FREE = re.compile(
    r"(trainer|hydra|optimizer|callbacks|logger|data\.memory|queries\.source|(attention|reranker)\.model)\."
)
COMPOSING = threading.Lock()  # Hydra composes in one thread at a time


def words_of(words: Sequence[str]) -> list[str]:
    """Return the words of the command line as Hydra gets them, or raise an InputError that says what is wrong."""
    place = _value(words, "hydra.run.dir") or _value(words, "hydra.sweep.dir")
    several = any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)
    if any(word.startswith("-") and word not in ("-m", "--multirun") for word in words) or follows():
        return spelled(words)  # Hydra is asked for something else, or the first process has done what follows
    if resume := _value(words, "resume"):
        return resumed(resume, spelled(words))
    if restarted() and not several and (folder := requeued(place)) is not None:
        return resumed(str(folder), [])
    check_place(Path(place) if place and "${" not in place else Path("outputs"))
    return spelled(words)


def composed(words: Sequence[str]) -> tuple[dict[str, Any], Path, bool]:
    """Return the settings that the words of `nvf.train.run` choose, the run's folder, and whether it is resumed."""
    resume = _value(words, "resume")
    words = resumed(resume, spelled(words)) if resume else spelled(words)
    sweep = InputError("a sweep is for the command line, python -m nvf.train; run makes one run")
    if "--multirun" in words:
        raise sweep
    try:
        with COMPOSING, initialize_config_dir(str(CONF), job_name="train", version_base="1.3"):
            cfg = compose("config", words, return_hydra_config=True)
        own = OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name != "hydra"])
        folder, config = Path(cfg.hydra.run.dir).absolute(), settled(own)
    except (HydraException, OmegaConfBaseException) as fault:
        raise InputError(" ".join(str(fault).split())) from None
    if cfg.hydra.mode is RunMode.MULTIRUN:
        raise sweep
    if resume:
        return resumed_settings(folder, words), folder, True
    sweeps.refuse_local_ddp(config)
    check_place(folder)
    return config, folder, False


def spelled(words: Sequence[str]) -> list[str]:
    """Return the words with every text quoted, for Hydra takes 1e3 for a number; added settings are an InputError."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in TEXTS and equals:
            word = f"{name}={_text(name, value)}"
        elif word.startswith(("+", "~")):
            name = name.lstrip("+~")
            chosen = (CONF / name).is_dir() and not value.startswith("{")
            if not (chosen or FREE.match(name) or "/" in name or "@" in name):
                raise InputError(f"{word}: a run reads the settings in conf/ and no others; leave out the sign + or ~")
        found.append(word)
    return found


def resumed(folder: str, words: Sequence[str]) -> list[str]:
    """Return the words that resume the run or sweep in a folder, with its settings; words of Hydra's may be added."""
    hydras = [word for word in words if word.startswith("hydra")]
    named = [word for word in words if "_target_" in word]
    if others := [word for word in words if not word.startswith("resume=") and word not in [*hydras, *named]]:
        raise InputError(f"resume={folder} takes the settings of the run in it; leave out {' '.join(others)}")
    place = quoted(folder)
    if (Path(folder) / sweeps.RECORD).is_file():
        own = sweeps.words(Path(folder))
        for name, _, value in (word.partition("=") for word in own):
            if (CONF / name.lstrip("+~")).is_dir() and re.search(r"[/\\$]", value):  # a file outside conf/
                raise InputError(f"resume={folder}: its record chooses {name}={value}; start the sweep anew")
        return ["--multirun", *own, *hydras, f"resume={place}", f"hydra.sweep.dir={place}"]
    resumed_settings(Path(folder), named)
    return [*named, f"resume={place}", f"hydra.run.dir={place}", "hydra.output_subdir=null"]


def resumed_settings(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the run in a folder, each `_target_` in which must be named in conf/ or in the words."""
    config = recorded(folder)
    named = "\n".join([*words, *(path.read_text(encoding="utf-8") for path in CONF.glob("*/*.yaml"))])
    allowed = re.findall(r"_target_[=:]\s*([\w.]+)", named)
    for target in re.findall(r'"_target_": "?([^",}]*)', json.dumps(config)):
        if target not in allowed:
            remedy = f"if it is yours, repeat the word that sets _target_={target} beside resume="
            raise InputError(f"{folder / RECORD} wants {target} built, which conf/ does not name; {remedy}")
    return config


def settled(config: DictConfig, start: str = "") -> dict[str, Any]:
    """Return the settings as plain containers, relative paths starting at `start` and `~` at the user's home.

    The settings that follow from a path follow it here, so the configuration must not be resolved before.
    """
    for name in PATHS:
        value = OmegaConf.select(config, name)
        if value not in (None, False, "", "off"):
            OmegaConf.update(config, name, os.path.join(start, os.path.expanduser(str(value))))
    found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return found


def quoted(text: str) -> str:
    """Return a text as a value in Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def _text(name: str, value: str) -> str:
    """The value of a text in Hydra's grammar; the values of a sweep stand between commas."""
    parts = PARTS.findall(value)
    if MEANT.match(value):
        return value
    if len(parts) > 1:
        return ",".join(_text(name, part) for part in parts)
    return quoted(os.path.expanduser(value) if name in PLACES else value)


def _value(words: Sequence[str], name: str) -> str | None:
    """The path that the words set a place to; None where it is null or not set."""
    values = [word.partition("=")[2].strip("'\"") for word in words if word.startswith(f"{name}=")]
    return os.path.expanduser(values[-1]) if values and values[-1] not in ("", "null") else None
