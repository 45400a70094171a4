"""What a run is about to fit, and about how long that takes: from the sizes alone, not from the clock."""

import math
from collections.abc import Sequence

from nvf.data.queries import Recorded
from nvf.training.build import Built, stages
from nvf.training.plan import steps_of_epoch
from nvf.training.stages import Stage

# What the runs in README.md and docs/ took on two cores.
START, STEP, RATE = 4.0, 0.005, 3e10  # seconds beside the fits, and of a step at least; multiply-adds a second
SEARCHES = 8  # of the test queries in an evaluation, and of the validation queries in the choice of a variant
TIMES = [seconds * unit for unit in (1, 60, 3600) for seconds in (1, 2, 3, 5, 10, 20, 30) if seconds * unit >= 10]


def forecast(built: Built, variants: Sequence[Stage], folds: int | None) -> str:
    """Say what is fitted, of what size, and about how long the run takes on two cores; then what large data are cut to.

    `variants` are the stages 1 that are fitted, none where one is given.
    """
    memory, config = built.source.memory, built.config
    scan = len(memory) * memory.query_dim / RATE  # seconds of one query over all rows
    if isinstance(built.source, Recorded):
        logged, held, tested = (len(built.source.splits[split].queries) for split in ("train", "val", "test"))
    else:
        logged, (held, tested) = 0, built.variants[0].data.samples.values()

    def fitted(stage: Stage, passes: int) -> float:
        """The seconds of a fit whose loss passes so often over the rows of a step, with its validations."""
        steps = stage.fit.epochs * steps_of_epoch(stage)
        share = (getattr(stage.module, "sample", None) or len(memory)) / len(memory)
        return steps * STEP + (steps * stage.data.batch_size * passes * share + stage.fit.epochs * held) * scan

    seconds, told = START + SEARCHES * tested * scan, []
    if variants:
        told.append("stage 1" if len(variants) == 1 else f"{len(variants)} variants of stage 1")
        seconds += sum(fitted(variant, passes=3) + SEARCHES * held * scan for variant in variants)
    if built.reranker is not None and "reranker" in stages(config) and config["reranker_checkpoint"] is None:
        told.append(f"stage 2 with {folds} folds" if folds else "stage 2")
        steps = built.reranker.fit.epochs * steps_of_epoch(built.reranker)
        seconds += steps * STEP + (logged or steps * built.reranker.data.batch_size) * scan
        seconds += ((folds or 1) - 1) * fitted(variants[-1] if variants else built.variants[-1], passes=3)
    if built.joint is not None:
        told.append("both together")
        seconds += fitted(built.joint, passes=6)
    queries = f"{logged:,} queries" if logged else "generated queries"
    sizes = f"{queries}, {len(memory):,} rows of {memory.query_dim} dimensions"
    line = f"{', then '.join(told) or 'nothing to fit'}: {sizes}; {in_words(seconds)} on two cores"
    taken = [f"{name}={value:,}" for name, value in (config["data"].get("plan") or {}).items() if value is not None]
    return f"{line}\nof these a part is taken: {', '.join(taken)}" if taken else line


def in_words(seconds: float) -> str:
    """Return a time in words, rounded to the nearest of a few: 10, 20 or 30 seconds, 1, 2, 3, 5, 10, ... minutes."""
    if not TIMES[0] / 1.5 < seconds < TIMES[-1]:
        return "a few seconds" if seconds < TIMES[0] else "more than a day"
    time = min(TIMES, key=lambda about: abs(math.log(about / seconds)))
    unit, name = next((unit, name) for unit, name in ((3600, "hour"), (60, "minute"), (1, "second")) if time >= unit)
    return f"about {time // unit} {name}{'s' * (time > unit)}"
