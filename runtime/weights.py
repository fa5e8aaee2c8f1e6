"""``weights.safetensors``: laid out before the first byte, then written as a stream; every tensor 64-byte aligned.

Gaps are filled by one-dimensional u8 tensors named ``__pad__.<n>``, so that the file stays valid safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tilewright.runtime.errors import DamagedArtifactError
from tilewright.runtime.manifest import DTYPES, FileSpec

ALIGNMENT = 64
BLOCK = 8 << 20
"""Bytes hashed and written at a time, at multiples of it: what was hashed is still in the cache when it is copied, and
file systems with large folios then keep the file in pages of 2 MB, which kernels read a tenth faster."""

Data = np.ndarray[Any, Any] | bytes | bytearray | memoryview


@dataclass(frozen=True)
class WeightSpec:
    """A tensor to store: row-major, ``dtype`` one of the manifest's dtypes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WeightsPlan:
    """Where each tensor goes. ``offsets`` count from the data section, which is where the program's ``weights``
    argument points; ``size`` is the bytes of that section, ``header`` all that comes before it in the file."""

    specs: tuple[WeightSpec, ...]
    offsets: dict[str, int]
    size: int
    header: bytes


def plan_weights(specs: Iterable[WeightSpec]) -> WeightsPlan:
    """Lays out the tensors in the given order. Raises ValueError on a repeated or reserved name or an unknown dtype."""
    specs = tuple(specs)
    table: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    end = 0
    for spec in specs:
        _check_spec(spec, offsets)
        begin = _round_up(end)
        if begin != end:
            table[f"__pad__.{len(table)}"] = _row("u8", (begin - end,), end, begin)
        end = begin + spec.size
        offsets[spec.name] = begin
        table[spec.name] = _row(spec.dtype, spec.shape, begin, end)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (_round_up(8 + len(text)) - 8 - len(text))
    return WeightsPlan(specs, offsets, end, len(text).to_bytes(8, "little") + text)


def _check_spec(spec: WeightSpec, before: dict[str, int]) -> None:
    if spec.name in before or spec.name.startswith("__"):
        why = "is there twice" if spec.name in before else "starts with two underscores, which is reserved"
        raise ValueError(f"weight {spec.name!r}: its name {why}")
    if spec.dtype not in DTYPES:
        raise ValueError(f"weight {spec.name!r}: unknown dtype {spec.dtype!r}; known: {list(DTYPES)}")


def _round_up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _row(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [begin, end]}


class WeightsWriter:
    """Writes the tensors of a plan in its order and hashes them on the way; never holds one whole.

    ``file`` (the size and checksum) is set by ``close``.
    """

    def __init__(self, path: Path, plan: WeightsPlan) -> None:
        self.plan = plan
        self.file: FileSpec | None = None
        self._hash = xxhash.xxh3_128()
        self._stream = open(path, "wb", buffering=0)  # noqa: SIM115, closed by close()
        self._pending = bytearray()
        self._written = 0
        self._next = 0
        self._put(plan.header)

    def write(self, name: str, data: Data | Iterable[Data]) -> None:
        """Writes one tensor: an array, its bytes, or an iterable of pieces of its bytes.

        Raises ValueError when it is not the next one of the plan, or has another size or dtype.
        """
        if self._next == len(self.plan.specs) or self.plan.specs[self._next].name != name:
            due = self.plan.specs[self._next].name if self._next < len(self.plan.specs) else "no further tensor"
            raise ValueError(f"weight {name!r}: the plan says that {due!r} is written next")
        spec = self.plan.specs[self._next]
        if isinstance(data, np.ndarray) and data.dtype not in (DTYPES[spec.dtype], np.uint8):
            raise ValueError(f"weight {name!r}: the plan says {spec.dtype}, the array is {data.dtype}")
        self._pad_to(len(self.plan.header) + self.plan.offsets[name])
        before = self._written
        pieces = [data] if isinstance(data, np.ndarray | bytes | bytearray | memoryview) else data
        for piece in pieces:
            self._put(piece)
        if self._written - before != spec.size:
            raise ValueError(f"weight {name!r}: the plan says {spec.size} bytes, {self._written - before} were given")
        self._next += 1

    def close(self) -> None:
        """Ends and syncs the file. Raises ValueError when tensors of the plan are missing."""
        if self.file is not None:
            return
        missing = [spec.name for spec in self.plan.specs[self._next :]]
        if missing:
            raise ValueError(f"{len(missing)} weights were not written, the first is {missing[0]!r}")
        self._flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self.file = FileSpec(self._written, self._hash.hexdigest())

    def abort(self) -> None:
        """Closes the file as it is."""
        self._stream.close()

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _pad_to(self, position: int) -> None:
        self._put(bytes(position - self._written))

    def _put(self, data: Data) -> None:
        # Through numpy, since bf16 arrays have no buffer protocol.
        if isinstance(data, np.ndarray):
            data = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        view = memoryview(data).cast("B")
        self._written += len(view)
        while len(view):
            whole = not self._pending and len(view) >= BLOCK
            piece, view = view[:BLOCK - len(self._pending)], view[BLOCK - len(self._pending):]
            if whole:
                self._write(piece)
                continue
            self._pending += piece
            if len(self._pending) == BLOCK:
                self._flush()

    def _flush(self) -> None:
        self._write(memoryview(self._pending))
        self._pending = bytearray()

    def _write(self, block: memoryview) -> None:
        self._hash.update(block)
        write_all(self._stream, block)


def write_all(stream: FileIO, data: memoryview) -> None:
    """Writes all of ``data`` to an unbuffered file, in as few calls as the system allows."""
    while len(data):
        data = data[stream.write(data) :]


def data_offset(head: bytes, file_bytes: int, where: str) -> int:
    """Where the data section begins, from the first 8 bytes of the file. Raises DamagedArtifactError."""
    begin = 8 + int.from_bytes(head[:8], "little")
    if len(head) < 8 or begin > file_bytes or begin % ALIGNMENT:
        raise DamagedArtifactError(f"{where}: its header is damaged (data at byte {begin} of {file_bytes}); "
                                   "compile or copy the artifact again")
    return begin


def read_table(path: str | os.PathLike[str] | int) -> dict[str, tuple[str, Sequence[int], int]]:
    """The tensors of a weights file: name -> (dtype, shape, offset from the beginning of the file).

    A descriptor, in the place of a path, is closed.
    """
    with open(path, "rb") as stream:
        head = stream.read(8)
        begin = data_offset(head, os.fstat(stream.fileno()).st_size, str(path))
        table = json.loads(stream.read(begin - 8))
    return {
        name: (row["dtype"].lower(), tuple(row["shape"]), begin + row["data_offsets"][0])
        for name, row in table.items()
        if not name.startswith("__")
    }
