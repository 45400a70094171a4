"""Atomic writes: a file or a folder gets its name when it is complete, whatever stops the program or the machine."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvf.errors import InputError, disk_is_full


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a hidden path to write a file or a folder at, and rename it to `path` if the block ends without an error.

    A file replaces a file, a folder replaces a folder. The content reaches the disk first, so even after a power
    failure `path` has its old or its new content. If the disk is full, the OSError names the path.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it, or give another path")
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    if old.is_dir() and not path.exists():
        os.replace(old, path)  # an earlier process was killed between the two renamings below
    _remove(partial)
    _remove(old)
    try:
        yield partial
        for inside in (*partial.rglob("*"), partial):
            _flush(inside)
        if partial.is_dir() and path.is_dir():
            os.replace(path, old)  # no system renames a folder onto one that is not empty
        os.replace(partial, path)
        _flush(path.parent)
        _remove(old)
    except Exception as fault:
        if disk_is_full(fault):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from fault
        raise
    finally:
        _remove(partial)


def check_new(folder: Path) -> None:
    """Raise an InputError if there is anything at the path of a folder to make."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"output={folder} exists and is not an empty folder; remove it, or give another path")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
