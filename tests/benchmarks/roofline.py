"""How near searches and training steps come to what the device can do at most; for a GPU, or the CPU.

    python tests/benchmarks/roofline.py [device=cuda] [rows=1e6] [dim=128] [repeats=10]

The roof is measured here, not read from a data sheet: the rate of a large square product in the same type, and that of
a copy. A case's bound is the longer of its arithmetic at that rate and its least traffic at that bandwidth; `of the
roof` is the bound over the time it took. Beside the exact search stands what the library would need for the scores
alone, all of them at once: a product and a top-k.
"""

import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch

from nvf.data.queries import Noisy
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker, reranker_loss
from nvf.models.saved_pipeline import find_device
from nvf.ops.cross_entropy import stratified
from nvf.ops.random_streams import stream
from nvf.options import Option, run, whole
from timing import COMMON, table, whole_numbers, write_json

OPTIONS = (
    Option("device", "cpu, cuda, cuda:1; auto: the GPU where there is one", "auto"),
    Option("rows", "of the memory", [1_000_000], whole_numbers),
    Option("dim", "of the vectors", 128, whole),
    Option("batch", "queries of a training step", 512, whole),
    Option("sample", "rows of a sampled step", 8192, whole),
    Option("repeats", "of every measurement", 10, whole),
    *COMMON,
)
K = 5
SQUARE = {"cpu": 2048, "cuda": 8192}  # of the product that measures the roof
COPIED = 2**25  # numbers of the copy


class Case(NamedTuple):
    """Something to time, and the least that it has to do."""

    name: str
    function: Callable[[], object]
    flops: float
    bytes: float


def roofline(*, device: str, rows: list[int], dim: int, batch: int, sample: int, repeats: int, **options: Any) -> str:
    """Measure the roof, then every case; returns the table."""
    torch.set_num_threads(options["threads"])
    where = find_device(device)
    rate, bandwidth = roof(where, repeats)
    found, lines = [], []
    for count in rows:
        for case in cases(where, count, dim, batch, sample):
            took = device_seconds(case.function, where, repeats)
            bound = max(case.flops / rate, case.bytes / bandwidth)
            found.append({"rows": count, "case": case.name, "seconds": took, "bound": bound})
            times = (f"{1e3 * took:.3f}", f"{1e3 * bound:.3f}", f"{100 * bound / took:.0f}%")
            lines.append([case.name, f"{count:,}", *times])
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    figures = {"device": name, "flops_per_second": rate, "bytes_per_second": bandwidth, "cases": found}
    path = write_json("roofline", figures, {"rows": rows, "dim": dim, "batch": batch, "sample": sample, **options})
    titles = ("case", "rows", "ms", "bound, ms", "of the roof")
    head = f"{name}: {rate / 1e12:.2f} TFLOP/s and {bandwidth / 1e9:.0f} GB/s, measured in float32"
    return f"{head}\n\n{table(titles, lines)}\n\n{path}"


def roof(device: torch.device, repeats: int) -> tuple[float, float]:
    """Operations a second of a large product, and bytes a second of a copy."""
    size = SQUARE[device.type]
    square, source = torch.randn(size, size, device=device), torch.randn(COPIED, device=device)
    target = torch.empty_like(source)
    product = device_seconds(lambda: square @ square, device, repeats)
    copy = device_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * size**3 / product, 2 * source.nbytes / copy


def cases(device: torch.device, rows: int, dim: int, batch: int, sample: int) -> Iterator[Case]:
    """Searches, and the training steps of both stages: forward and backward."""
    memory = VectorMemory.synthetic(rows=rows, dim=dim, seed=0).to(device)
    pipeline = Pipeline(SoftAttention(memory, transform="linear"), Reranker(dim, kind="residual"), k=K).to(device)
    source, size = Noisy(memory, sigma=0.1), 4 * rows * dim
    for count in (1, 32, 1024):
        asked = source.sample(count, stream(0, "test", device=device)).queries
        flops = 2 * count * rows * dim
        yield Case(f"library: product and top-k, {count}", lambda a=asked: (a @ memory.rows.T).topk(K), flops, size)
        yield Case(f"exact search, {count}", lambda a=asked: memory.search(a, K), flops, size)
        yield Case(f"pipeline search, {count}", lambda a=asked: pipeline.search(a), flops, size)
    attention, (queries, targets, *_) = pipeline.attention, source.sample(batch, stream(0, "train", device=device))
    chosen = stratified(rows, sample, stream(0, "sample", device=device)) if sample <= rows else None
    yield Case(
        "step of stage 1, exact",
        lambda: attention.loss(queries, targets).backward(),
        4 * batch * rows * dim,  # scores, and the keys that they weigh
        size,
    )
    if chosen is not None:
        yield Case(
            "step of stage 1, sampled",
            lambda: attention.sampled_loss(queries, targets, sample=chosen).backward(),
            4 * batch * sample * dim,
            4 * sample * dim,
        )
    top = attention.candidates(queries, K)
    hidden, last = pipeline.reranker.settings["hidden"]
    yield Case(
        "step of stage 2",
        lambda: reranker_loss(pipeline.score(queries, top.rows, top.scores, None), top.rows == targets).backward(),
        6 * batch * (K * (2 * dim * hidden + hidden * last) + dim * hidden),
        3 * 4 * batch * K * dim,
    )


def device_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after two to warm up, the device's work included."""

    def once() -> float:
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        return time.perf_counter() - started

    return median([once() for _ in range(repeats + 2)][2:])


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run(roofline, program=sys.argv[0], summary=(__doc__ or "").partition(";")[0], options=OPTIONS)
