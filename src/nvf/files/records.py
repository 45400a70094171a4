"""Files that may have been damaged or made by others: which may be opened at all, their JSON, and their hashes.

Hashes are against damage, not against forgers: whoever can write a file can write its hash.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvf.files.atomic import written_whole

LONGEST, MOST, DEEPEST = 1000, 10_000, 32  # characters of a string, values, and levels of settings
LARGEST = 2**24  # bytes of a record: objects of Python take some twenty times the room of their JSON


def own_file(path: Path) -> bool:
    """Whether a path is a regular file, in its folder even if it is a link: no pipe, no device, no file elsewhere."""
    return path.is_file() and path.resolve().is_relative_to(path.parent.resolve())


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with the values of JSON alone: NaN and infinity are none.

    Raises:
        ValueError: anything else, whatever it is; an object that is too large or too deep.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path.name} has {size} bytes, more than {LARGEST}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (RecursionError, MemoryError) as fault:
        raise ValueError(f"{path.name} is too deep or too large ({type(fault).__name__})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object but {type(found).__name__}")
    return found


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the file that `read_record` reads, whole or not at all; NaN, which is not JSON, is a ValueError."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def check_settings(value: Any) -> None:
    """Raise a ValueError unless it is of plain values, few and short enough to be named in a message.

    A pickle can hold a list that holds one list twice, and so on: small, until somebody writes it out.
    """
    left = [(value, 0)]
    for _ in range(MOST):
        if not left:
            return
        part, level = left.pop()
        if type(part) is str and (len(part) > LONGEST or not part.isprintable()):
            raise ValueError(f"a string in it is not printable, or longer than {LONGEST} characters")
        if type(part) is int and abs(part) >= 2**63:
            raise ValueError("a number in it has more than 64 bits")
        if type(part) not in (type(None), bool, int, float, str, list, tuple, dict) or level > DEEPEST:
            raise ValueError(f"it holds {type(part).__name__}, or is nested deeper than {DEEPEST} levels")
        inner = [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        left += [(one, level + 1) for one in inner]
    raise ValueError(f"it holds more than {MOST} values")


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a digest of everything in it."""
    return {**record, "digest": _digest(record)}


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record is the one that was sealed."""
    return record.get("digest") == _digest({name: value for name, value in record.items() if name != "digest"})


def sha256(path: Path) -> str:
    """Of a file's content.

    Raises:
        ValueError: it is no regular file.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("it is too deep") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text}")
    return number
