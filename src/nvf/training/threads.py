"""How torch computes in a run: on how many threads, and whether the same to the last bit whatever their number."""

import logging
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from nvf.errors import InputError, check_number
from nvf.runs.resume import versions

log = logging.getLogger("nvf")
ALL = torch.get_num_threads()  # the process's own number, before a run sets another
TUNED_BY = ("MKL_", "ONEDNN_", "DNNL_", "CUBLAS_", "NVIDIA_TF32_", "TORCH_ALLOW_TF32_")  # environment variables


def set_up_torch(*, threads: int | None, deterministic: bool) -> None:
    """Set the number of CPU threads, None for all, and what torch may do faster but not twice alike.

    On several threads a sum is the sum of as many parts, and rounds by their number; so `deterministic` takes one. On a
    GPU it takes torch's deterministic algorithms, and where there is none warns of the operation.

    Raises:
        InputError: a bad number, or `deterministic` is neither true nor false.
    """
    if threads is not None:
        check_number("threads", threads, minimum=1, whole=True, remedy="null uses all cores")
    if not isinstance(deterministic, bool):
        raise InputError(f"deterministic={deterministic} is neither true nor false; false is the default")
    if deterministic:
        if threads not in (None, 1):
            log.info("deterministic=true: on one thread, not on %d", threads)
        threads = 1
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS takes what is free
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling memory that is then written anyway takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(ALL if threads is None else threads)


def arithmetic() -> dict[str, Any]:
    """Everything beside settings, data and our code that a result's last bits depend on, as JSON values.

    Libraries choose their routines by the processor and by their own environment variables.
    """
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability(), *sorted({*names})],
        "devices": [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())] if cuda else [],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TUNED_BY)},
        "matmul precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }
