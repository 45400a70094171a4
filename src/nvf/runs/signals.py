"""Signals: how SIGINT, SIGTERM and a cluster's request to make room end a run, within a step and with nothing lost."""

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
    """From now on SIGINT and SIGTERM raise `Stopped`; a request to make room is left to the next stage's fit."""
    for number in ASKS_TO_STOP:
        _handle(number, _stop)
    _handle_request(signal.SIG_IGN)  # it would kill the process


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Give a program that is not ours its own handlers back when the block ends."""
    theirs = {number: signal.getsignal(number) for number in (*ASKS_TO_STOP, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in theirs.items():
            _handle(number, signal.SIG_DFL if handler is None else handler)


def restarted() -> bool:
    """Whether this process belongs to a Slurm job that was requeued."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


class Deferred:
    """While a stage is fitted, signals wait for the end of its step. A second one does not.

    Slurm's request to make room, SIGUSR1, is answered by Lightning's own plugin, which requeues the job; but it comes
    in the middle of a step, and is passed on between two.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self._requeue: Handler = None

    def await_lightning(self) -> None:
        """Leave the request to make room to Lightning's plugin, which takes it only where nobody else does."""
        _handle_request(signal.SIG_DFL)

    def install(self) -> None:
        """Put ours before Lightning's handlers, which it installs anew for each fit and validation.

        With several processes its answer to SIGTERM waits for ever.
        """
        for number in ASKS_TO_STOP:
            _handle(number, self._note)
        if callable(theirs := signal.getsignal(signal.SIGUSR1)) and theirs != self._note:
            self._requeue = theirs
            _handle_request(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked == number and number in ASKS_TO_STOP:
            _stop(number, frame)
        self.asked = number

    def answer(self, asked: int) -> None:
        """Stop, or have the job requeued and go on until Slurm ends it; the stage is saved."""
        if asked in ASKS_TO_STOP:
            _stop(asked, None)
        self.asked = 0
        if callable(self._requeue):
            self._requeue(signal.SIGUSR1, None)

    def answer_late(self) -> None:
        """Stop if that was asked for after the last step; from now on signals are not deferred."""
        stop_when_asked()
        if self.asked in ASKS_TO_STOP:
            _stop(self.asked, None)


def _handle(number: int, handler: Handler) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
        signal.signal(number, handler)


def _handle_request(handler: Handler) -> None:
    if "SLURM_JOB_ID" in os.environ:
        _handle(signal.SIGUSR1, handler)


def command_to_resume(folder: object) -> str:
    """What to type to go on with a run or a sweep."""
    return f"{os.path.basename(sys.executable)} -m nvf.train resume={folder}"
