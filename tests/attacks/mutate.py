"""Damaged copies of a file: flipped bits, other bytes, pieces cut out, doubled, moved or made of extreme numbers."""

import random
from collections.abc import Iterator

EXTREMES = [
    value.to_bytes(width, "little", signed=value < 0)
    for width in (1, 2, 4, 8)
    for value in (0, 1, -1, 2 ** (8 * width - 1) - 1, -(2 ** (8 * width - 1)))
]
TEXTS = [b"0", b"-1", b"1e999", b"NaN", b"1000000000000", b"null", b"[]", b"{}", b'""', b"../", b"\x00", b"\xff\xfe"]


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """So many damaged copies, each with one to four faults; the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _damage(copy, rng)
        yield bytes(copy)


def _damage(copy: bytearray, rng: random.Random) -> None:
    # Headers are at either end of most formats, and a few bytes of many.
    size = len(copy)
    near = rng.choice((size, size, min(size, 64), min(size, 512)))
    at = rng.randrange(near + 1) if rng.random() < 0.7 else size - rng.randrange(near + 1)
    length = min(size - at, rng.choice((1, 1, 2, 4, 8, 64, 1024)))
    kind = rng.randrange(8)
    if kind == 0 and at < size:
        copy[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        copy[at : at + length] = rng.randbytes(length)
    elif kind == 2:
        del copy[at:]
    elif kind == 3:
        del copy[at : at + length]
    elif kind == 4:
        copy[at:at] = copy[at : at + length]
    elif kind == 5:
        extreme = rng.choice(EXTREMES)
        copy[at : at + len(extreme)] = extreme
    elif kind == 6:
        text = rng.choice(TEXTS)
        copy[at : at + rng.choice((0, 1, len(text)))] = text
    elif size:
        start = rng.randrange(size)
        copy[at : at + length] = copy[start : start + length]
