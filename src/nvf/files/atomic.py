"""Files and folders that are there whole or not at all, whatever stops the program or the machine."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvf.errors import InputError, disk_is_full


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden path to write a file or a folder at; it takes its name when the block ends, and goes if it fails.

    A file takes the place of a file, a folder that of a folder. What was written is on the disk before it takes the
    name, so that after a loss of power, too, either the old or the new is there.

    Raises:
        InputError: there is no folder to put it in.
        OSError: the disk is full; it names the path, whatever library was writing.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it, or give another path")
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    if old.is_dir() and not path.exists():
        os.replace(old, path)  # a process was killed between the two renamings below
    for leftover in (partial, old):  # of a process that was killed
        _remove(leftover)
    try:
        yield partial
        _flush(partial)
        if partial.is_dir() and path.is_dir():
            os.replace(path, old)  # by itself, a folder does not take the place of a full one
        os.replace(partial, path)
        _flush_one(path.parent)
        _remove(old)
    except Exception as fault:
        if disk_is_full(fault):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from fault
        raise
    finally:
        _remove(partial)


def _flush(path: Path) -> None:
    """Have a file, or a folder and all in it, on the disk."""
    for inside in path.rglob("*") if path.is_dir() else ():
        _flush_one(inside)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():  # some systems flush no folders
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
