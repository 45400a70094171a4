"""The settings of runs: flat, under dotted names, and which of them tell runs apart."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

IGNORED = ("cache", "resume", "save_every", "threads")  # what leaves the figures as they are
IGNORED_GROUPS = ("dashboards.", "hydra.")
IGNORED_IN_TRAINER = ("enable_progress_bar", "enable_model_summary", "log_every_n_steps")
DEPTH = 20
LONGEST = 80  # characters of a cell
# Each of these brings other settings along.
CHOICES = ("data.name", "queries.name", "stage.name", "attention.transform", "reranker.kind")


class Missing:
    """The value of a setting that a run does not have."""


MISSING = Missing()


def flatten(config: Mapping[str, Any], prefix: str = "", depth: int = DEPTH) -> dict[str, Any]:
    """Nested settings under their dotted names; lists are values.

    Raises:
        ValueError: they are nested deeper than any settings of ours.
    """
    if depth == 0:
        raise ValueError(f"its settings are more than {DEPTH} deep")
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.", depth - 1)
        else:
            check_depth(value, depth - 1)
            flat[f"{prefix}{name}"] = value
    return flat


def check_depth(value: Any, depth: int) -> None:
    """Raise a ValueError where lists and objects are nested so deep that writing them would fail."""
    if isinstance(value, list | dict):
        if depth == 0:
            raise ValueError(f"its settings are more than {DEPTH} deep")
        for part in value.values() if isinstance(value, dict) else value:
            check_depth(part, depth - 1)


def ignored(name: str) -> bool:
    """Whether the setting leaves the figures as they are."""
    own = name.removeprefix("trainer.")
    return name in IGNORED or name.startswith(IGNORED_GROUPS) or (own != name and own in IGNORED_IN_TRAINER)


def columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The settings that tell the rows apart, and those that differ too but follow from one of them."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [canonical(row.get(name, MISSING)) for row in rows] for name in names}
    differing = [name for name in values if len(set(values[name])) > 1]
    kept: list[str] = []
    following: list[str] = []
    for name in sorted(differing, key=_rank):
        followed = any(_follows(values[name], values[by], by in CHOICES and name not in CHOICES) for by in kept)
        (following if followed else kept).append(name)
    return kept, following


def canonical(value: Any) -> str:
    """Equal for equal settings: 1 and 1.0 are, 1 and true are not."""
    if value is MISSING:
        return ""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def key(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Equal for equal settings."""
    return tuple(sorted((name, canonical(value)) for name, value in settings.items()))


def order(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers by size, and behind them anything else by name."""
    return (False, float(value), "") if is_number(value) else (True, 0.0, canonical(value))


def shown(value: Any) -> str:
    """A setting's value for people: a number in four digits, - where it has none."""
    if value is MISSING:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and is_number(value) else short(printable(written(value)))


def short(text: str) -> str:
    """Of a long text both ends: a table has no room for more, nor has a figure."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def written(value: Any) -> str:
    """A setting's value in full; empty where it has none."""
    if value is MISSING:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def printable(text: str) -> str:
    """On one line and without control characters, which a results.json from elsewhere may hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _follows(values: list[str], by: list[str], chosen: bool) -> bool:
    """Whether one setting is a matter of course given another.

    Two settings that were drawn at random go together just as well; so, unless it is a choice that brings its own
    settings along, or the values are equal, each pair of values must have come up twice.
    """
    pairs = Counter(zip(by, values, strict=True))
    if len(pairs) > len(set(by)):
        return False
    repeated = len(pairs) == len(set(values)) and min(pairs.values()) > 1
    return values == by or chosen or repeated or canonical(MISSING) in values


def _rank(name: str) -> tuple[int, int, int, str]:
    choice = CHOICES.index(name) if name in CHOICES else len(CHOICES)
    return choice, name.count("."), len(name), name
