"""results.json: what a run found, for other programs to read."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvf.whole import written_whole

PACKAGES = ("nvf", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy")


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write the file whole or not at all; NaN, which is not JSON, is refused."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
