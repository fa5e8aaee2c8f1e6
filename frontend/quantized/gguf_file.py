"""A GGUF file, mapped: its settings, and its tensors under the names that transformers' models have for them."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.frontend.checkpoint import Entry, TensorSource
from tilewright.frontend.quantized.blocks import BLOCKS
from tilewright.frontend.quantized.packed import Packed, PackedCheckpoint, Part
from tilewright.ir.errors import CheckpointError, UnsupportedError
from tilewright.ir.types import DType, TensorType

FREQUENCIES = "rope_freqs.weight"
"""Factors of the frequencies of rotations; no weight of the model."""
_PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = (  # a pattern of a GGUF name, and what the model of transformers calls it
    (r"token_embd\.", "model.embed_tokens."),
    (r"output_norm\.", "model.norm."),
    (r"output\.", "lm_head."),
    (r"blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"blk\.(\d+)\.attn_(q|k|v)\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"blk\.(\d+)\.attn_(q|k)_norm\.", r"model.layers.\1.self_attn.\2_norm."),
    (r"blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and how: bytes ``[start, start + size)`` hold ``shape`` numbers of the ggml type ``kind``."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GgufFile:
    """Settings by key, and tensors. Raises CheckpointError when the file is damaged or holds what is not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UnsupportedError(f"{path}: GGUF is read with the package gguf; pip install 'tilewright[gguf]'") from None
        try:
            reader = GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items() if "token" not in name}
            self.fields |= {k: f.contents() for k, f in reader.fields.items() if k.endswith("_token_id")}
            found = [(t.name, t.tensor_type.name, t.shape, t.data_offset, t.n_bytes) for t in reader.tensors]
        except Exception as error:  # of a file that ends early or has nonsense the reader raises all sorts
            raise CheckpointError(f"{path} is damaged, or no GGUF file: {str(error) or type(error).__name__}") from None
        self.tensors = {
            name: Stored(kind, tuple(map(int, reversed(shape))), int(start), int(size))
            for name, kind, shape, start, size in found
        }
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", "unknown"))

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the architecture; raises CheckpointError for one that is missing and has no default."""
        key = f"{self.architecture}.{name}"
        if key not in self.fields and default is None:
            raise CheckpointError(f"{self.path} lacks the setting {key}")
        return self.fields.get(key, default)

    def bytes_of(self, name: str) -> np.ndarray:
        """A view of the bytes of a tensor."""
        at = self.tensors[name]
        return np.frombuffer(self.map, np.uint8, at.size, at.start)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; they are read again when needed."""
        at, page = self.tensors[name], mmap.PAGESIZE
        start, stop = -(-at.start // page) * page, (at.start + at.size) // page * page
        if stop > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class GgufCheckpoint:
    """The tensors of a GGUF file that hold plain numbers, by transformers' names; of some the rows in another order."""

    def __init__(self, file: GgufFile, names: Mapping[str, str], orders: Mapping[str, np.ndarray]) -> None:
        self.folder = file.path
        self.file, self.names, self.orders = file, names, orders
        self.where = dict.fromkeys(names, file.path.name)

    def entry(self, name: str) -> Entry:
        at = self.file.tensors[self.names[name]]
        return Entry(at.kind, at.shape, at.start, at.start + at.size)

    def array(self, name: str) -> np.ndarray:
        at = self.entry(name)
        whole = self.file.bytes_of(self.names[name]).view(_PLAIN[at.dtype]).reshape(at.shape)
        return whole[self.orders[name]] if name in self.orders else whole

    def source(self, name: str, dtype: np.dtype) -> Any:
        return TensorSource(self, name, dtype)  # type: ignore[arg-type]

    def release(self, name: str) -> None:
        self.file.release(self.names[name])


def opened(file: GgufFile, heads: Mapping[str, int] | None = None) -> PackedCheckpoint:
    """The tensors of ``file`` as a checkpoint whose quantized ones are packed weights.

    ``heads`` (``q_proj`` -> how many) are the projections whose rows llama.cpp has in another order: pairs that are rotated
    together side by side, where transformers' models have halves. They are put back, whole rows at a time.

    Raises UnsupportedError, naming the tensor, for a type that is not read.
    """
    names = {_name(name): name for name in file.tensors if name != FREQUENCIES}
    kinds = {at.kind: name for name, at in file.tensors.items()}
    for kind in kinds.keys() - {*_PLAIN, *BLOCKS}:
        known = ", ".join([*_PLAIN, *BLOCKS])
        raise UnsupportedError(f"{file.path}: {kinds[kind]} has the type {kind}, which is not read; there are {known}")
    orders = {}
    for name, own in names.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if heads and module in heads:
            orders[name] = _halves_first(file.tensors[own].shape[0], heads[module])
    checkpoint = GgufCheckpoint(file, names, orders)
    packed = {name: _packed(checkpoint, name) for name, own in names.items() if file.tensors[own].kind in BLOCKS}
    return PackedCheckpoint(checkpoint, packed)


def _name(own: str) -> str:
    for pattern, name in _NAMES:
        found = re.match(pattern, own)
        if found:
            return found.expand(name) + own[found.end() :]
    return own


def _halves_first(rows: int, heads: int) -> np.ndarray:
    """For each row of transformers' order, its place in llama.cpp's."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _packed(checkpoint: GgufCheckpoint, name: str) -> Packed:
    """A tensor of blocks."""
    at = checkpoint.entry(name)
    block = BLOCKS[at.dtype]
    if len(at.shape) != 2 or at.shape[1] % block.size:
        shape = f"{at.dtype}{list(at.shape)}"
        raise CheckpointError(f"{checkpoint.folder}: {checkpoint.names[name]} is {shape}, a matrix of no whole blocks")
    n, k = at.shape
    parts = {}
    for part, make in block.parts.items():
        codes = part == "codes"
        kind = block.codes if codes else block.scales if part == "scale" else DType.f32
        shape = (n, k if codes else k // block.group)
        numbers = partial(_made, checkpoint, name, make, shape, kind)
        parts[kind.value if codes else part] = Part(TensorType(shape, kind), numbers)
    return Packed(checkpoint, (name,), parts)


def _made(checkpoint: GgufCheckpoint, name: str, make: Any, shape: tuple[int, int], kind: DType) -> np.ndarray:
    """One part of a tensor of blocks, its rows in the model's order."""
    block = BLOCKS[checkpoint.entry(name).dtype]
    rows = checkpoint.file.bytes_of(checkpoint.names[name]).reshape(-1, block.bytes)
    found = make(rows)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise CheckpointError(f"{checkpoint.folder}: {checkpoint.names[name]} has NaN or infinity among its scales")
    whole = np.ascontiguousarray(found.reshape(shape)).view(kind.np)
    return whole[checkpoint.orders[name]] if name in checkpoint.orders else whole
