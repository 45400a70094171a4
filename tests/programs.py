"""Our commands as processes: interpreters of their own, or quick ones, forked from one that has imported the libraries.

To start an interpreter and import torch and lightning takes seconds, which is most of what a small run takes. A quick
process is a real one, with its own folder, streams, signals and exit status; what only a new interpreter shows (what is
imported when, the environment that Python itself reads, processes that it starts in turn) needs a fresh one.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 1800  # seconds that a process may take on the busiest machine; none of them decides what is found
LIBRARIES = ["hydra", "lightning", "matplotlib.figure", "safetensors.torch", "scipy.stats", "tensorboard.summary"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)


def fresh_start(module: str, words: str, slow: set[str], cwd: Path | None = None) -> list[str]:
    """The lines that a new `python -m module words` prints, and as the last one what it has imported of `slow`."""
    use = (
        "import runpy, sys; module, words, slow = sys.argv[1:]; sys.argv[1:] = words.split();"
        "runpy.run_module(module, run_name='__main__'); print(sorted(set(slow.split()) & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", use, module, words, " ".join(slow)]
    return subprocess.run(argv, cwd=cwd, env=os.environ, capture_output=True, text=True, check=True).stdout.splitlines()


class Program:
    """A quick process of one of our commands; as a context, it does not outlive the block.

    Args:
        arguments: the words of the command.
        cwd: where it is typed.
        module: the command, as in `python -m nvf.train`.
        at: the signal that the process sends itself when, for the n-th time, it puts a file of this name in its place;
            so a test interrupts it at one place, however busy the machine is.
        environment: what is added to the environment.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        module: str = "nvf.train",
        at: tuple[signal.Signals, str, int] | None = None,
        **environment: str,
    ) -> None:
        self._streams = tempfile.TemporaryDirectory()
        self.said = [Path(self._streams.name) / name for name in ("stdout", "stderr")]
        for path in self.said:
            path.touch()
        how = (module, arguments, str(cwd), {**os.environ, **environment}, [str(path) for path in self.said], at)
        self._process = SERVER.Process(target=_become, args=how)
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
        self._process.join()
        self._streams.cleanup()

    @property
    def stdout(self) -> str:
        return self.said[0].read_text()

    @property
    def stderr(self) -> str:
        return self.said[1].read_text()

    def ended(self) -> bool:
        return self._process.exitcode is not None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status, or minus the number of the signal that killed it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"still running after {seconds} s\n{self.stdout}{self.stderr}")
        return self._process.exitcode

    def wait_until_stopped(self) -> None:
        """Wait until SIGSTOP has come."""
        wait_for(lambda: state(self.pid) == "T", unless=self.ended)

    def children(self) -> list[int]:
        """The processes that it has started."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]


def state(pid: int) -> str:
    """The letter that ps has for the state of a process, T where it was stopped; Z, too, where there is none."""
    return subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True).stdout.strip() or "Z"


def wait_for(condition: Callable[[], Any], *, unless: Callable[[], bool] = lambda: False) -> None:
    """Wait until something holds; it is an error if it cannot any more."""
    end = time.monotonic() + PATIENCE
    while not condition():
        over = unless()
        assert not over or condition(), "it ended before"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def command(
    *arguments: str, cwd: Path, module: str = "nvf.train", fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m nvf.train`, or another module of ours, as a user types it; fresh in an interpreter of its own.

    A variable that Python reads when it starts makes it fresh, too.
    """
    words = [sys.executable, "-m", module, *arguments]
    if fresh or any(name.startswith("PYTHON") for name in environment):
        return subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    with Program(*arguments, cwd=cwd, module=module, **environment) as program:
        status = program.wait()
        return subprocess.CompletedProcess(words, status, program.stdout, program.stderr)


def _become(
    module: str,
    arguments: tuple[str, ...],
    cwd: str,
    environment: dict[str, str],
    said: list[str],
    at: tuple[signal.Signals, str, int] | None,
) -> None:
    """Be `python -m module arguments` in the process that was forked."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(said, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    if at is not None:
        sys.addaudithook(_interruption(*at))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # As an interpreter does at its end, and multiprocessing too late: it waits for joblib's idle workers before.
        threading._shutdown()  # type: ignore[attr-defined]


def _interruption(number: signal.Signals, name: str, times: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that sends this process a signal when it puts a file in its place for the n-th time."""
    left = times

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    return hook
