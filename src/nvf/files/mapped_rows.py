"""The rows of a memory on disk (data.mapped): a read-only, mapped file. Cutting it kills its readers by SIGBUS."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from nvf.files.atomic import atomic_write
from nvf.files.records import sha256

State = tuple[int, int, int, int]


def mapped_rows(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, blocks: Callable[[], Iterable[Tensor]]
) -> tuple[Tensor, State]:
    """Map rows, (N, D), from a file, written from blocks unless its noted SHA-256 fits; return them and its state."""
    noted = path.with_suffix(".sha256")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # jobs of a sweep may share the rows
        if not (path.is_file() and noted.is_file() and noted.read_bytes() == sha256(path).encode()):
            with atomic_write(path) as partial:
                with partial.open("wb") as file:  # writing through a map ends the process if the disk is full
                    for block in blocks():
                        file.write(as_bytes(block))
                partial.chmod(0o444)
            with atomic_write(noted) as partial:
                partial.write_text(sha256(path))
        state = state_of(path.stat())
        return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape), state


def as_bytes(rows: Tensor) -> memoryview:
    """View the rows as bytes, for a hash or a file."""
    return rows.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def state_of(status: os.stat_result) -> State:
    """Return what changes when a file is replaced or written: device, inode, time of the last write, size."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
