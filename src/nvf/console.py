"""What reaches the screen: which process speaks, on which streams, and what other libraries are kept from saying."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("nvf")


def mend_streams() -> None:
    """Let a standard stream that is closed (`2>&-`) lead nowhere, and escape the characters that one cannot encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # the lowest descriptor that is free is the closed one's: no file of ours gets it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write what a run says to a file, and to the screen where the program shows no log of its own."""
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8", delay=True)]
    if not log.hasHandlers():
        handlers.append(logging.StreamHandler(sys.stdout))
    level = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def follows() -> bool:
    """Whether this process is one of several in a run, and not the first, which says what there is to say."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK"))


def quiet() -> None:
    """Keep the screen for what a user wants to know; Lightning sets its level when it is imported."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # that it has looked for fonts is no news
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")  # its use of torch
    for message in (
        "does not have many workers",
        "and your dataloader is not resumable",  # it goes on at the right step
        "exists and is not empty",
        "smaller than the logging interval",
        "It is recommended to use `self.log.*sync_dist=True",  # our metrics add up over processes by themselves
        "`broadcast_buffers` is deprecated",  # its successor is newer than the oldest torch that we run on
    ):
        warnings.filterwarnings("ignore", f".*{message}")
