"""Makes the hashes of an edited folder right again, as a forger would."""

import json
from pathlib import Path

from nvf.files.records import sealed, sha256


def reseal(folder: Path) -> None:
    """Of a pipeline's folder; of files that are there."""
    record = folder / "config.json"
    config = json.loads(record.read_text())
    config.pop("digest")
    config["sha256"] = {name: sha256(folder / name) for name in config["sha256"] if (folder / name).is_file()}
    index = folder / "index.safetensors"
    if isinstance(config.get("index"), dict) and index.is_file():
        config["index"]["sha256"] = sha256(index)
    record.write_text(json.dumps(sealed(config)))
