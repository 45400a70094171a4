"""The `name=value` options of the commands beside training: read, explained and run without Hydra."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nvf.errors import InputError

REQUIRED: Any = "..."  # the default of an option that must be given


class Option(NamedTuple):
    """One option of a command; its value is given as text, which `read` converts, and `null` gives None."""

    name: str
    meaning: str
    default: Any = REQUIRED
    read: Callable[[str], Any] = str


def path(text: str) -> Path:
    """Return a path; shells do not expand `~` behind `name=`."""
    return Path(text).expanduser()


def whole(text: str) -> int | str:
    """Return an integer, or the text itself for the check of the number to quote."""
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 100 else text


def folders() -> list[Path]:
    """Take the folders from the words of the command line; they may stand anywhere, and have = in their names."""
    found = [word for word in sys.argv[1:] if not word.startswith("-") and ("=" not in word or Path(word).is_dir())]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in found]
    return [path(word) for word in found]


def parse(arguments: Sequence[str], options: Sequence[Option]) -> dict[str, Any]:
    """Return the value of every option, given or default; an unknown or missing one is an InputError."""
    known = {option.name: option for option in options}
    values = {option.name: option.default for option in options}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name not in known or "=" not in argument:
            raise InputError(f"{argument!r} is not name=value; the names are {', '.join(known) or 'none'}")
        values[name] = None if text == "null" else known[name].read(text) if text else REQUIRED
    for name, option in known.items():
        if values[name] is REQUIRED or (option.default is not None and values[name] is None):
            raise InputError(f"{name}= is not set; give {name}=..., {option.meaning}")
    return values


def usage(program: str, summary: str, options: Sequence[Option]) -> str:
    """Return what `--help` prints: the command, and a line for each option with its default."""
    shown = {f"{option.name}={'null' if option.default is None else option.default}": option for option in options}
    required = "".join(f" {text}" for text, option in shown.items() if option.default is REQUIRED)
    lines = [f"  {text:{max(map(len, shown))}}  {option.meaning}" for text, option in shown.items()]
    return "\n".join([f"python -m {program}{required}", "", summary, "", *lines])


def run(command: Callable[..., str], *, program: str, summary: str, options: Sequence[Option]) -> None:
    """Run a command on the words of the command line, and print the line that it returns, or what went wrong."""
    if {"-h", "--help"} & set(sys.argv):
        print(usage(program, summary, options))
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # for a terminal that knows ASCII alone
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that partial files are removed
    try:
        print(command(**parse(sys.argv[1:], options)))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
