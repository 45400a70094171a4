"""JSON files that may be damaged: reading, writing and hashing them. Hashes find damage, not forgery."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvf.files.atomic import atomic_write

LONGEST = 10_000  # characters of settings, as JSON
LARGEST = 2**24  # bytes of a file; Python's objects take some twenty times as much memory as their JSON


def own_file(path: Path) -> bool:
    """Tell whether the path is a regular file in its folder, not a pipe, a device or a link to another folder."""
    return path.is_file() and path.resolve().is_relative_to(path.parent.resolve())


def read_record(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; a ValueError for anything else, too much of it, or a number beyond 64 bits."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path.name} has {size} bytes, more than {LARGEST}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
        json.dumps(record, allow_nan=False)  # a ValueError for a number that is not finite
    except (RecursionError, MemoryError) as fault:
        raise ValueError(f"{path.name} is too deep or too large ({type(fault).__name__})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds no object but {type(record).__name__}")
    return record


def _integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) >= 2**64:
        raise ValueError("a number in it has more than 64 bits")
    return number


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the file that `read_record` reads, atomically; NaN, which is not JSON, is a ValueError."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def check_settings(settings: Any) -> None:
    """Raise a ValueError unless settings that were read from JSON are short plain ASCII, which a message can quote."""
    if len(text := json.dumps(settings)) > LONGEST or "\\" in text:  # JSON escapes other characters
        raise ValueError(f"its settings are longer than {LONGEST} characters, or not of plain characters")


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with a digest of all its values."""
    text = json.dumps(record, sort_keys=True)
    return {**record, "digest": hashlib.sha256(text.encode()).hexdigest()}


def is_unchanged(record: Mapping[str, Any]) -> bool:
    """Tell whether a record still has the values that it was sealed with."""
    values = {name: value for name, value in record.items() if name != "digest"}
    return record.get("digest") == sealed(values)["digest"]


def sha256(path: Path) -> str:
    """Return the hash of a regular file's content; any other path is a ValueError."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
