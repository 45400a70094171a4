"""What reaches the screen: which process speaks, what other libraries may say, and how a run ends in words."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from nvf.errors import InputError, explain, one_line
from nvf.runs.resume import RECORD, remove_traces
from nvf.runs.signals import Stopped, command_to_resume

log = logging.getLogger("nvf")


class Screen(logging.StreamHandler):
    """Where a run's log is seen. On a terminal, the text of `extra={"on_terminal": function}` is made anew.

    The function gets the terminal's `width` in columns, and whether `colour` is wanted; NO_COLOR says that it is not.
    """

    def format(self, record: logging.LogRecord) -> str:
        shown = getattr(record, "on_terminal", None)
        if shown is None or not self.stream.isatty():
            return super().format(record)
        colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return str(record.msg) % shown(width=shutil.get_terminal_size().columns, colour=colour)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write the log of a run to a file, and to the screen unless the program has a log of its own."""
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8", delay=True)]
    if not log.hasHandlers():
        handlers.append(Screen(sys.stdout))
    level, before = log.level, [*log.handlers]
    log.setLevel(logging.INFO)
    log.handlers += handlers
    try:
        yield
    finally:
        log.setLevel(level)
        log.handlers = before
        handlers[0].close()


def follows() -> bool:
    """Tell whether this process is one of several in a run, and not the first, which does the talking."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK"))


def quiet() -> None:
    """Silence what users need not know; Lightning must have been imported, for it then sets its own level."""
    for library in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")  # its use of torch
    for message in (
        "does not have many workers",
        "and your dataloader is not resumable",  # ours resumes at the right step
        "exists and is not empty",
        "smaller than the logging interval",
        "It is recommended to use `self.log.*sync_dist=True",  # our metrics add up over processes by themselves
        "`broadcast_buffers` is deprecated",  # its successor is newer than the oldest torch that we run on
    ):
        warnings.filterwarnings("ignore", f".*{message}")


@contextmanager
def ending_in_words(folder: Path, *, sweep: bool, began: bool, in_turn: bool) -> Iterator[None]:
    """End a run on one line and an exit status, or a job of a `sweep` on an exception, whatever goes wrong.

    The folder is removed if nothing was fitted, in this run or before it (`began`). Where the jobs of a sweep run
    `in_turn` in this process, a signal ends the sweep; elsewhere it ends the job alone.
    """
    try:
        yield
    except InputError as error:
        if follows():
            sys.exit(0)  # the first process says the same; another status makes Lightning kill it before it does
        if not (sweep or began):
            remove_traces(folder)
        _fail(str(error), sweep)
    except Exception as fault:
        if (words := explain(fault, folder)) is None:
            log.exception("the run failed")
            words = f"{one_line(fault)}; its traceback is in {folder}/train.log"
        elif (folder / RECORD).exists():
            words += f"; then {command_to_resume(folder)}"
        else:
            remove_traces(folder)
        _fail(words, sweep)
    except SystemExit as stop:
        if not follows():
            why = f"stopped by {stop.name}" if isinstance(stop, Stopped) else "stopped"
            if (folder / RECORD).exists():
                log.error("%s; to resume: %s", why, command_to_resume(folder))
            else:
                log.error("%s before anything was fitted", why)
                remove_traces(folder)
        if sweep and not in_turn:
            _fail(f"the job in {folder} was stopped", sweep)
        sys.exit(stop.code or 143)


def _fail(words: str, sweep: bool) -> NoReturn:
    if not sweep:
        sys.exit(f"error: {words}")
    from hydra.errors import CompactHydraException  # not every exception survives the way between processes

    log.error("%s", words)
    raise CompactHydraException(f"error: {words}") from None
