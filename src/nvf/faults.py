"""What to tell a user whose machine has run out of room, on the disk or in memory, or will not let a run write."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nvf.errors import InputError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
SAID_BY_OTHERS = ("No space left on device", "os error 28", "Disk quota exceeded")  # Rust's and C++'s libraries
ALLOCATION = re.compile(r"tried to allocate ([\d.]+)\s*(bytes|KiB|MiB|GiB)", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def disk_is_full(fault: BaseException) -> bool:
    """Whether something could not be written for want of room."""
    return getattr(fault, "errno", None) in FULL or any(said in str(fault) for said in SAID_BY_OTHERS)


def may_not_write(fault: BaseException) -> bool:
    """Whether something could not be written because that is not allowed there."""
    return isinstance(fault, OSError) and fault.errno in FORBIDDEN


def out_of_memory(fault: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU, which is a RuntimeError, or a GPU's."""
    return isinstance(fault, MemoryError) or (
        isinstance(fault, RuntimeError)
        and ("can't allocate memory" in str(fault) or "out of memory" in str(fault).lower())
    )


def explain(fault: BaseException, folder: Path) -> str | None:
    """Words for a fault of the machine in the middle of a run; None for any other."""
    if disk_is_full(fault):
        return f"the disk of {folder} is full ({one_line(fault)}); what was saved before is whole: make room"
    if may_not_write(fault):
        return f"{folder} cannot be written ({one_line(fault)}); mend its permissions"
    if out_of_memory(fault):
        return (
            f"out of memory ({amounts(fault)}); keep the rows in half the room, data.dtype=float16, or on the disk, "
            "data.mapped=outputs/rows"
        )
    return None


def check_place(folder: Path) -> None:
    """Raise an InputError unless a folder is there to write into, or can be made; nothing is written."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    why = "is not to be written into" if nearest.is_dir() else "is no folder"
    raise InputError(f"{folder} cannot be written: {nearest} {why}; mend that, or give a place: hydra.run.dir=path")


@contextmanager
def fitting_in_memory(stage: str, remedies: Sequence[str]) -> Iterator[None]:
    """Turn a failed allocation in the fit of a stage into an InputError that names these remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not out_of_memory(fault):
            raise
        raise InputError(f"{stage}: out of memory ({amounts(fault)}); {', or '.join(remedies)}") from None


def amounts(fault: BaseException) -> str:
    """How much was wanted and how much there is, as far as either is known."""
    known = []
    if found := ALLOCATION.search(str(fault)):
        known.append(f"{float(found[1]) * UNITS[found[2].lower()] / 2**30:,.2f} GiB wanted at once")
    if (free := _free()) is not None:
        known.append(f"{free / 2**30:,.2f} GiB free")
    return ", ".join(known) or one_line(fault)


def _free() -> int | None:
    """Bytes of memory that the system could give, where it says so."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])
