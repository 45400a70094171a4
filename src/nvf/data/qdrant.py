"""A Qdrant collection, read as the memory or given a vector more; a fault, or no qdrant-client, is an InputError."""

import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nvf.data.qdrant_points import check_storage
from nvf.errors import InputError, refused
from nvf.files.ids import checked_ids, plain_uuid, shown
from nvf.files.vectors import check_vectors
from nvf.models.memory import VectorMemory

try:
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import UnexpectedResponse
except ImportError:
    raise InputError("a collection needs qdrant-client: pip install -e '.[qdrant]' in NVF's folder") from None

KEY = "QDRANT_API_KEY"  # of the environment, so that no run's folder ever holds it
PAGE = 1000  # points a request that reads: some 30 MB of JSON at 1,536 dimensions
BATCH = 100  # points a request that writes, since servers refuse more than 32 MB
ELSEWHERE = "name a collection that does not exist yet"
TIMEOUT = 60  # seconds a request
ONE_LENGTH = 1e-3  # relative difference of lengths that count as equal


def read_memory(
    *,
    path: str | None,
    url: str | None,
    collection: str | None,
    vector: str | None = None,
    distance: str | None = None,
    text: str | None = None,
    **stored: Any,
) -> VectorMemory:
    """Read the vectors of a collection as a memory, (N, D), whose rows have the point ids and are sorted by them.

    Give either `path`, the folder of a local storage that is not open elsewhere, or the `url` of a server, whose key is
    read from the environment. `vector` names one of several vectors a point, and `text` the field of the payload with
    the point's text. Ids are integers, or strings that spell UUIDs; in a collection that has both, integers are spelled
    out too. A collection that orders otherwise than cosine is refused unless distance="cosine". `stored` may say
    `dtype` and `mapped` of the memory.
    """
    if distance not in (None, "cosine"):
        raise InputError(f"data.distance={distance} is neither null, the collection's own, nor cosine; give one")
    with _opened(path, url, "data.") as client:
        own, ids, vectors, texts = _read(client, collection, vector, text)
    if len(set(map(type, ids))) > 1:
        ids = [str(point) for point in ids]
    order = sorted(range(len(ids)), key=ids.__getitem__)  # numpy would round large ids to float64
    sorted_ids = checked_ids([ids[row] for row in order], len(ids), f"collection {collection}")
    rows = torch.from_numpy(vectors[order])
    check_vectors(rows, f"collection {collection}", sorted_ids)
    shortest, longest = torch.linalg.vector_norm(rows.double(), dim=-1).aminmax()
    alike = own == "Cosine" or (own in ("Dot", "Euclid") and longest <= (1 + ONE_LENGTH) * shortest)
    if not alike and distance is None:
        what = f"collection {collection} searches by {own} among lengths from {shortest:.4g} to {longest:.4g}"
        raise InputError(f"{what}, which cosine orders otherwise; data.distance=cosine searches by it all the same")
    memory = VectorMemory(rows, ids=sorted_ids, distinct=True, **stored)
    memory.distance = None if alike else own
    memory.texts = [texts[row] for row in order] if text is not None else None
    return memory


def write_vectors(
    points: Sequence[Any], vectors: np.ndarray, *, collection: str, vector: str, path: Path | None, url: str | None
) -> None:
    """Give points, by N ids, a vector of this name each, (N, D), which is searched by inner products.

    The collection is made if it does not exist, and keeps everything else if it does; what was made goes again if a
    write fails. A point that it lacks, or another kind of vector under that name, raises an InputError.
    """
    ids = [_point_id(one) for one in points]
    shape: Any = {"size": vectors.shape[1], "distance": models.Distance.DOT}
    with _opened(path, url) as client:
        if new := not client.collection_exists(collection):
            client.create_collection(collection, vectors_config={vector: models.VectorParams(**shape)})
        added = not new and _add_vector(client, collection, vector, shape, ids)
        write, point = (client.upsert, models.PointStruct) if new else (client.update_vectors, models.PointVectors)
        try:
            for at in tqdm(range(0, len(ids), BATCH), desc=f"writing {collection}", leave=False, delay=3, disable=None):
                pairs = zip(ids[at : at + BATCH], vectors[at : at + BATCH].tolist(), strict=True)
                write(collection, [point(id=one, vector={vector: values}) for one, values in pairs])
        except BaseException:
            if new:
                client.delete_collection(collection)
            elif added:
                client.delete_vector_name(collection, vector)
            raise


def _point_id(name: Any) -> int | str:
    try:
        return int(name) if str(name).isdecimal() else str(uuid.UUID(name))  # see `read_memory` for spelled integers
    except (ValueError, AttributeError):
        fault = f"id {shown(name)} is no whole number from 0, and no UUID"
        raise InputError(f"{fault}; give the items such ids, or to=keys.parquet") from None


def _add_vector(client: QdrantClient, collection: str, vector: str, shape: dict[str, Any], ids: list[Any]) -> bool:
    """Add a named vector to a collection that has all of the points; return whether it was not there before."""
    pages = (client.retrieve(collection, ids[at : at + PAGE], with_payload=False) for at in range(0, len(ids), PAGE))
    known = {one.id for page in pages for one in page}
    if lacking := [one for one in ids if one not in known]:
        raise InputError(f"collection {collection} has no point {lacking[0]}; add it, or {ELSEWHERE}")
    params: Any = client.get_collection(collection).config.params.vectors
    if isinstance(params, dict) and (own := params.get(vector)):
        if (own.size, own.distance, own.multivector_config) != (shape["size"], shape["distance"], None):
            raise InputError(f"vector {vector} of collection {collection} is {own}, not {shape}; {ELSEWHERE}")
        return False
    lacks = f"collection {collection} has no vector {vector}, and none can be added"
    remedy = f"upgrade server and qdrant-client to 1.18, or {ELSEWHERE}"
    with refused(lacks, remedy, AttributeError, UnexpectedResponse):
        dense = models.DenseVectorConfig(**shape)
        client.create_vector_name(collection, vector, models.DenseVectorNameConfig(dense=dense))
    return True


@contextmanager
def _opened(path: str | Path | None, url: str | None, prefix: str = "") -> Iterator[Any]:
    """Give a client; a fault of the storage or of the server names the setting that leads to it."""
    if (path is None) == (url is None):
        raise InputError(f"{prefix}path={path} and {prefix}url={url}; set one: a storage's folder, or a server's URL")
    where, remedy = f"url={url}", f"check the server, and {KEY} if it asks for a key"
    if path is not None:
        where, remedy = f"path={path}", "name the folder that QdrantClient(path=...) wrote, and close it elsewhere"
    # All exceptions: damaged points, or an answer of another program, make the client raise many types.
    with refused(f"{prefix}{where} cannot be used", remedy), closing(_open(path, url)) as client:
        yield client


def _open(path: str | Path | None, url: str | None) -> QdrantClient:
    if path is None:
        return QdrantClient(url=url, api_key=os.environ.get(KEY), timeout=TIMEOUT, check_compatibility=False)
    check_storage(Path(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises against more than 20,000 points, which are read but once
        return QdrantClient(path=str(path))


def _read(
    client: QdrantClient, collection: str | None, vector: str | None, text: str | None
) -> tuple[str, list[int | str], np.ndarray, list[str]]:
    """Return the distance that the collection searches by, all ids, all vectors, (N, D) float32, and all texts."""
    if collection is None or not client.collection_exists(collection):
        names = sorted(one.name for one in client.get_collections().collections)  # which a key may forbid
        raise InputError(f"data.collection={collection} does not exist; choose one of: {', '.join(names)}")
    params: Any = client.get_collection(collection).config.params.vectors
    named = params if isinstance(params, dict) else {None: params} if params else {}
    named = {name: one for name, one in named.items() if one.multivector_config is None}
    if vector is None:
        vector = next(iter(named)) if len(named) == 1 else "" if "" in named else None  # "": the one without a name
    if vector not in named:
        fault = f"data.vector={vector} is no vector of collection {collection} of which a point has one"
        raise InputError(f"{fault}; choose one of: {', '.join(filter(None, named)) or 'none with a name'}")
    ids: list[int | str] = []
    texts: list[str] = []
    pages: list[np.ndarray] = []
    how: Any = {"with_payload": False if text is None else [text], "with_vectors": [vector] if vector else True}
    offset = None
    points_in_all = client.count(collection).count
    with tqdm(total=points_in_all, desc=f"reading {collection}", leave=False, delay=3, disable=None) as bar:
        while offset is not None or not pages:
            points, offset = client.scroll(collection, limit=PAGE, offset=offset, **how)
            if not points:
                break
            vectors = [one.vector.get(vector or "") if isinstance(one.vector, dict) else one.vector for one in points]
            said: list[Any] = ["" if text is None else (one.payload or {}).get(text) for one in points]
            for one, given, words in zip(points, vectors, said, strict=True):
                if not given or not isinstance(words, str):
                    lacks = f"point {one.id} has no " + (f"text in its field {text!r}" if given else f"vector {vector}")
                    raise InputError(f"collection {collection}: {lacks}; give it one, or remove it")
            texts += said
            ids += [one.id if isinstance(one.id, int) else plain_uuid(str(one.id)) for one in points]
            pages.append(np.array(vectors, dtype=np.float32))
            bar.update(len(points))
    if not pages:
        raise InputError(f"collection {collection} is empty; fill it, or choose another: data.collection=name")
    return named[vector].distance.value, ids, np.concatenate(pages), texts
