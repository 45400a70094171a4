"""Independent random streams, all drawn from one seed; each has a name, and no two draw the same numbers."""

import zlib

import numpy as np
import torch

from nvf.errors import check_number


def stream_seed(seed: int, name: str, *position: int) -> int:
    """Return 64 bits for one seed, stream and position in it; an InputError if the seed is no integer of at least 0."""
    check_number("seed", seed, minimum=0, whole=True, remedy=f"any such number draws a {name} of its own")
    entropy = [seed, zlib.crc32(name.encode()), *position]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def stream(seed: int, name: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator with that seed."""
    return torch.Generator(device).manual_seed(stream_seed(seed, name, *position))
