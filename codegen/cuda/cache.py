"""How a key/value cache lies in a GPU's memory: regions of rows.

A region is what a sequence has of its own, or a page of a pool. K and V of a region are a block each, with a row for each
head and slot, ``[heads, slots, row]``. What a row is, `FloatRows` and `CodeRows` say; which row a position has,
``cache_places.py``. Kernels' C asks both for addresses and knows no layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.codegen.cuda.cache_codes import SLOT_STEP, CodeRows
from tilewright.ir import CONTIGUOUS, KVType, Layout, Paged
from tilewright.runtime.coded import CodedRows

_KNOWN = ("heads", "dim", "vdim", "length", "dtype", "layout", "keys", "group", "recent", "scales", "full")
_STORED = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class FloatRows:
    """K or V in floats ``stored``; a row is the numbers of a slot."""

    size: int
    stored: str
    heads: int
    slots: int

    @property
    def row(self) -> int:
        """Elements from row to row."""
        return self.size

    @property
    def region(self) -> int:
        """Elements of a region."""
        return self.heads * self.slots * self.size

    @property
    def bytes(self) -> int:
        """Bytes of a region."""
        return self.region * _STORED[self.stored].itemsize

    def empty(self, regions: int) -> np.ndarray[Any, Any]:
        """Fresh memory, zero."""
        return np.zeros((regions, self.heads, self.slots, self.size), _STORED[self.stored])

    def write(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Memory whose first slots hold ``rows`` [regions, T, heads, size]."""
        out = self.empty(len(rows))
        out[:, :, : rows.shape[1]] = rows.swapaxes(1, 2)
        return out

    def read(self, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A plain copy ``[regions, slots, heads, size]``."""
        found = memory.reshape(-1, self.heads, self.slots, self.size)
        return np.ascontiguousarray(found.swapaxes(1, 2))

    def address(self, pointer: str, region: str, head: str, slot: str) -> str:
        """C: where a row begins; places are i64."""
        return f"{pointer} + {region} * {self.region} + ({head} * {self.slots} + {slot}) * {self.row}"


@dataclass(frozen=True)
class CudaCacheLayout:
    """One layer's cache for up to ``length`` positions of a sequence."""

    keys: FloatRows | CodeRows
    values: FloatRows | CodeRows
    length: int
    layout: Layout = CONTIGUOUS

    @classmethod
    def of(cls, kind: KVType) -> CudaCacheLayout:
        """That of a type for which `refusal` has nothing to say."""
        slots = kind.page or kind.length

        def rows(size: int) -> FloatRows | CodeRows:
            if not kind.is_coded:
                return FloatRows(size, kind.dtype.value, kind.heads, slots)
            return CodeRows(size, kind.dtype.bits, kind.scales.value, kind.heads, -(-slots // SLOT_STEP) * SLOT_STEP)

        return cls(rows(kind.dim), rows(kind.vdim), kind.length, kind.layout)

    @property
    def held(self) -> int:
        """Slots of a region that hold tokens."""
        return self.layout.page if isinstance(self.layout, Paged) else self.length

    @property
    def k_bytes(self) -> int:
        """Bytes of K of a region."""
        return self.keys.bytes

    @property
    def v_bytes(self) -> int:
        """Bytes of V of a region."""
        return self.values.bytes

    @property
    def coded(self) -> tuple[CodedRows | None, CodedRows | None]:
        """What the bytes of K and of V are, if they are codes."""
        return tuple(rows if isinstance(rows, CodeRows) else None for rows in (self.keys, self.values))  # type: ignore[return-value]

    def empty(self, regions: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """A fresh cache, zero."""
        return self.keys.empty(regions), self.values.empty(regions)

    def own(self, sequences: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Memory that sequences have beside their pages: none."""
        return ()

    def read(self, k: np.ndarray[Any, Any], v: np.ndarray[Any, Any]
             ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # fmt: skip
        """What the slots decode to: K ``[regions, held, heads, dim]`` and V ``[regions, held, heads, vdim]``."""
        return self.keys.read(k)[:, : self.held], self.values.read(v)[:, : self.held]

    def write(self, keys: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
              ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # fmt: skip
        """A cache whose first slots hold ``keys`` [regions, T, heads, dim] and ``values`` [regions, T, heads, vdim]."""
        return self.keys.write(keys), self.values.write(values)


def refusal(kind: KVType) -> str | None:
    """Why no kernel for GPUs reads a cache of this type, or None."""
    if not isinstance(kind.layout, (type(CONTIGUOUS), Paged)):
        return f"no kernel for {kind}: on a GPU caches are contiguous or paged, not {kind.layout}"
    if kind.is_coded and kind.dtype.bits not in (4, 8):
        return f"no kernel for {kind}: on a GPU codes are i8 or i4, not {kind.dtype.value}"
    if kind.keys == "channel":
        return f"no kernel for {kind}: on a GPU codes have scales by token; give keys=token"
    if kind.keeps_recent:
        return f"no kernel for {kind}: on a GPU all tokens of a cache of codes are codes; give recent=0"
    if not kind.own_vdim:
        return f"no kernel for {kind}: on a GPU values are stored beside their keys; leave out latent-cache"
    others = [f.name for f in fields(kind) if f.name not in _KNOWN and getattr(kind, f.name) != f.default]
    return f"no kernel for {kind}: on a GPU caches have no {others[0]}" if others else None
