"""The error that users read, the check of numbers, and words for faults of the machine."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
FULL_IN_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded")  # of libraries in Rust and C++


class InputError(ValueError):
    """Bad input: the message names the value, the limit and the remedy; commands print it without a traceback."""


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
    fits = fits and abs(value) <= sys.float_info.max  # false for NaN, and for Python's largest integers
    fits = fits and (minimum is None or value >= minimum)
    if not (fits and (above is None or value > above) and (below is None or value < below)):
        bounds = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name}={value} is not {f'{kind} {bounds}'.strip()}; {remedy}")


def one_line(fault: BaseException) -> str:
    """Return what another library's exception says, on one line of bounded length."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:200]}" if text else type(fault).__name__


@contextmanager
def refused(what: str, remedy: str, *faults: type[Exception]) -> Iterator[None]:
    """Turn these exceptions, or all, into an InputError; one that is raised in the block stays, unless it is named."""
    caught = faults or (Exception,)
    try:
        yield
    except caught as fault:
        if isinstance(fault, InputError) and InputError not in caught:
            raise
        raise InputError(f"{what} ({one_line(fault)}); {remedy}") from None


def disk_is_full(fault: BaseException) -> bool:
    """Tell whether a write failed for want of room."""
    return getattr(fault, "errno", None) in FULL or any(words in str(fault) for words in FULL_IN_WORDS)


def explain(fault: BaseException, folder: Path) -> str | None:
    """Return words for a fault of the machine, in the folder unless it names a file; None for other faults."""
    place = getattr(fault, "filename", None) or folder
    if disk_is_full(fault):
        return f"the disk of {place} is full ({one_line(fault)}); make room"
    if isinstance(fault, OSError) and fault.errno in FORBIDDEN:
        return f"{place} cannot be written ({one_line(fault)}); fix its permissions"
    allocating = isinstance(fault, RuntimeError) and re.search("can.t allocate memory|out of memory", str(fault), re.I)
    if allocating or isinstance(fault, MemoryError):
        return f"out of memory ({one_line(fault)}); start anew with a lower batch_size or data.dtype=float16"
    return None


def check_place(folder: Path) -> None:
    """Raise an InputError unless a folder can be written, or made; nothing is written."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise InputError(f"{folder} cannot be written: {nearest} is no writable folder; give hydra.run.dir=path")
