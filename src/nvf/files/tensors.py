"""Tensors in files that may have been damaged or made by others: no file runs code, or takes more room than it has."""

import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# What the pickle in a checkpoint of ours may name, beside torch's storages and types.
NAMED = {
    "collections OrderedDict",
    "collections defaultdict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}

# What a damaged file makes of us, of torch and of safetensors.
DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,  # RecursionError is one
    ArithmeticError,
    MemoryError,
    OSError,
    SafetensorError,
)

# The end of a zip: length and start of its directory in 64 bits, the place of these, both in 32, a comment's length.
END = struct.Struct("<4s36xQQ4s4xQ4x4s8xIIH")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, copied: there they are not aligned, and products of such ones round otherwise.

    Raises:
        ValueError: it is no regular file.
        SafetensorError: it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def read_archive(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; its tensors are mapped, so that none is larger than the file.

    Raises:
        ValueError: `check_archive` refuses it.
        Exception: whatever else a damaged file makes torch raise.
    """
    check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_archive(path: Path) -> None:
    """Raise a ValueError unless a file is what `torch.save` writes: a zip of records as they are, each with its CRC.

    That leaves out the older formats, zip bombs, and pickles that name what no checkpoint of ours does.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    try:
        _check_end(path)
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len({record.filename.lower() for record in records}) < len(records):
                raise ValueError("it has two records of a name")  # to torch, which asks for either in any case
            if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
                raise ValueError("it has compressed or encrypted records")
            if sum(max(record.file_size, record.compress_size) for record in records) > path.stat().st_size:
                raise ValueError("its records are larger than the file")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its record {damaged!r} is damaged")
            for record in records:
                if record.filename.lower().endswith(".pkl"):
                    _check_pickle(archive.read(record))
    except ValueError:
        raise
    except Exception as fault:  # of zipfile and pickletools: there is no end of what damage makes them raise
        raise ValueError(f"it is no archive of torch ({type(fault).__name__})") from None


def _check_end(path: Path) -> None:
    """Raise a ValueError unless the file ends on one directory of records, without a comment.

    Of the directory's place a zip speaks three times. Python's reader and torch's believe different ones, so that a
    forged file could show each of them other records.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END.size))
        end = file.read().rjust(END.size, b"\0")
    first, length, start, second, place, third, old_length, old_start, comment = END.unpack(end)
    if second == b"PK\6\7":  # as torch writes them
        agree = first == b"PK\6\6" and place == start + length == size - END.size
    else:
        agree = old_start + old_length == size - 22
    if third != b"PK\5\6" or comment or not agree:
        raise ValueError("its end is not that of one directory of records")


def _check_pickle(data: bytes) -> None:
    for code, argument, _ in pickletools.genops(data):
        if code.name != "GLOBAL":
            if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"its pickle has the instruction {code.name}")
            continue
        module, _, name = str(argument).partition(" ")
        if argument not in NAMED and not (module == "torch" and _is_type(name)):
            raise ValueError(f"its pickle names {argument!r}")


def _is_type(name: str) -> bool:
    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model these weights; one on the meta device, which took no room, takes copies of them for its own.

    Raises:
        ValueError: other names, shapes or kinds of numbers than the model's, or numbers that are not finite.
    """
    mine = model.state_dict()
    if strange := sorted(map(str, mine.keys() ^ weights.keys())):
        raise ValueError(f"{strange[0]} is missing or unknown among the weights")
    for name, own in mine.items():
        given = weights[name]
        if type(given) not in (Tensor, nn.Parameter) or given.layout != torch.strided or given.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        if given.shape != own.shape or given.dtype.is_floating_point != own.dtype.is_floating_point:
            raise ValueError(f"{name} is {_shown(given)}, but should be {_shown(own)}")
        if given.is_complex() or given.device.type == "meta" or not given.is_contiguous():
            raise ValueError(f"{name} is no plain tensor of numbers")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values")
    if any(own.is_meta for own in mine.values()):
        copies = {name: weights[name].detach().to(own.dtype, copy=True) for name, own in mine.items()}
        model.load_state_dict(copies, assign=True)
    else:
        model.load_state_dict(weights)


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
