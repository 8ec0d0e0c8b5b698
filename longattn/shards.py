"""The safetensors files of a checkpoint: check them, read one tensor, write them anew; changes with that format.

A file is 8 bytes, the header's length in bytes (little-endian); the header, JSON: name -> dtype, shape and the range of
bytes after the header; then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Progress", "Shard", "Shards", "StoredTensor", "header_of", "read_tensor"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a tensor that is being written, the bytes written so far, and the bytes in all."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CHUNK_BYTES = 16 * 2**20
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
DTYPE_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16},
    **{"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8},
    **{"F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard.

    Args:
        name: its name in the checkpoint.
        dtype: as safetensors writes it, "BF16".
        shape: its sizes.
        start: its first byte, counted from the beginning of the file.
        num_bytes: its size.
        path: the shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    path: Path


@dataclass(frozen=True)
class Shard:
    """One file of tensors, checked, and what is written of it.

    Args:
        header: the bytes that go before the tensors in a safetensors file; the very bytes of one that is.
        tensors: in the order of the file that is written, `name`.
    """

    path: Path
    header: bytes
    metadata: dict[str, str] | None
    tensors: tuple[StoredTensor, ...]
    name: str

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read a file's header, and check that it is whole and describes every byte of the file.

        Raises:
            ValueError: the file is no safetensors file, or damaged, or cut off.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"extend: {path.name} is corrupt or cut off: its {size} bytes do not hold its header")
            header = file.read(length)
        try:
            entries = json.loads(header)
            metadata = entries.pop("__metadata__", None)
            tensors = [_stored(name, entry, 8 + length, path) for name, entry in entries.items()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"extend: {path.name} is corrupt: its header can't be read ({error})") from None
        tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
        end = 8 + length
        for tensor in tensors:
            if tensor.start != end:
                raise ValueError(
                    f"extend: {path.name} is corrupt: {tensor.name} begins at byte {tensor.start}, not {end}"
                )
            end += tensor.num_bytes
        if end != size:
            state = "cut off" if size < end else "corrupt"
            raise ValueError(f"extend: {path.name} is {state}: its header describes {end} bytes, the file has {size}")
        return cls(path, start + header, metadata, tuple(tensors), path.name)

    def header_with(self, replaced: Mapping[str, Tensor]) -> bytes:
        """The header's bytes when some tensors are replaced; the very bytes of old where none is."""
        if not any(tensor.name in replaced for tensor in self.tensors):
            return self.header
        return header_of(self.metadata, [_as_new(tensor, replaced.get(tensor.name)) for tensor in self.tensors])


def _as_new(tensor: StoredTensor, new: Tensor | None) -> StoredTensor:
    if new is None:
        return tensor
    return replace(tensor, dtype=DTYPE_NAMES[new.dtype], shape=tuple(new.shape), num_bytes=new.nbytes)


def header_of(metadata: Mapping[str, str] | None, tensors: Sequence[StoredTensor]) -> bytes:
    """The bytes that go before these tensors in a safetensors file."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _stored(name: str, entry: Mapping[str, Any], base: int, path: Path) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int for number in (begin, end, *shape)):
        raise ValueError(f"{name} must have whole numbers for sizes and bytes, got {entry}")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if min([begin, end - begin, *shape]) < 0 or (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8 != end - begin:
        raise ValueError(f"{name} is {dtype} {list(shape)} but has bytes {begin} to {end}")
    return StoredTensor(name, dtype, shape, base + begin, end - begin, path)


@dataclass(frozen=True)
class Shards:
    """All weights of a checkpoint, one file or several with an index."""

    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Find a checkpoint's weights and check every file's header and size, and the index against the files.

        Raises:
            ValueError: there are no safetensors files, one is missing or damaged, or the index disagrees with them.
        """
        if (folder / INDEX).is_file():
            return cls.of_index(folder, INDEX, Shard.open)
        if (folder / SINGLE).is_file():
            return cls((Shard.open(folder / SINGLE),), None)
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"extend: {folder} has no safetensors weights but {pickles[0]}, a pickle, which can run any code when "
                "it is loaded; allow_pickle (--allow-pickle) reads the tensors in it and runs nothing"
            )
        raise ValueError(f"extend: {folder} has neither {SINGLE} nor {INDEX}")

    @classmethod
    def of_index(cls, folder: Path, name: str, open_shard: Callable[[Path], Shard]) -> Shards:
        """Open the files that an index names, and check it against them."""
        try:
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            weight_map = dict(index["weight_map"])
            metadata = dict(index.get("metadata", {}))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"extend: {name} is corrupt: {error!r}") from None
        if not isinstance(metadata.get("total_parameters", 0), int):
            raise ValueError(f"extend: {name} is corrupt: its total_parameters are {metadata['total_parameters']!r}")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or "\0" in file:
                raise ValueError(f"extend: {name} must name files beside it, got {file!r}")
        for file in (files := sorted(set(weight_map.values()))):
            if not (folder / file).is_file():
                raise ValueError(f"extend: {name} names {file}, which is missing in {folder}")
        shards = tuple(open_shard(folder / file) for file in files)
        _check_index(name, weight_map, {(tensor.name, shard.path.name) for shard in shards for tensor in shard.tensors})
        return cls(shards, index)

    def __iter__(self) -> Iterator[StoredTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    def num_bytes(self, replaced: Mapping[str, Tensor]) -> int:
        """Bytes of all tensors when some are replaced."""
        return sum(replaced[t.name].nbytes if t.name in replaced else t.num_bytes for t in self)

    def write(self, folder: Path, replaced: Mapping[str, Tensor], progress: Progress | None = None) -> None:
        """Write the same files to another folder, `replaced` tensors in place of the stored ones, all others as bytes.

        Args:
            folder: where to; it exists.
            replaced: new tensors by name, on the CPU, in a dtype of `TORCH_DTYPES`.
            progress: called after every piece of at most 16 MiB.
        """
        total, done = self.num_bytes(replaced), 0
        for shard in self.shards:
            written_to = folder / shard.name
            with shard.path.open("rb", buffering=0) as source, written_to.open("wb", buffering=0) as target:
                _write(target, shard.header_with(replaced))
                for tensor in shard.tensors:
                    new = replaced.get(tensor.name)
                    for written in _write_new(new, target) if new is not None else _copy(tensor, source, target):
                        done += written
                        if progress is not None:
                            progress(tensor.name, done, total)
        if self.index is not None:
            (folder / INDEX).write_text(json.dumps(self._new_index(replaced), indent=2) + "\n", encoding="utf-8")

    def _new_index(self, replaced: Mapping[str, Tensor]) -> dict[str, Any]:
        assert self.index is not None
        metadata = {**self.index.get("metadata", {}), "total_size": self.num_bytes(replaced)}
        if "total_parameters" in metadata:
            old = {tensor.name: math.prod(tensor.shape) for tensor in self}
            metadata["total_parameters"] += sum(new.numel() - old[name] for name, new in replaced.items())
        files = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        weight_map = {name: files[name] for name in self.index["weight_map"]}
        return {**self.index, "metadata": metadata, "weight_map": weight_map}


def _check_index(index: str, weight_map: Mapping[str, str], found: set[tuple[str, str]]) -> None:
    for name, file in weight_map.items():
        if (name, file) not in found:
            raise ValueError(f"extend: {index} disagrees with the shards: {name} is not in {file}")
    for name, file in sorted(found):
        if weight_map.get(name) != file:
            raise ValueError(f"extend: {index} disagrees with the shards: {file} holds {name}, which it does not list")


def _write(target: RawIOBase, content: bytes | memoryview) -> int:
    """Write all of some bytes, which an unbuffered file may take in parts; gives how many."""
    left = memoryview(content)
    while left:
        left = left[target.write(left) or 0 :]
    return len(content)


def _write_new(tensor: Tensor, target: RawIOBase) -> Iterator[int]:
    """Write a tensor's bytes, a chunk at a time; gives the size of each."""
    content = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(content), CHUNK_BYTES):
        yield _write(target, content[start : start + CHUNK_BYTES])


def _copy(tensor: StoredTensor, source: RawIOBase, target: RawIOBase) -> Iterator[int]:
    """Copy a stored tensor's bytes, a chunk at a time; gives the size of each.

    Both files are unbuffered, so that the kernel can copy between them, or let them share what is on the disk.
    """
    source.seek(tensor.start)
    left, in_kernel = tensor.num_bytes, hasattr(os, "copy_file_range")
    while left:
        written = 0
        if in_kernel:
            try:
                written = os.copy_file_range(source.fileno(), target.fileno(), min(left, CHUNK_BYTES))
            except OSError:  # two file systems, or one that can't; writing says what else is wrong
                pass
            in_kernel = written > 0  # some file systems copy nothing and call it done
        if not written:
            piece = source.read(min(left, CHUNK_BYTES))
            if not piece:
                raise ValueError(f"extend: {tensor.path.name} was cut off while it was read, in {tensor.name}")
            written = _write(target, piece)
        left -= written
        yield written


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read one tensor into memory.

    Raises:
        ValueError: its dtype is none of `TORCH_DTYPES`.
    """
    if stored.dtype not in TORCH_DTYPES:
        raise ValueError(
            f"extend: {stored.name} must be one of {', '.join(TORCH_DTYPES)} to be changed, got {stored.dtype}"
        )
    content = bytearray(stored.num_bytes)
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        if file.readinto(content) != stored.num_bytes:
            raise ValueError(f"extend: {stored.path.name} was cut off while it was read, in {stored.name}")
    if not content:
        return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    return torch.frombuffer(content, dtype=TORCH_DTYPES[stored.dtype]).reshape(stored.shape)
