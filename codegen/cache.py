"""How a key/value cache lies in memory. On CPUs: blocks that decode attention reads as a stream of whole vectors.

Memory comes in regions: what a sequence has of its own, or a page of a pool. K and V of a region are one block each, with
all heads, and for each head a run for every ``run`` slots: all of the region's, or SLOT_STEP of a ring's. A run has keys in
panels, ``[run / panel][dim / pair][panel][pair]``, so that vectors hold one component of many keys; values in panels of
components, ``[vdim / panel][run / pair][panel][pair]``, so that vectors hold components of one value (or of two neighbours,
side by side). ``pair`` is 2 for bf16, the shape of vdpbf16ps' operands, else 1. ``panel`` is what a tile of registers takes
at once: 64, or 16 with 256-bit vectors. Sizes are rounded up; the filling must be finite, and is zero in a fresh cache.
Values that are the first components of keys are not there a second time: V is empty.
A page with a summary has, behind the keys of all heads, the least and then the greatest of each component, head by head.
Behind the keys of a region stand the notes on kept tokens, f32 ``[heads][NOTES][slots]``.

``codegen/cuda/cache.py`` has the form for GPUs.
"""

from dataclasses import dataclass
from typing import overload

import ml_dtypes
import numpy as np

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import SLOT_STEP, Slots
from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.target import CpuTarget, Target
from tilewright.ir import CONTIGUOUS, Kept, KVType, Layout, Ring
from tilewright.ir.kv_kept import NOTES

_STORED = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


def value_panels(size: int, panel: int) -> list[tuple[int, int]]:
    """First component and width of each panel of values; ``size`` is a multiple of VALUE_STEP."""
    return [(start, min(panel, size - start)) for start in range(0, size, panel)]


@dataclass(frozen=True)
class CacheLayout(Slots):
    """Layout of one layer's cache for up to ``length`` tokens, K of size ``dim`` and V of size ``vdim`` in every head."""

    heads: int
    dim: int
    vdim: int
    length: int
    dtype: str
    panel: int = 64
    layout: Layout = CONTIGUOUS
    summary: bool = False
    in_keys: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise ValueError(f"no cache of {self.dtype}; known: {', '.join(_STORED)}")

    @property
    def stored(self) -> str:
        """Element type of the memory."""
        return self.dtype

    @property
    def pair(self) -> int:
        return 2 if self.dtype == "bf16" else 1

    @property
    def value_size(self) -> int:
        return 0 if self.in_keys else super().value_size

    @property
    def budget(self) -> int:
        """Tokens that stay from call to call, 0 when all do."""
        return self.layout.budget if isinstance(self.layout, Kept) else 0

    @property
    def run(self) -> int:
        """Slots of a run."""
        return SLOT_STEP if isinstance(self.layout, Ring) else self.slots

    @property
    def k_run(self) -> int:
        """Elements of a run of keys."""
        return self.run * self.key_size

    @property
    def k_summaries(self) -> int:
        """Elements of the summaries of a page, behind its keys."""
        return self.heads * 2 * self.summary_row * self.summary

    @property
    def k_shape(self) -> tuple[int, ...]:
        """Of one region: the keys of all heads, then their summaries, or notes."""
        return (self.keys_size + self.k_summaries + self.notes_size,)

    @property
    def v_shape(self) -> tuple[int, ...]:
        """Of one region: heads, runs, then all panels."""
        return self.heads, self.slots // self.run, self.run * self.value_size

    @property
    def keys_size(self) -> int:
        """Elements of all keys of a region."""
        return self.heads * self.slots * self.key_size

    @property
    def notes_size(self) -> int:
        """Elements behind the keys of a region, where notes are."""
        return self.heads * NOTES * self.slots * 4 // _STORED[self.dtype].itemsize if self.budget else 0

    @property
    def k_bytes(self) -> int:
        """Bytes of K of one region, summaries and notes included."""
        return self.k_shape[0] * _STORED[self.dtype].itemsize

    @property
    def v_bytes(self) -> int:
        """Bytes of V of one region."""
        return self.heads * self.slots * self.value_size * _STORED[self.dtype].itemsize

    def empty(self, regions: int) -> tuple[np.ndarray, np.ndarray]:
        """A fresh cache, zero: K ``[regions, *k_shape]`` and V ``[regions, *v_shape]``."""
        kind = _STORED[self.dtype]
        return np.zeros((regions, *self.k_shape), kind), np.zeros((regions, *self.v_shape), kind)

    def read(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
        """Plain copies: K ``[regions, held, heads, dim]`` and V ``[regions, held, heads, vdim]`` (0 for vdim where values
        are among the keys), and of kept tokens the notes f32 ``[regions, heads, NOTES, held]``."""
        whole = k.reshape(-1, *self.k_shape)
        notes = [self._notes(whole).copy()] if self.budget else []
        keys = whole[:, :self.keys_size].reshape(-1, *self._panels).transpose(0, 2, 4, 1, 3, 5)
        keys = keys.reshape(len(keys), self.slots, self.heads, self.key_size)
        values = np.zeros((len(keys), self.slots, self.heads, self.value_size), v.dtype)
        for view, start, width in self._value_views(v):
            values[..., start:start + width] = view.reshape(len(keys), self.slots, self.heads, width)
        return keys[:, self.places(), :, :self.dim], values[:, self.places(), :, :self.vdim], *notes

    def _notes(self, k: np.ndarray) -> np.ndarray:
        """The notes of K ``[regions, elements]``, a view."""
        return k[:, self.keys_size:].view(np.float32).reshape(len(k), self.heads, NOTES, self.slots)

    def write(self, keys: np.ndarray, values: np.ndarray, notes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A cache whose first slots hold ``keys`` [regions, T, heads, dim] and ``values`` [regions, T, heads, vdim]."""
        regions, places = len(keys), self.places()[:keys.shape[1]]
        k, v = self.empty(regions)
        wide = np.zeros((regions, self.slots, self.heads, self.key_size), k.dtype)
        wide[:, places, :, :self.dim] = keys
        panels = wide.reshape(regions, -1, self.key_panel, self.heads, self.key_size // self.pair, self.pair)
        k[:, :self.keys_size] = panels.transpose(0, 3, 1, 4, 2, 5).reshape(regions, -1)
        if self.summary:
            halves = np.stack([wide.min(1), wide.max(1)], 2)
            padded = np.pad(halves, [(0, 0)] * 3 + [(0, self.summary_row - self.key_size)])
            k[:, self.keys_size:] = padded.reshape(regions, -1)
        if notes is not None:
            self._notes(k)[...] = notes
        wide = np.zeros((regions, self.slots, self.heads, self.value_size), v.dtype)
        wide[:, places, :, :self.vdim] = values
        for view, start, width in self._value_views(v):
            view[...] = wide[..., start:start + width].reshape(view.shape)
        return k, v

    @property
    def _panels(self) -> tuple[int, ...]:
        """Of the keys of one region: heads, panels, steps, panel, pair."""
        return self.heads, self.slots // self.key_panel, self.key_size // self.pair, self.key_panel, self.pair

    def _value_views(self, v: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
        """Each panel of values as ``[regions, runs, run / pair, pair, heads, width]``, with its start and its width."""
        if self.in_keys:
            return []
        flat = v.reshape(-1, *self.v_shape)
        views = []
        for start, width in value_panels(self.value_size, self.panel):
            panel = flat[..., start * self.run:(start + width) * self.run]
            view = panel.reshape(*flat.shape[:3], self.run // self.pair, width, self.pair)
            views.append((view.transpose(0, 2, 3, 5, 1, 4), start, width))
        return views


def panel_for(target: CpuTarget) -> int:
    """The panel that suits the registers of ``target``."""
    return 32 if target.vector_bits == 512 else 16


@overload
def cache_layout(type: KVType, target: CpuTarget) -> CacheLayout | CodeLayout: ...


@overload
def cache_layout(type: KVType, target: CudaTarget) -> CudaCacheLayout: ...


def cache_layout(type: KVType, target: Target) -> CacheLayout | CodeLayout | CudaCacheLayout:
    """The layout in which kernels for ``target`` keep a cache."""
    if isinstance(target, CudaTarget):
        return CudaCacheLayout.of(type)
    sizes = type.heads, type.dim, type.vdim, type.length, type.dtype.value
    if type.is_coded:
        codes = type.keys, type.group, type.recent, type.scales.value, type.full.value
        return CodeLayout(*sizes, panel_for(target), type.layout, *codes, type.has_summary, type.rank, type.outliers)
    return CacheLayout(*sizes, panel_for(target), type.layout, type.has_summary, not type.own_vdim)
