"""From the words that choose settings, name=value, to a configuration; text stays the text that was typed."""

import difflib
import os
import re
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvf.console import follows
from nvf.errors import InputError, check_place
from nvf.runs import sweep as sweeps
from nvf.runs.resume import recorded, requeued
from nvf.runs.settings import flatten

HERE = Path(__file__).resolve()
CARRIED = HERE.parent / "conf"  # in a wheel
CONF = CARRIED if CARRIED.is_dir() else HERE.parents[2] / "conf"
PATHS = ("data.dir", "data.mapped", "data.path", "cache", "attention_checkpoint", "reranker_checkpoint")
PLACES = ("resume", "hydra.run.dir", "hydra.sweep.dir")  # paths that are needed before the settings are composed
COLUMNS = ("data.columns.id", "data.columns.vector", "data.columns.targets")
TEXTS = (*PATHS, *PLACES, *COLUMNS, "data.url", "data.collection", "data.vector", "hydra.sweep.subdir")
# What is built by its `_target_` knows the names of its own arguments.
FREE = re.compile(
    r"(trainer|hydra|optimizer|callbacks|logger|data\.memory|queries\.source|(attention|reranker)\.model)\."
)
GLOBAL = ("recipe", "experiment")  # groups whose settings are other groups'
TARGET = re.compile(r"_target_[=:]\s*([\w.]+)")
PARTS = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\\.|[^,])+""")  # between the commas of a sweep
PARSER = OverridesParser.create()
COMPOSING = threading.Lock()  # Hydra composes for one thread at a time


def words_of(words: Sequence[str]) -> list[str]:
    """The words of the command line as Hydra is given them, with the folder to go on in, where there is one.

    Raises:
        InputError: a word that is none, there is nothing to go on with, other settings than the run's own, or no place
            for a run.
    """
    words = spelled(words)
    said = places(words)
    resume, place = said.get("resume"), said.get("hydra.run.dir", said.get("hydra.sweep.dir"))
    several = any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)
    if any(word.startswith("-") and word not in ("-m", "--multirun") for word in words) or follows():
        return words  # asks Hydra for something else; or the first process has seen to it
    if resume:
        return resumed(str(resume), words)
    if not several and (folder := requeued(place)) is not None:
        return resumed(str(folder), [])
    check_place(Path(place) if place and "${" not in place else Path("outputs"))
    return words


def composed(words: Sequence[str]) -> tuple[dict[str, Any], Path, bool]:
    """The settings that these words choose, the folder of the run, and whether it goes on with what is there.

    Raises:
        InputError: whatever is wrong with them, or what only the command line can do.
    """
    if flags := [word for word in words if word.startswith("-")]:
        raise InputError(f"{' '.join(flags)} is for the command line, python -m nvf.train; give name=value")
    words = spelled(words)
    if resume := places(words).get("resume"):
        words = resumed(resume, words)
    if "--multirun" in words:
        raise InputError(f"resume={resume} is a sweep's, for the command line: python -m nvf.train resume={resume}")
    try:
        with COMPOSING, initialize_config_dir(str(CONF), job_name="train", version_base="1.3"):
            cfg = compose("config", list(words), return_hydra_config=True)
        own = OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name != "hydra"])
        folder, config = Path(cfg.hydra.run.dir).absolute(), settled(own)
    except (HydraException, OmegaConfBaseException) as fault:
        raise InputError(" ".join(str(fault).split())) from None
    if cfg.hydra.mode is RunMode.MULTIRUN:
        raise InputError("a sweep is for the command line: python -m nvf.train -m ...; run makes one run")
    if resume:
        return resumed_settings(folder, words), folder, True
    sweeps.refuse_local_ddp(config)
    check_place(folder)
    return config, folder, False


def spelled(words: Sequence[str]) -> list[str]:
    """The words with every text in Hydra's grammar: quoted where Hydra would take it for a number, a list or a fault.

    Raises:
        InputError: a word that is no override, or a setting that nothing reads.
    """
    foreign = any(word.startswith(("--config", "-c")) for word in words)  # a configuration that is not ours
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        sign, name = re.fullmatch("([+~]*)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        if word.startswith("-") or not (sign or equals):
            found.append(word)
            continue
        choice = (CONF / name).is_dir() and not value.startswith("{")
        if not (foreign or choice or FREE.match(name) or "/" in name or "@" in name):
            _check_known(word, sign, name)
            sign = ""  # so that Hydra refuses what the chosen options do not have
        if name in TEXTS:
            value = _spelled(name, value)
        elif not _parsed(word)[0]:
            raise InputError(f"{word} is no override that Hydra reads; quote its value: \"{sign}{name}='...'\"")
        found.append(f"{sign}{name}{equals}{value}")
    return found


def resumed(folder: str, words: Sequence[str]) -> list[str]:
    """The words that resume the run or the sweep in a folder, if the given ones want nothing else.

    A sweep's own words come from its record; words of Hydra's, such as hydra/launcher=parallel, may be added.
    """
    hydras = [word for word in words if word.startswith("hydra")]
    named = [word for word in words if TARGET.search(word)]
    if others := [word for word in words if not word.startswith("resume=") and word not in [*hydras, *named]]:
        raise InputError(
            f"resume={folder} goes on with the run's own settings; leave out {' '.join(others)}, or start anew"
        )
    if (Path(folder) / sweeps.RECORD).is_file():
        own = sweeps.words(Path(folder))
        for name, _, value in (word.partition("=") for word in own):
            if (CONF / name.lstrip("+~")).is_dir() and re.search(r"[/\\$]", value):  # a file that is not ours
                raise InputError(f"resume={folder}: its record chooses {name}={value}; start the sweep anew")
        return ["--multirun", *own, *hydras, f"resume={quoted(folder)}", f"hydra.sweep.dir={quoted(folder)}"]
    resumed_settings(Path(folder), named)  # or there is nothing to resume
    return [*named, f"resume={quoted(folder)}", f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]


def places(words: Sequence[str]) -> dict[str, Any]:
    """The values of the words that name a run's folder."""
    named = [word for word in words if word.partition("=")[0] in PLACES]
    return {override.key_or_group: override.value() for override in PARSER.parse_overrides(named)}


def settled(config: DictConfig, start: str = "") -> dict[str, Any]:
    """The settings as plain containers, with every text that is meant as one, and with their paths filled in.

    Args:
        config: as it was composed, its interpolations unresolved: what follows from a path follows it here.
        start: where relative paths start; `~` is a user's home.
    """
    for name in TEXTS:
        value = OmegaConf.select(config, name)
        if value in (None, "", "off") or isinstance(value, bool) or name.startswith("hydra."):
            continue
        text = os.path.join(start, os.path.expanduser(str(value))) if name in PATHS else str(value)
        OmegaConf.update(config, name, text)
    found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return found


def check_folder(config: dict[str, Any]) -> None:
    """Raise an InputError unless there is the folder that holds the user's data, if they are wanted."""
    data = config["data"]
    if "dir" not in data or (data["name"] != "embeddings" and config["queries"]["name"] != "recorded"):
        return
    holds = "corpus and queries" if data["name"] == "embeddings" else "queries"
    if not data["dir"]:
        raise InputError(f"data.dir is not set; name the folder that holds your {holds}: data.dir=path/to/folder")
    if not Path(str(data["dir"])).is_dir():
        raise InputError(f"data.dir={data['dir']} is no folder; name the one that holds your {holds}")


def quoted(text: str) -> str:
    """Text as a value in Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


@cache
def settings() -> set[str]:
    """The name of every setting and group of settings in conf/."""
    found: set[str] = set()
    for path in [*CONF.glob("*.yaml"), *CONF.glob("*/*.yaml")]:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        group = "" if path.parent == CONF or path.parent.name in GLOBAL else f"{path.parent.name}."
        for name in flatten(
            {name: value for name, value in content.items() if name not in ("defaults", "hydra")}, group
        ):
            found |= {one for one in (name, name.rpartition(".")[0]) if not FREE.match(f"{one}.")}
    return found


@cache
def targets() -> set[str]:
    """Every `_target_` in conf/."""
    texts = (path.read_text(encoding="utf-8") for path in CONF.glob("*/*.yaml"))
    return {target for text in texts for target in TARGET.findall(text)}


def resumed_settings(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The settings of the run in a folder, which may name what conf/ has built, and what these words do.

    Raises:
        InputError: the folder holds no run, its record is damaged, or it would have something else built.
    """
    return recorded(folder, targets() | {target for word in words for target in TARGET.findall(word)})


def _check_known(word: str, sign: str, name: str) -> None:
    """Refuse to add, or to take away, a setting: what is read stands in conf/, and nothing else is."""
    if name not in settings():
        lasts = {other: other.rpartition(".")[2] for other in settings()}
        like = difflib.get_close_matches(name.rpartition(".")[2], lasts.values(), n=1, cutoff=0.75)
        near = difflib.get_close_matches(name, [other for other in lasts if lasts[other] in like], cutoff=0)
        remedy = f"did you mean {' or '.join(near)}?" if near else "conf/ has all settings"
        raise InputError(f"{word}: there is no setting {name}, nothing would read it; {remedy}")
    if sign in ("+", "~"):
        raise InputError(
            f"{word}: {name} is a setting in conf/, neither to be added nor to be taken away; leave out {sign}"
        )


def _spelled(name: str, value: str) -> str:
    """The value of a setting that is text, in Hydra's grammar; a sweep's are between commas."""
    kind, found = _parsed(f"{name}={value}")
    parts = PARTS.findall(value)
    if kind is ValueType.SIMPLE_CHOICE_SWEEP or (kind is None and len(parts) > 1):
        return ",".join(_spelled(name, part) for part in parts)
    if kind not in (None, ValueType.ELEMENT):
        return value  # choice(...) and the like are sweeps
    if name in PLACES and value.startswith("~"):
        return quoted(os.path.expanduser(value))
    meant = isinstance(found, str | QuotedString) or (found is None and kind is not None and name not in COLUMNS)
    if isinstance(found, bool):
        meant = name == "cache" and not found
    return value if meant else quoted(value)


def _parsed(word: str) -> tuple[ValueType | None, Any]:
    """What Hydra reads in a word; no type of value if it reads nothing."""
    try:
        override = PARSER.parse_override(word)
    except HydraException:
        return None, None
    return override.value_type or ValueType.ELEMENT, override._value
