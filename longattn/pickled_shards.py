"""Weights that `torch.save` pickled, read without running what a pickle says; changes with that format.

A file is a zip archive whose records are stored as they are, below one folder: `data.pkl` pickles a dict from name to
tensor, each a view of a storage; `data/<key>` holds the bytes of a storage; `byteorder` says how, where it is there.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from longattn.shards import DTYPE_BITS, INDEX, MAX_HEADER_BYTES, SINGLE, Shard, Shards, StoredTensor, header_of

__all__ = ["open_weights"]

PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
DTYPES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8"},
    "BoolStorage": "BOOL",
}
ZIP_HEADER_BYTES = 30  # of a record, before its name; bytes 26 to 30 are the lengths of the name and of what follows it


def open_weights(folder: Path, allow_pickle: bool) -> Shards:
    """Open a checkpoint's weights: its safetensors files, or, only where that is allowed, what `torch.save` pickled.

    Of pickles the names, shapes and places of tensors are read; anything else that one asks for is refused, not run.
    They are written as safetensors.

    Raises:
        ValueError: as `Shards.open`, also for pickles.
    """
    if allow_pickle and not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        if (folder / PICKLED_INDEX).is_file():
            return Shards.of_index(folder, PICKLED_INDEX, _open)
        if (folder / PICKLED_SINGLE).is_file():
            return Shards((_open(folder / PICKLED_SINGLE),), None)
    return Shards.open(folder)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _View:
    """A tensor as a pickle describes it; sizes in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle._Unpickler):
    """Unpickles a dict of tensors, knowing no function but the few that describe them.

    It is Python's, not C's, which takes memory for as many values as a pickle claims to number.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *rest: _View(storage, offset, tuple(shape), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda view, *rest: view
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise ValueError(f"it asks for {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(dtype, key)


def _open(path: Path) -> Shard:
    """Read where the tensors of a pickled file are.

    Raises:
        ValueError: the file is no such archive, or damaged, or its pickle asks for more than tensors.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            tensors = _tensors(path, file, archive)
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle can fail anywhere in the unpickler, for want of memory too
        own = isinstance(error, (ValueError, zipfile.BadZipFile))
        reason = " ".join((str(error) if own else f"{type(error).__name__}: {error}").split())
        raise ValueError(f"extend: {path.name} can't be read as tensors that torch.save wrote: {reason}") from None
    metadata = {"format": "pt"}
    name = path.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
    return Shard(path, header_of(metadata, tensors), metadata, tuple(tensors), name)


def _tensors(path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> list[StoredTensor]:
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if records["data.pkl"].file_size > MAX_HEADER_BYTES:
        raise ValueError(f"its pickle has {records['data.pkl'].file_size} bytes")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise ValueError("its bytes are not little-endian")
    views = _Reader(BytesIO(archive.read(records["data.pkl"]))).load()
    if not isinstance(views, dict):
        raise ValueError(f"it holds a {type(views).__name__}, not a dict of tensors")
    tensors = []
    for name, view in views.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise ValueError(f"{name!r} is no tensor")
        record = records[f"data/{view.storage.key}"]
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        size = DTYPE_BITS[view.storage.dtype] // 8
        num_bytes = size * _checked_numel(name, view, record.file_size // size)
        start = _first_byte(file, record) + size * view.offset
        if start + num_bytes > path.stat().st_size:
            raise ValueError(f"{name} ends beyond the file")
        tensors.append(StoredTensor(name, view.storage.dtype, view.shape, start, num_bytes, path))
    return tensors


def _checked_numel(name: str, view: _View, held: int) -> int:
    """A tensor's elements, that lie one behind the other among those that its storage holds."""
    if any(type(number) is not int or number < 0 for number in (view.offset, *view.shape, *view.stride)):
        raise ValueError(f"{name} must have whole numbers for sizes, got {view}")
    numel = math.prod(view.shape)
    rows = list(accumulate(reversed(view.shape[1:]), lambda a, b: a * b, initial=1))[::-1]
    steps = zip(view.shape, view.stride, rows, strict=False)
    if numel and any(size > 1 and stride != row for size, stride, row in steps):
        raise ValueError(f"{name} is not contiguous, its strides are {view.stride}")
    if len(view.stride) != len(view.shape) or view.offset + numel > held:
        raise ValueError(f"{name} of shape {list(view.shape)} is larger than its storage of {held}")
    return numel


def _first_byte(file: IO[bytes], record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset)
    header = file.read(ZIP_HEADER_BYTES)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return record.header_offset + ZIP_HEADER_BYTES + lengths
