"""Settings under flat dotted names, and which of them leave the figures of a run as they are."""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

# These say how a run is made, not what it finds: runs that differ in nothing else are equal to a sweep, a comparison
# and the cache. A name includes all settings below it.
IMMATERIAL = (
    *("cache", "resume", "save_every", "threads", "dashboards", "logger", "callbacks.progress", "hydra"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under their dotted names; a list is one value."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def matters(name: str) -> bool:
    """Tell whether the figures may depend on the setting of this name."""
    return not any(f"{name}.".startswith(f"{other}.") for other in IMMATERIAL)


def material(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat settings that the figures may depend on."""
    return {name: value for name, value in flatten(config).items() if matters(name)}


def canonical(value: Any) -> str:
    """Return a text that is equal for equal values: 1 and 1.0 are equal, 1 and true are not."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def key(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return a key that is equal for equal flat settings."""
    return tuple(sorted((name, canonical(value)) for name, value in settings.items()))


def on_one_device(trainer: Mapping[str, Any]) -> bool:
    """Tell whether a Trainer with these arguments needs no other process."""
    return trainer.get("devices", "auto") in (1, "1") and trainer.get("num_nodes", 1) == 1


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value has a place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
