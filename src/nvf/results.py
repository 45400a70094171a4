"""results.json: what a run found, for other programs to read."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("nvf", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy")


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write the file whole or not at all; NaN, which is not JSON, is refused."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)
