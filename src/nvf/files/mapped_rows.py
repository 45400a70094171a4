"""The rows of a memory that stays on the disk (data.mapped): a file that is written once and then mapped.

The file is read-only, so that nothing writes to it by mistake. If it is truncated all the same, the process that reads
the missing rows ends by SIGBUS, which Python cannot catch; after `faulthandler.enable()` the traceback is printed.
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
from nvf.files.atomic import atomic_write

State = tuple[int, int, int, int]


@dataclass(frozen=True)
class RowsFile:
    """A file of rows, and its state when it was mapped."""

    path: Path
    state: State

    def check_unchanged(self) -> None:
        """Raise an InputError if the file is no longer the one that was mapped."""
        if not self.path.exists() or state_of(self.path.stat()) != self.state:
            raise InputError(
                f"{self.path} was changed or removed while its rows were used; "
                "start again, and let nothing write to data.mapped"
            )


def mapped_rows(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, blocks: Callable[[], Iterable[Tensor]]
) -> tuple[Tensor, RowsFile]:
    """Map the rows, (N, D), of the file at `path`, which is first written from the blocks unless it exists.

    The rows' SHA-256 stands in a file beside it; a file that does not match it is written anew.
    """
    noted = path.with_suffix(".sha256")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # jobs of a sweep may share the rows
        state = _verified(path, noted) or _write(path, noted, blocks())
        rows = torch.from_file(str(path), size=shape[0] * shape[1], dtype=dtype).view(shape)
    file = RowsFile(path, state)
    file.check_unchanged()
    return rows, file


def as_bytes(rows: Tensor) -> memoryview:
    """View the rows as bytes, for a hash or a file."""
    return rows.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def state_of(status: os.stat_result) -> State:
    """Tell which file it is, when it was last written, and its size in bytes."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _verified(path: Path, noted: Path) -> State | None:
    """Return the state of the file if its hash is the noted one."""
    if not path.is_file() or not noted.is_file():
        return None
    with path.open("rb") as file:
        state = state_of(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return state if noted.read_bytes() == f"{digest}\n".encode() else None


def _write(path: Path, noted: Path, blocks: Iterable[Tensor]) -> State:
    digest = hashlib.sha256()
    with atomic_write(path) as partial:
        with partial.open("wb") as file:  # writing through a map ends the process where the disk is full
            for block in blocks:
                digest.update(as_bytes(block))
                file.write(as_bytes(block))
        partial.chmod(0o444)
        state = state_of(partial.stat())
    with atomic_write(noted) as partial:
        partial.write_text(f"{digest.hexdigest()}\n")
    return state
