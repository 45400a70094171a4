"""The one error that a user is meant to read, the check of numbers, and words for faults of the machine."""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

LARGEST = sys.float_info.max  # Python's integers go beyond it
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
SAID_BY_OTHERS = ("No space left on device", "os error 28", "Disk quota exceeded")  # Rust's and C++'s libraries


class InputError(ValueError):
    """Bad input: the message names the value, the limit and the remedy; the entry prints it without a traceback."""


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
    remedy: str,
) -> None:
    """Raise an InputError unless the value is a finite number within limits, and an integer if it must be `whole`."""
    limits = {"of at least": minimum, "above": above, "below": below}
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if fits and not isinstance(value, int):
        value = int(value) if whole else float(value)  # numpy's float32 would turn the limits into its own type
    fits = fits and abs(value) <= LARGEST  # NaN is not
    fits = fits and (minimum is None or value >= minimum)
    if not (fits and (above is None or value > above) and (below is None or value < below)):
        bounds = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name}={value} is not {f'{kind} {bounds}'.strip()}; {remedy}")


def one_line(fault: BaseException) -> str:
    """What another library's exception says, on one line of bounded length, for an InputError to quote."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:200]}" if text else type(fault).__name__


def disk_is_full(fault: BaseException) -> bool:
    """Whether something could not be written for want of room."""
    return getattr(fault, "errno", None) in FULL or any(said in str(fault) for said in SAID_BY_OTHERS)


def out_of_memory(fault: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU, which is a RuntimeError, or a GPU's."""
    said = str(fault).lower() if isinstance(fault, RuntimeError) else ""
    return isinstance(fault, MemoryError) or "can't allocate memory" in said or "out of memory" in said


def explain(fault: BaseException, folder: Path) -> str | None:
    """Words for a fault of the machine in the middle of a run, in the folder if it names no file; None for others."""
    place = getattr(fault, "filename", None) or folder
    if disk_is_full(fault):
        return f"the disk of {place} is full ({one_line(fault)}); what was saved before is whole: make room"
    if isinstance(fault, OSError) and fault.errno in FORBIDDEN:
        return f"{place} cannot be written ({one_line(fault)}); mend its permissions"
    if out_of_memory(fault):
        return (
            f"out of memory ({one_line(fault)}); keep the rows in half the room, data.dtype=float16, or on the disk, "
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
    """Turn a failed allocation in the fit of a stage into an InputError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not out_of_memory(fault):
            raise
        raise InputError(f"{stage}: out of memory ({one_line(fault)}); {', or '.join(remedies)}") from None
