"""A memory's rows in a file, written once, trusted by their hash, and mapped: what is not used takes no memory.

The file is read-only, so that nothing writes to it by mistake. If it is cut short all the same, whoever reads rows that
are gone ends by SIGBUS, which Python cannot catch; after `faulthandler.enable()` it says where.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from nvf.errors import InputError
from nvf.files.atomic import written_whole

READ = 2**22  # bytes that are hashed at a time


@dataclass(frozen=True)
class RowsFile:
    """A file of rows as it was when it was mapped."""

    path: Path
    state: tuple[int, int, int, int]

    def check_unchanged(self) -> None:
        """Raise an InputError unless the file is what was mapped, so that the rows are what they were."""
        try:
            now = state_of(os.stat(self.path))
        except OSError:
            now = None
        if now != self.state:
            raise InputError(
                f"{self.path} was changed or removed while its rows were used; "
                "start again, and let nothing write to data.mapped"
            )


def mapped_rows(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, blocks: Callable[[], Iterable[Tensor]]
) -> tuple[Tensor, RowsFile]:
    """The rows, (N, D), that the file at the path holds, made from the blocks unless they are there already.

    A file beside it has the rows' SHA-256; whatever does not match it is written anew.
    """
    noted = path.with_suffix(".sha256")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # jobs of a sweep may share the rows
        state = _verified(path, noted, shape[0] * shape[1] * dtype.itemsize)
        if state is None:
            state = _write(path, noted, blocks())
        rows = torch.from_file(str(path), size=shape[0] * shape[1], dtype=dtype).view(shape)
    file = RowsFile(path, state)
    file.check_unchanged()
    return rows, file


def as_bytes(rows: Tensor) -> memoryview:
    """The rows' bytes, for a hash or a file."""
    return rows.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _verified(path: Path, noted: Path, size: int) -> tuple[int, int, int, int] | None:
    """The state of the file if it is of this size and its content is what is noted beside it."""
    if not path.is_file() or not noted.is_file() or path.stat().st_size != size:
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        state = state_of(os.fstat(file.fileno()))
        while part := file.read(READ):
            digest.update(part)
    return state if noted.read_bytes() == _line(digest.hexdigest()) else None


def _write(path: Path, noted: Path, blocks: Iterable[Tensor]) -> tuple[int, int, int, int]:
    digest = hashlib.sha256()
    with written_whole(path) as partial:
        with partial.open("wb") as file:  # not through a map: where the disk is full, that ends the process
            for block in blocks:
                digest.update(as_bytes(block))
                file.write(as_bytes(block))
        partial.chmod(0o444)
        state = state_of(partial.stat())
    with written_whole(noted) as partial:
        partial.write_bytes(_line(digest.hexdigest()))
    return state


def _line(digest: str) -> bytes:
    return f"{digest}\n".encode()


def state_of(of: os.stat_result) -> tuple[int, int, int, int]:
    """Which file it is, when it was written last, and its size."""
    return of.st_dev, of.st_ino, of.st_mtime_ns, of.st_size
