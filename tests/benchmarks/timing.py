"""What the benchmarks share: runs taken in turn, peaks of memory, the real configuration, and the record of a run.

A comparison is made within one process, with as many threads for either side, its repeats in turn (A, B, A, B, ...)
after a warm-up, and given as medians and their ratio: what else the machine does then falls on both.
"""

import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

from nvf.console import quiet
from nvf.files.atomic import atomic_write
from nvf.options import Option, path, whole
from nvf.train import CONF
from nvf.training import fit as fitting

OUTPUTS = CONF.parent / "outputs" / "benchmarks"
PACKAGES = {"torch": "torch", "faiss": "faiss-cpu", "lightning": "lightning", "numpy": "numpy"}
MOST_CALLS = 1000  # of a function in one repeat
FRESH = 3  # repeats at least
COMMON = (
    Option("threads", "of the CPU, for everything that is measured", 2, whole),
    Option("folder", "where the figures go, as <benchmark>.json", OUTPUTS, path),
)


def whole_numbers(text: str) -> list[int]:
    """Whole numbers with commas between; 1e6 is one."""
    return [int(float(word)) for word in text.split(",")]


def in_turn(measures: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each measure returns, `repeats` times, in turn, after a warm-up."""
    rounds = [[measure() for measure in measures.values()] for _ in range(repeats + 1)][1:]
    return dict(zip(measures, map(list, zip(*rounds, strict=True)), strict=True))


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, least: float = 0.02, budget: float = 20.0
) -> dict[str, float]:
    """Median seconds of a call of each function; the repeats are in turn, after a warm-up.

    Args:
        functions: what is called.
        repeats: at most.
        least: seconds of a repeat at least: what is shorter is called several times in it.
        budget: seconds for all repeats together, about; three there are in any case.
    """
    calls = {}
    for name, function in functions.items():
        took = seconds(function)
        took = took if took > least else min(took, seconds(function))  # the first call may prepare something
        calls[name] = max(1, min(MOST_CALLS, round(least / took)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= FRESH and time.perf_counter() - started > budget * (1 - 1 / (turn + 1)):
            break
        for name, function in functions.items():
            found[name].append(seconds(function, calls[name]))
    return {name: median(several) for name, several in found.items()}


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Of one call, as a mean over several."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors at a time that the function allocates, above what is there when it starts.

    Counted by torch's allocator, temporaries within operations included; the buffers of MKL and of Python are not.
    """
    with _unheard(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _unheard() -> Iterator[None]:
    """Inside, nothing is written to stderr: the profiler says, in C++, that it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_rss(function: Callable[[], object]) -> int:
    """By how many bytes the process grows at most while the function runs: everything counts. Linux alone.

    A first call is what to measure, in a fresh process: what an earlier one has left behind does not count.
    """
    ctypes.CDLL(None).malloc_trim(0)  # or the function would grow into what is freed but not given back
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def settings(*overrides: str) -> dict[str, Any]:
    """The configuration that `python -m nvf.train` runs with these words, as plain containers."""
    quiet()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    return config


@contextmanager
def watched_by(callback: Callback) -> Iterator[None]:
    """Inside, every trainer that a fit makes has one callback more."""
    make = fitting._trainer

    def with_callback(settings: Any, data: Any, last: Any, callbacks: list[Callback], *more: Any, **ours: Any) -> Any:
        return make(settings, data, last, [*callbacks, callback], *more, **ours)

    with mock.patch.object(fitting, "_trainer", with_callback):
        yield


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that is aligned as plain text too: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    return "\n".join([line(titles), line(rule), *map(line, rows)])


def machine(threads: int) -> dict[str, Any]:
    """What a benchmark ran on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "ram_gb": round(ram / 2**30, 1)}


def versions() -> dict[str, str | None]:
    """Of Python and of what the figures rest on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_json(name: str, figures: Any, options: Mapping[str, Any]) -> Path:
    """Write <folder>/<name>.json, whole or not at all: the figures, what they were measured with, where and when."""
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(options["threads"]),
        "versions": versions(),
        "options": {option: value for option, value in options.items() if option != "folder"},
        "figures": figures,
    }
    target = Path(options["folder"]) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return target
