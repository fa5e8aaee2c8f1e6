"""How a cache of codes lies in memory on CPUs: runs of slots, each one piece of bytes: codes, then scales, then zeros.

A run of keys has panels of tokens, ``[run / panel][steps][panel][4 bytes]``; the four bytes hold as many components as
fit, in the order of `Packing`: the first four in the lowest bits of the bytes, the next four above them. A run of values
has panels of components, ``[vdim / panel][run / pair][panel][4 bytes]``; the bytes hold neighbouring tokens in the same
order. So four 8-bit integers that belong together lie side by side, as vpdpbusd wants them, and of narrower codes a shift
and a mask give four. Keys are stored unsigned (i8 plus 128), values signed. Scales and zeros of tokens are vectors
``[run]``, of channels ``[run / group][dim]``; behind them lies what `ResidualLayout` says. Behind the keys of a page may be
summaries of what they decode to: head by head the least and then the greatest of each component, in the dtype ``full``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.codegen.cache_code_bytes import pack_keys, pack_values, unpack_keys, unpack_values
from tilewright.codegen.cache_residual import ResidualLayout
from tilewright.codegen.cache_slots import SLOT_STEP, VALUE_STEP, Slots, round_up
from tilewright.codegen.packing import code_pair
from tilewright.ir import CONTIGUOUS, DType, Layout, Paged, Ring
from tilewright.ir.ops.kv_codes import encode

_SCALES = {"f16": np.dtype("f2"), "f32": np.dtype("f4")}
_FULL = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype("f4")}
_BITS = {"i8": 8, "i4": 4, "i2": 2}


@dataclass(frozen=True)
class CodeLayout(Slots):
    """Layout of one layer's cache of codes (``dtype`` i8, i4, i2) for up to ``length`` tokens; see `KVType`."""

    heads: int
    dim: int
    vdim: int
    length: int
    dtype: str
    panel: int = 32
    layout: Layout = CONTIGUOUS
    keys: str = "token"
    group: int = 32
    recent: int = 0
    scales: str = "f16"
    full: str = "bf16"
    summary: bool = False
    rank: int = 0
    outliers: int = 0

    @property
    def stored(self) -> str:
        """Element type of the memory."""
        return "u8"

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS[self.dtype]

    @property
    def bias(self) -> int:
        """What the codes of keys are stored with, on top."""
        return 128 if self.bits == 8 else 0

    @property
    def pair(self) -> int:
        """Codes in four bytes."""
        return code_pair(self.bits)

    @property
    def has_zeros(self) -> bool:
        return self.bits < 8

    @property
    def channels(self) -> bool:
        """Whether the scales of keys are those of channels."""
        return self.keys == "channel"

    @property
    def run(self) -> int:
        """Slots of a run."""
        if isinstance(self.layout, Paged):
            return self.layout.page
        run = SLOT_STEP if isinstance(self.layout, Ring) or self.length <= SLOT_STEP else 2 * SLOT_STEP
        return max(run, self.group) if self.channels or self.has_residual else run

    @property
    def step(self) -> int:
        return self.run

    @property
    def runs(self) -> int:
        """Runs of one head in a region."""
        return self.slots // self.run

    @property
    def scale_size(self) -> int:
        """Bytes of a scale."""
        return _SCALES[self.scales].itemsize

    @property
    def k_codes(self) -> int:
        """Bytes of the codes of a run of keys: where its scales begin."""
        return self.run * self.key_size * self.bits // 8

    @property
    def k_scales(self) -> int:
        """Scales of a run of keys."""
        return self.run // self.group * self.key_size if self.channels else self.run

    @property
    def k_summaries(self) -> int:
        """Bytes of the summaries of a page, behind its keys."""
        return self.heads * 2 * self.summary_row * self.full_size * self.summary

    @property
    def k_run(self) -> int:
        """Bytes of a run of keys."""
        return self.k_residual.start + self.k_residual.bytes

    @property
    def k_residual(self) -> ResidualLayout:
        """What a run of keys has behind its scales and zeros."""
        start = self.k_codes + self.k_scales * self.scale_size * (1 + self.has_zeros)
        return self._residual(start, self.dim, self.channels)

    @property
    def v_codes(self) -> int:
        """Bytes of the codes of a run of values: where its scales begin."""
        return self.run * self.value_size * self.bits // 8

    @property
    def v_run(self) -> int:
        """Bytes of a run of values."""
        return self.v_residual.start + self.v_residual.bytes

    @property
    def v_residual(self) -> ResidualLayout:
        """As ``k_residual``, of values."""
        return self._residual(self.v_codes + self.run * self.scale_size * (1 + self.has_zeros), self.vdim, False)

    def _residual(self, start: int, size: int, channels: bool) -> ResidualLayout:
        row = round_up(size, VALUE_STEP)
        kept = self.rank, self.outliers, _SCALES[self.scales]
        return ResidualLayout(start, self.run, self.group, size, row, *kept, channels)

    @property
    def has_residual(self) -> bool:
        """Whether something of the error of codes lies beside them."""
        return self.rank > 0 or self.outliers > 0

    @property
    def keeps_recent(self) -> bool:
        """Whether the newest tokens are no codes yet."""
        return self.recent > 0 or self.channels

    @property
    def window(self) -> int:
        """Rows for those tokens: position p is in row ``p % window``."""
        return round_up(self.recent + self.group - 1, SLOT_STEP) + SLOT_STEP if self.keeps_recent else 0

    @property
    def key_row(self) -> int:
        """Elements of a row of the window of keys, zeros behind the last component."""
        return round_up(self.dim, 32)

    @property
    def full_size(self) -> int:
        """Bytes of an element of the windows."""
        return _FULL[self.full].itemsize

    @property
    def k_windows(self) -> int:
        """Bytes of a sequence's windows of keys, one for each head."""
        return self.heads * self.window * self.key_row * self.full_size

    @property
    def v_windows(self) -> int:
        """As ``k_windows``, of values."""
        return self.heads * self.window * self.value_size * self.full_size

    @property
    def windows(self) -> tuple[str, ...]:
        return ("kw", "vw") if self.keeps_recent and isinstance(self.layout, Paged) else ()

    def own(self, sequences: int) -> tuple[np.ndarray, ...]:
        sizes = (self.k_windows, self.v_windows) if self.windows else ()
        return tuple(np.zeros((sequences, size), np.uint8) for size in sizes)

    @property
    def k_behind(self) -> int:
        """Bytes of windows of keys behind the codes of a region."""
        return 0 if self.windows else self.k_windows

    @property
    def v_behind(self) -> int:
        """As ``k_behind``, of values."""
        return 0 if self.windows else self.v_windows

    @property
    def k_bytes(self) -> int:
        """Bytes of K of one region."""
        return self.heads * self.runs * self.k_run + self.k_behind + self.k_summaries

    @property
    def v_bytes(self) -> int:
        """Bytes of V of one region."""
        return self.heads * self.runs * self.v_run + self.v_behind

    def coded(self, tokens: Any) -> Any:
        """How many of so many tokens are codes; ``tokens`` is a number, or one of a kernel."""
        if not self.keeps_recent:
            return tokens
        old = max(tokens - self.recent, 0) if isinstance(tokens, int) else (tokens - self.recent).max(0)
        return old // self.group * self.group

    def empty(self, regions: int) -> tuple[np.ndarray, np.ndarray]:
        """A fresh cache, zero: bytes ``[regions, k_bytes]`` and ``[regions, v_bytes]``."""
        return np.zeros((regions, self.k_bytes), np.uint8), np.zeros((regions, self.v_bytes), np.uint8)

    def write(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A cache whose first slots hold codes of keys [regions, T, heads, dim] and values [regions, T, heads, vdim]."""
        k, v = self.empty(len(keys))
        codes, beside = self._encode(keys, self.k_residual, self.key_size)
        packed = np.concatenate([pack_keys(codes + np.uint8(self.bias), self.bits, self.key_panel), *beside], -1)
        self._runs_of(k, self.k_run)[...] = packed
        if self.summary:
            k[:, -self.k_summaries:] = self._summaries(self.read(k, v)[0])
        codes, beside = self._encode(values, self.v_residual, self.value_size)
        self._runs_of(v, self.v_run)[...] = np.concatenate([pack_values(codes, self.bits, self.panel), *beside], -1)
        return k, v

    def read(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the slots decode to, f32: K ``[regions, held, heads, dim]`` and V ``[regions, held, heads, vdim]``."""
        k, v = self._runs_of(k, self.k_run), self._runs_of(v, self.v_run)
        codes = unpack_keys(k[..., :self.k_codes], self.bits, self.key_panel, self.run) - np.uint8(self.bias)
        keys = self._decode(codes, k, self.k_codes, self.k_residual)
        codes = unpack_values(v[..., :self.v_codes], self.bits, self.panel, self.run)
        values = self._decode(codes, v, self.v_codes, self.v_residual)
        return self._rows(keys), self._rows(values)

    def _summaries(self, keys: np.ndarray) -> np.ndarray:
        """The bytes of the summaries of pages ``[pages, page, heads, dim]``: ``[pages, bytes]``."""
        halves = np.stack([keys.min(1), keys.max(1)], 2)
        wide = np.pad(halves, [(0, 0)] * 3 + [(0, self.summary_row - self.dim)]).astype(_FULL[self.full])
        return wide.reshape(len(keys), -1).view(np.uint8)

    def read_recent(self, k: np.ndarray, v: np.ndarray, region: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a region with so many tokens, those that are no codes yet: K ``[T, heads, dim]``, V ``[T, heads, vdim]``.

        ``k`` and ``v`` are the memory of regions, or of windows that are memory of their own.
        """
        rows = np.arange(self.coded(tokens), tokens) % self.window
        keys, values = (window[region, :, rows].astype(np.float32) for window in self.windows_of((k, v)))
        return keys[..., :self.dim], values[..., :self.vdim]

    def windows_of(self, memory: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """The windows of keys and of values, views ``[sequences, heads, window, row]`` of ``full``.

        ``memory`` is K and V of regions, or ends with windows that are memory of their own.
        """
        sizes = (self.k_windows, self.key_row), (self.v_windows, self.value_size)
        flat = [part[:, part.shape[1] - size:].view(_FULL[self.full]) for part, (size, _) in zip(memory[-2:], sizes)]
        return tuple(x.reshape(len(x), self.heads, self.window, row) for x, (_, row) in zip(flat, sizes))

    def _runs_of(self, memory: np.ndarray, run: int) -> np.ndarray:
        """The codes of regions, a view ``[regions, heads, runs, bytes]``."""
        return memory[:, :self.heads * self.runs * run].reshape(len(memory), self.heads, self.runs, run)

    def _encode(self, rows: np.ndarray, residual: ResidualLayout, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Codes ``[regions, heads, runs, run, size]``, and the bytes of what each run has beside them."""
        channels, grouped = residual.channels, residual.channels or self.has_residual
        regions, tokens, heads, given = rows.shape
        wide = np.zeros((regions, self.slots, heads, given), np.float32)
        wide[:, self.places()[:tokens]] = rows
        runs = wide.reshape(regions, self.runs, self.run, heads, given).transpose(0, 3, 1, 2, 4)
        groups = runs.reshape(*runs.shape[:3], -1, self.group if grouped else 1, given)
        coded = encode(groups, DType(self.dtype), 4 if channels else 5, DType(self.scales), self.rank, self.outliers)
        pad = [(0, 0)] * 5 + [(0, size - given)]
        codes = np.pad(coded.codes.view(np.uint8), pad).reshape(*runs.shape[:4], size)
        parts = [np.pad(x, pad) if channels else x for x in (coded.scale, coded.zero) if x is not None]
        parts = [np.ascontiguousarray(x).reshape(*runs.shape[:3], -1).view(np.uint8) for x in parts]
        return codes, parts + residual.pack(coded)

    def _decode(self, codes: np.ndarray, runs: np.ndarray, first: int, residual: ResidualLayout) -> np.ndarray:
        """The inverse of ``_encode``, for the bytes of runs, whose scales begin at ``first``."""
        numbers, step = codes.view(np.int8) if self.bits == 8 else codes, self.group if residual.channels else 1
        shape = *codes.shape[:3], self.run // step, step, codes.shape[-1]
        held = np.ascontiguousarray(runs[..., first:residual.start]).view(_SCALES[self.scales]).astype(np.float32).reshape(
            *shape[:3], 1 + self.has_zeros, shape[3], 1, -1)
        grouped = numbers.astype(np.float32).reshape(shape) * held[:, :, :, 0] + (held[:, :, :, 1] if self.has_zeros else 0)
        numbers = grouped.reshape(codes.shape)[..., :residual.size]
        return residual.add(numbers, runs) if self.has_residual else numbers

    def _rows(self, runs: np.ndarray) -> np.ndarray:
        """Runs ``[regions, heads, runs, run, size]`` -> rows ``[regions, held, heads, size]``."""
        rows = runs.transpose(0, 2, 3, 1, 4)
        return rows.reshape(len(rows), self.slots, self.heads, -1)[:, self.places()]
