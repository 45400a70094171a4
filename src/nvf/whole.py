"""Files and folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvf.errors import InputError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden path to write a file or a folder at; it takes its name when the block ends, and goes if it fails.

    A file takes the place of a file, a folder that of a folder.

    Raises:
        InputError: there is no folder to put it in.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it, or give another path")
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    for leftover in (partial, old):  # of a process that was killed
        _remove(leftover)
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            os.replace(path, old)  # by itself, a folder does not take the place of a full one
        os.replace(partial, path)
        _remove(old)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
