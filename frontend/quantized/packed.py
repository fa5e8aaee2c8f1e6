"""A weight as a quantized checkpoint has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.frontend.checkpoint import Checkpoint, ConvertedSource, Entry
from tilewright.ir.errors import CheckpointError
from tilewright.ir.types import DType, TensorType

SCALES = {"F32": DType.f32, "F16": DType.f16, "BF16": DType.f32}
"""Element types of scales in files, and those that hold the same numbers in the IR."""


@dataclass(frozen=True)
class Part:
    """One tensor of a packed weight: its type in the IR, and what makes its numbers."""

    type: TensorType
    make: Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight ``[N, K]`` as parts, in the order and with the names that ``quant.dequantize`` has for them.

    The parts are codes ``[N, K]``, ``scale`` ``[N, G]`` and maybe ``zero`` or ``offset`` ``[N, G]``. ``keys`` are the
    tensors on disk that they are made of. With ``order`` column ``i`` of the parts is column ``order[i]`` of the weight.
    ``dynamic``: the layer's input is to be rounded to 8 bits, a scale a token.
    """

    checkpoint: Any
    keys: tuple[str, ...]
    parts: Mapping[str, Part]
    order: np.ndarray | None = None
    dynamic: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        codes, *_ = self.parts.values()
        n, k = codes.type.shape
        return int(n), int(k)

    def source(self, name: str) -> ConvertedSource:
        """The numbers of one part, unpacked when they are asked for."""
        part = self.parts[name]
        return ConvertedSource(self.checkpoint, self.keys, part.type.dtype.np, part.make)

    def dense(self) -> np.ndarray:
        """The weight as f32 ``[N, K]``."""
        arrays = {name: self.source(name).load() for name in self.parts}
        scale = arrays["scale"].astype(np.float32)[..., None]
        numbers = next(iter(arrays.values())).astype(np.float32).reshape(*scale.shape[:2], -1)
        if "zero" in arrays:
            numbers -= arrays["zero"].astype(np.float32)[..., None]
        numbers *= scale
        if "offset" in arrays:
            numbers += arrays["offset"][..., None]
        whole = numbers.reshape(self.shape)
        if self.order is None:
            return whole
        out = np.empty_like(whole)
        out[:, self.order] = whole
        return out


@dataclass(frozen=True, eq=False)
class PackedSource:
    """The numbers of a packed weight, dequantized to ``dtype``: what it is, if nothing takes its parts."""

    packed: Packed
    dtype: np.dtype

    def load(self) -> np.ndarray:
        return self.packed.dense().astype(self.dtype, copy=False)

    def release(self) -> None:
        for key in self.packed.keys:
            self.packed.checkpoint.release(key)


class PackedCheckpoint:
    """A checkpoint in which packed weights have one name each, and their parts none."""

    def __init__(self, inner: Any, packed: Mapping[str, Packed]) -> None:
        self.inner, self.packed = inner, packed
        parts = {key for p in packed.values() for key in p.keys}
        self.where = {k: v for k, v in inner.where.items() if k not in parts} | dict.fromkeys(packed, "")

    def entry(self, name: str) -> Entry:
        return Entry("F32", self.packed[name].shape, 0, 0) if name in self.packed else self.inner.entry(name)

    def array(self, name: str) -> np.ndarray:
        return self.packed[name].dense() if name in self.packed else self.inner.array(name)

    def source(self, name: str, dtype: np.dtype) -> Any:
        return PackedSource(self.packed[name], dtype) if name in self.packed else self.inner.source(name, dtype)

    def release(self, name: str) -> None:
        for key in self.packed[name].keys if name in self.packed else (name,):
            self.inner.release(key)


@dataclass(frozen=True)
class Reading:
    """A quantized checkpoint that is being read: its settings, the classes of the model's modules, notes for the report."""

    checkpoint: Checkpoint
    settings: Mapping[str, Any]
    classes: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def layers(self, *names: str) -> list[Layer]:
        """The modules that have tensors of these names; raises CheckpointError when there is none."""
        split = (key.rpartition(".") for key in self.checkpoint.where)
        modules = sorted({module for module, _, tail in split if tail in names and module.rpartition(".")[2] != "act"})
        if not modules:
            raise CheckpointError(
                f"{self.checkpoint.folder}: its configuration says that it is quantized, and no tensor is called "
                f"{' or '.join(f'*.{name}' for name in names)}"
            )
        return [Layer(self.checkpoint, module) for module in modules]

    def note(self, text: str) -> None:
        """Something for the report, said once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Layer:
    """The tensors of one module of a checkpoint, by their names within the module."""

    checkpoint: Checkpoint
    module: str

    def key(self, name: str) -> str:
        return f"{self.module}.{name}"

    def has(self, name: str) -> bool:
        return self.key(name) in self.checkpoint.where

    def dtype(self, name: str) -> str:
        return self.checkpoint.entry(self.key(name)).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.entry(self.key(name)).shape

    def array(self, name: str) -> np.ndarray:
        return self.checkpoint.array(self.key(name))

    def expect(self, name: str, dtypes: Sequence[str], shape: Sequence[int | None], why: str = "") -> None:
        """Raises CheckpointError unless the tensor is there with one of ``dtypes`` and ``shape`` (None: any size)."""
        if not self.has(name):
            lead = f"{self.module}."
            others = ", ".join(sorted(k.removeprefix(lead) for k in self.checkpoint.where if k.startswith(lead)))
            raise CheckpointError(f"{self.checkpoint.folder} lacks {self.key(name)}; of this layer it has {others}")
        got, kind = self.shape(name), self.dtype(name)
        if kind not in dtypes:
            self.fail(name, f"is {kind}, expected {' or '.join(dtypes)}")
        if len(got) != len(shape) or any(want not in (None, size) for size, want in zip(got, shape)):
            wanted = ["any" if s is None else s for s in shape]
            self.fail(name, f"has the shape {list(got)}, expected {wanted}{why and f' ({why})'}")
        self.array(name)  # says when its bytes are not as many as its shape has

    def fail(self, name: str, message: str) -> None:
        """Raises CheckpointError with the file and the tensor."""
        key = self.key(name)
        raise CheckpointError(f"{self.checkpoint.folder / self.checkpoint.where[key]}: {key} {message}")

    def scales(self, name: str) -> tuple[DType, Callable[[], np.ndarray]]:
        """Type and numbers of a tensor of scales; raises CheckpointError for NaN and infinity among them."""
        numbers = self.array(name)
        if not np.isfinite(numbers.astype(np.float32)).all():
            self.fail(name, "has NaN or infinity among its scales")
        return SCALES[self.dtype(name)], lambda: self.array(name)
