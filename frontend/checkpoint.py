"""Weights on disk: safetensors files, mapped into memory and read when asked for. Pickles are never loaded."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.ir.errors import CheckpointError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes ``[start, stop)`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One mapped file. Raises CheckpointError when it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else _LONGEST_HEADER + 1
            if size > _LONGEST_HEADER:
                raise CheckpointError(f"{path} is not a safetensors file: its header is too short or too long")
            self.entries = self._read_header(file.read(size), 8 + size, path.stat().st_size)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read_header(self, text: bytes, data: int, length: int) -> dict[str, Entry]:
        try:
            header = json.loads(text)
            entries = {
                name: Entry(e["dtype"], tuple(e["shape"]), data + e["data_offsets"][0], data + e["data_offsets"][1])
                for name, e in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self.path} has a damaged header: {error}") from None
        for name, e in entries.items():
            if not data <= e.start <= e.stop <= length:
                raise CheckpointError(f"{self.path} is truncated: {name} ends at byte {e.stop} of {length}")
        return entries

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the mapped tensor."""
        e = self.entries[name]
        dtype = np.dtype(_DTYPES[e.dtype]) if e.dtype in _DTYPES else None
        if dtype is None or e.stop - e.start != dtype.itemsize * int(np.prod(e.shape, dtype=np.int64)):
            raise CheckpointError(f"{self.path}: {name} is {e.dtype}{list(e.shape)} in {e.stop - e.start} bytes")
        flat = np.frombuffer(self.map, np.uint8, e.stop - e.start, e.start)
        return flat.view(dtype).reshape(e.shape)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; they are read again when needed."""
        e, page = self.entries[name], mmap.PAGESIZE
        start, stop = -(-e.start // page) * page, e.stop // page * page
        if stop > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class Checkpoint:
    """All tensors of a folder, by the names they have on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, SafetensorsFile] = {}
        self.where = self._index()

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                where: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index} is damaged: {error}") from None
            self._expect_shards(where)
            return where
        single = self.folder / "model.safetensors"
        names = [single.name] if single.exists() else sorted(p.name for p in self.folder.glob("*.safetensors"))
        if len(names) != 1:
            raise CheckpointError(self._nothing(names))
        return dict.fromkeys(self.file(names[0]).entries, names[0])

    def _expect_shards(self, where: dict[str, str]) -> None:
        missing = sorted({f for f in where.values() if not (self.folder / f).exists()})
        if missing:
            raise CheckpointError(f"{self.folder} lacks {', '.join(missing)}, which its index names")
        absent = [name for name, file in where.items() if name not in self.file(file).entries]
        if absent:
            raise CheckpointError(f"{where[absent[0]]} lacks {absent[0]}, which the index places there")

    def _nothing(self, names: Sequence[str]) -> str:
        if names:
            return f"{self.folder} has several safetensors files and no index: {', '.join(names)}"
        files = sorted(p.name for p in self.folder.iterdir())
        pickles = [f for f in files if f.endswith(_PICKLES) and f not in ("training_args.bin",)]
        if pickles:
            return (
                f"{self.folder} has its weights as {pickles[0]}; such files can run code when they are loaded, so they "
                "are not\n  remedy: load the model with transformers where you trust it, and save it again with "
                "model.save_pretrained(folder)"
            )
        return f"{self.folder} has no safetensors file; it has {', '.join(files) or 'nothing'}"

    def file(self, name: str) -> SafetensorsFile:
        if name not in self.files:
            self.files[name] = SafetensorsFile(self.folder / name)
        return self.files[name]

    def entry(self, name: str) -> Entry:
        return self.file(self.where[name]).entries[name]

    def array(self, name: str) -> np.ndarray:
        return self.file(self.where[name]).array(name)

    def source(self, name: str, dtype: np.dtype) -> TensorSource:
        """The tensor as a weight of ``dtype``."""
        return TensorSource(self, name, dtype)

    def release(self, name: str) -> None:
        self.file(self.where[name]).release(name)


@dataclass(frozen=True, eq=False)
class TensorSource:
    """A tensor of a checkpoint as an array of ``dtype``: a view of the file where that is its type there."""

    checkpoint: Checkpoint
    name: str
    dtype: np.dtype

    def load(self) -> np.ndarray:
        return self.checkpoint.array(self.name).astype(self.dtype, copy=False)

    def release(self) -> None:
        """Drop the file's pages from memory. Views that were handed out stay valid: they are read again."""
        self.checkpoint.release(self.name)


@dataclass(frozen=True, eq=False)
class ConvertedSource:
    """A tensor that is computed from others of the checkpoint (experts stacked, a fused matrix split)."""

    checkpoint: Checkpoint
    names: tuple[str, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def load(self) -> np.ndarray:
        return self.make().astype(self.dtype, copy=False)

    def release(self) -> None:
        for name in self.names:
            self.checkpoint.release(name)
