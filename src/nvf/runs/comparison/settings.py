"""How the values of settings are sorted and shown."""

import json
from typing import Any

from nvf.runs.settings import MISSING, canonical, is_number

LONGEST = 80  # characters of a cell


def order(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers by size, and behind them anything else by name."""
    return (False, float(value), "") if is_number(value) else (True, 0.0, canonical(value))


def shown(value: Any) -> str:
    """A setting's value for people: a number in four digits, - where it has none."""
    if value is MISSING:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and is_number(value) else short(written(value))


def short(text: str) -> str:
    """Of a long text both ends: a table has no room for more, nor has a figure."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def printable(value: Any) -> Any:
    """Text on one line and without control characters, which a results.json from elsewhere may hold."""
    return "".join(c if c.isprintable() else " " for c in value) if isinstance(value, str) else value


def written(value: Any) -> str:
    """A setting's value in full; empty where it has none."""
    if value is MISSING:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
