"""What a run was made with, for its results.json and its run.json."""

import platform
from importlib.metadata import version

PACKAGES = ("nvf", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy")


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
