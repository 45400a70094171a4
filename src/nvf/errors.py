"""The one error that a user is meant to read, and the check that raises most of it."""

import sys
from numbers import Integral, Real
from typing import Any

LARGEST = sys.float_info.max  # Python's whole numbers go beyond it


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
    """Raise an InputError unless the value is a finite number, numpy's included, whole if it must be, within limits."""
    kind = "a whole number" if whole else "a number"
    limits = [
        f"{word} {limit}"
        for word, limit in (("of at least", minimum), ("above", above), ("below", below))
        if limit is not None
    ]
    fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if fits and not isinstance(value, int):
        value = int(value) if whole else float(value)  # numpy's float32 would turn the limits into its own type
    fits = fits and abs(value) <= LARGEST  # NaN is not
    if (
        not fits
        or (minimum is not None and value < minimum)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise InputError(f"{name}={value} is not {' '.join([kind, ' and '.join(limits)]).strip()}; {remedy}")


def one_line(fault: BaseException) -> str:
    """What another library's exception says, on one line of bounded length, for an InputError to quote."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:200]}" if text else type(fault).__name__
