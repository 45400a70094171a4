"""How SIGINT, SIGTERM and Slurm's SIGUSR1 end a run: between two steps, once the stage is saved."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal has ended the run; the exit status is 128 + its number: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def stop_when_asked() -> None:
    """Raise `Stopped` on SIGINT and SIGTERM from now on; on Slurm, ignore SIGUSR1, which would kill the process."""
    for number in ASKS_TO_STOP:
        _handle(number, _stop)
    _handle(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the signal handlers of the program that called us when the block ends."""
    before = {number: signal.getsignal(number) for number in (*ASKS_TO_STOP, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            _handle(number, signal.SIG_DFL if handler is None else handler)


def restarted() -> bool:
    """Tell whether this process belongs to a Slurm job that was requeued."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def command_to_resume(folder: object) -> str:
    """Return what to type to resume a run or a sweep."""
    return f"{os.path.basename(sys.executable)} -m nvf.train resume={folder}"


class Deferred:
    """While a stage is fitted, a signal waits for the end of its step; the same signal again stops the run at once.

    On SIGUSR1, Lightning's plugin has a Slurm job requeued.
    """

    def __init__(self) -> None:
        self.asked = 0  # the number of the signal that waits
        self._requeue: Handler = None

    def await_lightning(self) -> None:
        """Leave SIGUSR1 to Lightning, which installs its handler only where there is none."""
        _handle(signal.SIGUSR1, signal.SIG_DFL)

    def install(self) -> None:
        """Replace Lightning's handlers; with several processes, its answer to SIGTERM waits for ever."""
        for number in ASKS_TO_STOP:
            _handle(number, self._note)
        if callable(theirs := signal.getsignal(signal.SIGUSR1)) and theirs != self._note:
            self._requeue = theirs
            _handle(signal.SIGUSR1, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked == number and number in ASKS_TO_STOP:
            _stop(number, frame)
        self.asked = number

    def answer(self, asked: int) -> None:
        """Stop, or have the job requeued and train on until Slurm ends it; the stage has been saved."""
        if asked in ASKS_TO_STOP:
            _stop(asked, None)
        self.asked = 0
        if callable(self._requeue):
            self._requeue(signal.SIGUSR1, None)

    def answer_late(self) -> None:
        """Stop if that was asked for after the last step, and defer no signal from now on."""
        stop_when_asked()
        if self.asked in ASKS_TO_STOP:
            _stop(self.asked, None)


def _handle(number: int, handler: Handler) -> None:
    """Set a handler where Python allows it, in the main thread; that of SIGUSR1 on Slurm alone."""
    ours = number != signal.SIGUSR1 or "SLURM_JOB_ID" in os.environ
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
