"""The `name=value` options of the commands beside training: read, explained and run without Hydra."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nvf.console import mend_streams
from nvf.errors import InputError

if TYPE_CHECKING:
    import torch

REQUIRED: Any = "..."  # the default of an option that must be given


class Option(NamedTuple):
    """One setting of a command; its value is given as text, read by `read`, and `null` gives None."""

    name: str
    meaning: str
    default: Any = REQUIRED
    read: Callable[[str], Any] = str


def path(text: str) -> Path:
    """A path; `~` is the home folder, which shells do not fill in behind `name=`."""
    return Path(text).expanduser()


def whole(text: str) -> int | str:
    """A whole number, or the text itself for whoever checks the number to name."""
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 100 else text


def parse(arguments: Sequence[str], options: Sequence[Option]) -> dict[str, Any]:
    """The value of every option, given or default.

    Raises:
        InputError: an argument that is not name=value, an unknown or repeated name, a missing value.
    """
    known = {option.name: option for option in options}
    given: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name not in known or not equals:
            fault = f"{name!r} is not an option" if equals else f"{argument!r} is not name=value"
            raise InputError(f"{fault}; the names are {', '.join(known)}")
        if name in given:
            raise InputError(f"{name} is given twice; keep one")
        given[name] = None if text == "null" else known[name].read(text) if text else REQUIRED
    values = {option.name: given.get(option.name, option.default) for option in options}
    for option in options:
        if values[option.name] is REQUIRED or (option.default is not None and values[option.name] is None):
            raise InputError(f"{option.name}= is not set; give {option.name}=..., {option.meaning}")
    return values


def usage(program: str, summary: str, options: Sequence[Option]) -> str:
    """What `--help` prints: the command, and a line an option with its default."""
    shown = [f"{option.name}={'null' if option.default is None else option.default}" for option in options]
    required = [text for text, option in zip(shown, options, strict=True) if option.default is REQUIRED]
    lines = [f"  {text:{max(map(len, shown))}}  {option.meaning}" for text, option in zip(shown, options, strict=True)]
    return "\n".join([" ".join(["python -m", program, *required]), "", summary, "", *lines])


def run(command: Callable[..., str], *, program: str, summary: str, options: Sequence[Option]) -> None:
    """Run a command on the words of the command line, print the line it returns, or what went wrong."""
    mend_streams()
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage(program, summary, options))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that what was begun is removed
    try:
        print(command(**parse(arguments, options)))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)


def find_device(name: str) -> "torch.device":
    """The device of that name, or an InputError; `auto` is the GPU where there is one, else the CPU."""
    import torch  # the slowest import of all; bad options are refused before it

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as fault:  # torch without CUDA asserts
        raise InputError(f"device={name} cannot be used ({str(fault).splitlines()[0]}); give device=cpu") from None
