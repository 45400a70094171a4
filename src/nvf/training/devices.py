"""The threads and processes of a run: how many threads torch uses, and how processes start, agree and part."""

import atexit
import logging
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from nvf.errors import InputError, check_number
from nvf.runs.settings import on_one_device

log = logging.getLogger("nvf")
T = TypeVar("T")
ALL_THREADS = torch.get_num_threads()  # the process's own number, before a run sets another
SHARDED = "sharded"  # trainer.strategy for a memory that the devices share
GRACE = 3  # seconds that the other processes have to end once the first one does
REFUSED = ("spawn", "fork", "notebook")  # strategies whose processes begin in the middle of a run


def set_up_torch(*, threads: int | None, deterministic: bool) -> None:
    """Set the number of CPU threads, None for all, and whether the same run must give the same bits.

    `deterministic` takes one thread, because a sum over several threads rounds differently with their number, and
    torch's deterministic algorithms; torch warns of GPU operations that have none.
    """
    if threads is not None:
        check_number("threads", threads, minimum=1, whole=True, remedy="null uses all cores")
    if not isinstance(deterministic, bool):
        raise InputError(f"deterministic={deterministic} is neither true nor false; false is the default")
    if deterministic:
        if threads not in (None, 1):
            log.info("deterministic=true uses one thread, not %d", threads)
        threads = 1
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed size
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it takes time
    torch.set_num_threads(threads or ALL_THREADS)


def start_processes(trainer: Mapping[str, Any], *, threads: int | None) -> int:
    """Start the other processes of a run whose trainer wants several, and return this process's rank.

    Each runs the whole program up to here, with so many threads, or its share of the cores if None. When the first
    process ends, the others are ended too. `trainer` are the arguments that the user gives the Trainer.
    """
    if on_one_device(trainer):
        return 0
    strategy = str(trainer.get("strategy", "auto"))
    if any(word in strategy for word in REFUSED):
        raise InputError(f"trainer.strategy={strategy} is not supported; choose ddp")
    try:
        places = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes") if name in trainer}
        fabric = L.Fabric(**places, strategy="ddp")
    except (MisconfigurationException, TypeError, ValueError) as fault:
        raise refusal(fault) from None
    if fabric.world_size == 1:
        return 0
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # without it, Lightning deals the cores out
    fabric.launch()
    atexit.register(_end, getattr(fabric.strategy.launcher, "procs", []))  # on a cluster there are none
    return fabric.global_rank


def shares_memory(trainer: Mapping[str, Any]) -> bool:
    """Whether the processes of a run share its memory out; they have been started."""
    return trainer.get("strategy") == SHARDED and distributed.is_initialized()


def part_processes() -> None:
    """Leave the group of processes after the last work that they share."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _end(children: list[subprocess.Popen]) -> None:
    """Give the other processes a few seconds to end, then kill them: they may wait for a step that never comes."""
    ending = [*children]
    children.clear()  # Lightning would kill this process when it sees one of them end
    for child in ending:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE)
        child.kill()


def agreed(value: T) -> T:
    """The first process's value, on every process: a value that depends on a clock differs between them."""
    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def largest(device: torch.device, *values: int) -> tuple[int, ...]:
    """The maximum of each value over all processes, by which they decide alike."""
    if not distributed.is_initialized():
        return values
    maxima = torch.tensor(values, device=device)
    distributed.all_reduce(maxima, op=distributed.ReduceOp.MAX)
    return tuple(maxima.tolist())


def refusal(fault: Exception) -> InputError:
    """The error for a user whose arguments of the Trainer Lightning refuses."""
    return InputError(f"trainer: {fault}; correct trainer=, or trainer.<argument>= of lightning.Trainer")
