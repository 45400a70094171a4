"""A pipeline's two networks as ONNX graphs, for programs without torch."""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvf.errors import InputError
from nvf.files.atomic import atomic_write
from nvf.models.memory import unit


def write_onnx(folder: Path, pipeline: Any) -> None:
    """Write transform.onnx and reranker.onnx, for any B and k, atomically; without onnxscript that is an InputError.

    The former turns `queries`, (B, D), into `transformed`, as `Pipeline.transform` does. The latter gives stage 2's
    `scores`, (B, k), of stage 1's `logits`, (B, k), and the `evidence`, (B, k, F), or, where it weighs none, of unit
    `queries`, (B, D), unit `candidates`, (B, k, D), and the `logits`; aligned ones, if those of the memory are.
    """
    if find_spec("onnxscript") is None:
        raise InputError("to=onnx needs onnxscript: pip install -e '.[onnx]' in NVF's folder")
    attention, evidence, score = pipeline.attention, pipeline.evidence, pipeline.reranker.forward
    queries, logits = torch.ones(2, attention.query_dim), torch.ones(2, 3)  # a size of 1 would be taken for a constant
    if evidence is not None:
        given = {"logits": logits, "evidence": torch.ones(2, 3, len(evidence.features))}
    else:
        given = {"queries": queries, "candidates": torch.ones(2, 3, attention.query_dim), "logits": logits}
        score = partial(score, beta=attention.beta)
    with atomic_write(folder) as made:
        made.mkdir()
        _write(made / "transform.onnx", lambda queries: attention.transformed(unit(queries)), {"queries": queries})
        _write(made / "reranker.onnx", score, given)


def _write(path: Path, forward: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    graph: Any = nn.Module()  # without the pipeline as its part, whose rows would be written too
    graph.forward = forward
    sizes = tuple({0: "B"} if name == "queries" else {0: "B", 1: "k"} for name in inputs)
    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)  # they tell that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of itself
        how: Any = {"dynamic_shapes": sizes, "external_data": False, "verbose": False, "input_names": [*inputs]}
        output = "scores" if "logits" in inputs else "transformed"
        torch.onnx.export(graph, (*inputs.values(),), path, output_names=[output], **how)
