"""How a run ends: in a line of words and an exit status, whatever goes wrong."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.errors import CompactHydraException

from nvf.console import follows
from nvf.errors import InputError, explain, one_line
from nvf.runs.resume import RECORD, remove_traces
from nvf.runs.signals import Stopped, command_to_resume

log = logging.getLogger("nvf")


@contextmanager
def ending_in_words(folder: Path, *, sweep: bool, began: bool, in_turn: bool) -> Iterator[None]:
    """End a run, or a job of a sweep, on one line and an exit status, whatever goes wrong in the block.

    Args:
        folder: of the run.
        sweep: whether it is a job of one, which must raise: exit statuses would end the sweep with success.
        began: whether it began to fit before, and is resumed; else its traces go.
        in_turn: whether the sweep's jobs run in this process.
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
        if (words := explain(fault, folder)) is not None:
            if (folder / RECORD).exists():
                _fail(f"{words}; then {command_to_resume(folder)}", sweep)
            remove_traces(folder)
            _fail(words, sweep)
        log.exception("the run failed")
        if not sweep:
            sys.exit(1)
        # The launchers send it from process to process, which not every exception survives.
        raise CompactHydraException(f"error: {one_line(fault)}; its traceback is in {folder}/train.log") from None
    except SystemExit as stop:
        if not follows():
            why = f"stopped by {stop.name}" if isinstance(stop, Stopped) else "stopped"
            if (folder / RECORD).exists():
                log.error("%s; to go on: %s", why, command_to_resume(folder))
            else:
                log.error("%s before anything was fitted", why)
                remove_traces(folder)
        if sweep and not in_turn:
            raise CompactHydraException(f"error: the job of {folder} was stopped") from None  # the others go on
        sys.exit(stop.code or 143)


def _fail(words: str, sweep: bool) -> NoReturn:
    if sweep:
        log.error("%s", words)
        raise CompactHydraException(f"error: {words}") from None
    sys.exit(f"error: {words}")
