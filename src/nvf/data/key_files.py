"""Files of a pipeline's keys, (N, D') in the order of the vectors as given, and of the ids of these, if any.

.npy, .safetensors   the keys, in the latter under the name `keys`; the ids of keys.npy are in keys.ids.json
.parquet             columns `id`, which are row numbers where there are no ids, and `vector`
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nvf.files.atomic import atomic_write
from nvf.files.ids import write_ids

ENDINGS = (".npy", ".safetensors", ".parquet")


def write_keys(path: Path, keys: Tensor, ids: np.ndarray | None) -> None:
    """Write keys and ids in place of earlier ones, or, if anything fails, neither."""
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
