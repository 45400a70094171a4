"""Coverage-guided attacks on the readers of pipelines, checkpoints and results; atheris, which it needs, is no extra.

    pip install --target /tmp/atheris atheris==3.0.0
    PYTHONPATH=/tmp/atheris python tests/attacks/fuzz_pipeline.py pipeline -max_total_time=600 -rss_limit_mb=6000

The first word is `pipeline`, `checkpoint` or `results`; the others are libFuzzer's. What is found ends the program and
is left in crash-<hash>, its first byte the number of the file, in the order of FILES.
"""

import logging
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.append(str(Path(__file__).parent.parent))  # where conftest.py and seals.py are

with atheris.instrument_imports(include=["nvf", "json", "zipfile", "pickletools"]):
    import pipeline_doors as doors

    from seals import reseal
from mutate import mutations

from conftest import SMALL, SMALL_STEPS, compose_config
from nvf.train import train

FILES = {
    "pipeline": [door for door in doors.DOORS if door.startswith(("hnsw", "ivf", "kept"))],
    "checkpoint": [door for door in doors.DOORS if door.startswith(doors.CHECKPOINTS)],
    "results": [
        door for door in doors.DOORS if door.endswith((".json", ".npy")) and door.startswith(("run/", "sweeps"))
    ],
}


def run(folder: Path, cache: Path) -> None:
    """A small run."""
    folder.mkdir()
    config = compose_config(*SMALL, *SMALL_STEPS, f"cache={cache}", "dashboards=none", "save_every=1")
    config["trainer"]["enable_progress_bar"] = False
    train(config, folder, started=0.0)


def main() -> None:
    """Fuzz the files of the kind that the first word names, each copy once as it is and once with its hashes right."""
    files = FILES[sys.argv.pop(1)]
    place = Path(tempfile.mkdtemp(prefix="fuzz"))
    doors.furnish(place, run)
    logging.disable(logging.CRITICAL)
    seeds = place / "seeds"
    seeds.mkdir()
    before = {door: (place / door).read_bytes() for door in files}
    for number, door in enumerate(files):
        for i, data in enumerate([before[door], *mutations(before[door], 20, number)]):
            (seeds / f"{number}-{i}").write_bytes(bytes([number]) + data)

    def attempt(data: bytes) -> None:
        if not data:
            return
        door = files[data[0] % len(files)]
        path = place / door
        records = {own: own.read_bytes() for own in path.parent.glob("*.json")}
        path.write_bytes(data[1:])
        try:
            for forged in (False, True):
                if forged:
                    try:
                        reseal(path.parent)
                    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        return
                found = doors.opened(path, door)
                if found.startswith("fault"):
                    raise AssertionError(f"{door}: {found}")
        finally:
            for own, content in {**records, path: before[door]}.items():
                own.write_bytes(content)

    atheris.Setup([sys.argv[0], "-max_len=65536", "-timeout=20", *sys.argv[1:], str(seeds)], attempt)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
