"""Joint training next to separate training with the same number of steps; run on request.

    python tests/benchmarks/joint.py [data.dir=path/to/folder,...] [seeds=0,1,2] [only=nearest,noisy] [folder=...]

On each of the generated settings below, and on every folder that `data.dir` names, with each seed: both stages fitted
apart; joint training from there, with the exact distribution and with relaxed candidates; and both stages fitted apart
once more, with the steps of joint training given to stage 1, or half of them to each stage. Each is one run of
`python -m nvf.train` without a time budget, in a folder of its own; runs that are there already are not repeated.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hydra import compose, initialize_config_dir

from nvf.train import CONF

GENERATED = {
    "nearest": [],
    "noisy": ["queries=noisy"],
    "warped by a rotation": ["queries=warped", "queries.warp=rotation"],
    "warped by an mlp": ["queries=warped", "queries.warp=mlp"],
}
APART = "apart"
TITLES = ("setting", "training", "stage 1", "coverage", "pipeline Top-1", "oracle", "ECE", "won/lost", "seconds")


def methods(overrides: Sequence[str], checkpoint: Path) -> dict[str, list[str]]:
    """What each method adds to the overrides of a setting; `checkpoint` is that of the first one's reranker."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*overrides, "stage=joint"])
    attention, reranker, joint = config.attention, config.reranker, config.joint
    more = joint.epochs * attention.batch_size // joint.batch_size  # where an epoch is a pass, it has more steps
    half = more // 2
    resume = f"reranker_checkpoint={checkpoint}"
    return {
        APART: ["stage=reranker"],
        "together": ["stage=joint", resume],
        "together, relaxed": ["stage=joint", "joint=relaxed", resume],
        "apart, longer: stage 1": ["stage=reranker", f"attention.epochs={attention.epochs + more}"],
        "apart, longer: both": [
            "stage=reranker",
            f"attention.epochs={attention.epochs + more - half}",
            f"reranker.epochs={reranker.epochs + half}",
        ],
    }


def run(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """results.json of one run, made if it is not there."""
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "nvf.train", *overrides]
        with (folder / "output.txt").open("w") as output:
            quiet = ["trainer.enable_progress_bar=false", f"hydra.run.dir={folder}"]
            subprocess.run([*command, *quiet], stdout=output, stderr=subprocess.STDOUT, check=True)
    return json.loads((folder / "results.json").read_text())


def row(setting: str, method: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The means over seeds, in percent."""

    def percent(*path: str) -> str:
        values = []
        for results in found:
            value: Any = results["test"]
            for name in path:
                value = value and value[name]
            values.append(value)
        return "-" if None in values else f"{100 * mean(values):.2f}"

    fits = [results["joint"] for results in found]
    against = "-" if None in fits else ", ".join(f"{f['against']['wins']}/{f['against']['losses']}" for f in fits)
    return [
        setting,
        method,
        percent("attention", "top1", "value"),
        percent("coverage", "value"),
        percent("pipeline", "top1", "value"),
        percent("oracle", "top1", "value"),
        percent("calibration_error", "pipeline", "value"),
        against,
        f"{mean(results['seconds']['total'] for results in found):.0f}",
    ]


def main(arguments: Sequence[str]) -> None:
    """Print the table, a row a setting and method, as the rows are ready."""
    given = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    folders = [path for path in given.get("data.dir", "").split(",") if path]
    settings = {
        **GENERATED,
        **{Path(path).name: ["data=embeddings", f"data.dir={path}", "data.work=null"] for path in folders},
    }
    only, home = given.get("only"), Path(given.get("folder", "outputs/joint")).resolve()
    print("| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|")
    for setting, overrides in settings.items():
        if only is not None and setting not in only.split(","):
            continue
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in given.get("seeds", "0,1,2").split(","):
            at = home / setting.replace(" ", "-").replace(",", "") / seed
            checkpoint = at / APART / "checkpoints/reranker/best.safetensors"
            for method, more in methods(overrides, checkpoint).items():
                name = method.replace(" ", "-").replace(",", "").replace(":", "")
                results = run([*overrides, *more, f"seed={seed}"], at / name)
                found.setdefault(method, []).append(results)
                print(setting, seed, method, results["test"]["pipeline"]["top1"]["value"], file=sys.stderr, flush=True)
        for method, several in found.items():
            print("| " + " | ".join(row(setting, method, several)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
