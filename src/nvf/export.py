"""`python -m nvf.export`: give a pipeline's keys to an index of your own, or its networks to other programs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from nvf.embed import load_model
from nvf.errors import InputError
from nvf.files.atomic import atomic_write, check_new
from nvf.files.ids import write_ids
from nvf.options import Option, run
from nvf.options import path as path_of

OPTIONS = (
    Option("pipeline", "the folder that a run saved: outputs/<date>/<time>/pipeline", read=path_of),
    Option("to", "a file of keys: .npy, .safetensors or .parquet; or qdrant, sentence-transformers, onnx"),
    Option("collection", "of Qdrant: made with the keys, or its points get them as a vector more", None),
    Option("url", "of a Qdrant server, whose key is read from the environment, QDRANT_API_KEY; or", None),
    Option("path", "of a local storage of qdrant-client, its folder", None, path_of),
    Option("vector", "what the keys are called in the collection; null: nvf", None),
    Option("model", "a sentence-transformers model, the one of your queries: its name, or its folder", None),
    Option("output", "the folder to make, for sentence-transformers and onnx", None, path_of),
)
ENDINGS = (".npy", ".safetensors", ".parquet")
TAKES = {  # what each kind must be given, and may be given
    "qdrant": (("collection",), ("url", "path", "vector")),
    "sentence-transformers": (("model", "output"), ()),
    "onnx": (("output",), ()),
}


def export(*, pipeline: Path, to: str, **given: Any) -> str:
    """Export a pipeline; return the line that says what was written, and what to do with it."""
    # Imported here so that --help and an option's error answer without importing torch.
    from nvf.models.onnx_files import write_onnx
    from nvf.models.pipeline import Pipeline

    file, output = path_of(to), given["output"]
    if to not in TAKES and (file.suffix not in ENDINGS or file.is_dir()):
        raise InputError(f"to={to} is a folder, or none of {', '.join((*ENDINGS, *TAKES))}; give one of them")
    must, may = TAKES.get(to, ((), ()))
    for name, value in given.items():
        if name in must if value is None else name not in (*must, *may):
            remedy = f"give {name}=" if value is None else "leave it out"
            raise InputError(f"{name}={value} does not go with to={to}; {remedy}")
    if output:
        check_new(output)

    model = Pipeline.load(pipeline, index=False)
    if to == "onnx":
        write_onnx(output, model)
        return f"{output}: transform.onnx makes queries for the keys, reranker.onnx scores what they find"
    if to == "sentence-transformers":
        _write_encoder(output, model, given["model"])
        return f"{output}: SentenceTransformer({str(output)!r}).encode_query(texts) makes queries for the keys"
    keys, ids, asked = model.keys(), model.memory.ids, "inner products with pipeline.transform(queries)"
    if to == "qdrant":
        from nvf.data.qdrant import write_vectors

        place = {name: given[name] for name in (*must, *may)} | {"vector": given["vector"] or "nvf"}
        write_vectors(range(len(keys)) if ids is None else ids.tolist(), keys.float().numpy(), **place)
        to = f"collection {given['collection']}, vector {place['vector']}"
    else:
        write_keys(file, keys, ids)
    return f"{len(keys):,} keys of {keys.shape[1]} dimensions in {to}; search them by {asked}"


def write_keys(path: Path, keys: Any, ids: np.ndarray | None) -> None:
    """Write keys, (N, D') in the order of the vectors as given, and ids in place of earlier ones, or neither.

    .npy, .safetensors   the keys, in the latter under the name `keys`; the ids of keys.npy are in keys.ids.json
    .parquet             columns `id`, which are row numbers where there are no ids, and `vector`
    """
    import torch
    from safetensors.torch import save_file

    beside, keys = path.with_suffix(".ids.json"), keys.cpu().contiguous()
    array = (keys.float() if keys.dtype == torch.bfloat16 else keys).numpy()  # numpy has no bfloat16
    with ExitStack() as files:
        partial = files.enter_context(atomic_write(path))
        if path.suffix == ".parquet":
            from nvf.data.parquet import pa, pq  # pyarrow, which is an extra

            large = ids is not None and ids.dtype == object and not isinstance(ids[0], str)  # integers above 2**63
            named = pa.array(range(len(keys)) if ids is None else ids.tolist(), pa.uint64() if large else None)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
            return pq.write_table(pa.table({"id": named, "vector": lists}), partial)
        if path.suffix == ".safetensors":
            save_file({"keys": keys}, partial)
        else:
            with partial.open("wb") as file:
                np.save(file, array)
        if ids is not None:
            return write_ids(ids, files.enter_context(atomic_write(beside)))
    beside.unlink(missing_ok=True)  # of an earlier pipeline's keys


def _write_encoder(folder: Path, pipeline: Any, name: str) -> None:
    """Write a sentence-transformers model, with stage 1's transform as layers behind it, atomically."""
    import torch

    from nvf.models.memory import check_dim

    attention, dim = pipeline.attention, pipeline.memory.query_dim
    if (kind := attention.settings["transform"]) not in ("linear", "identity"):
        raise InputError(f"to=sentence-transformers takes attention=linear or identity, not {kind}; give to=onnx")
    encoder = load_model(name, torch.device("cpu")).float()  # the keys are not halved either
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    check_dim(encoder.get_embedding_dimension(), dim, f"model={name}")
    matrix, one, layers = attention.transform(torch.eye(dim)).T.contiguous(), torch.eye(dim + 1), [Normalize()]
    if (alignment := pipeline.memory.alignment) is not None:
        turn, shift = alignment.whitening.T.contiguous(), -alignment.centre @ alignment.whitening
        layers += [Dense(dim, dim, activation_function=None, init_weight=turn, init_bias=shift), Normalize()]
    layers.append(Dense(dim, dim, bias=False, activation_function=None, init_weight=matrix))
    layers += [Normalize()] * attention.normalize
    if attention.bias is not None:  # a 1 more, which meets the bias
        weight, bias = one[:, :dim].clone(), one[dim].clone()
        layers.append(Dense(dim, dim + 1, activation_function=None, init_weight=weight, init_bias=bias))
    encoder.extend(layers)
    encoder.similarity_fn_name = "dot"
    with atomic_write(folder) as partial:
        encoder.save_pretrained(str(partial), create_model_card=False)


if __name__ == "__main__":
    run(export, program="nvf.export", summary=(__doc__ or "").partition(": ")[2], options=OPTIONS)
