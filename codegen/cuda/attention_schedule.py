"""How attention is cut for a GPU: the knobs, what follows from them for heads of a size, and the default by rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.index import floor_div
from tilewright.codegen.index_shapes import as_dim as poly_dim
from tilewright.codegen.index_shapes import size
from tilewright.codegen.schedule import Schedule, constraint, knob
from tilewright.ir import Dim, as_dim

TENSOR_CORE_SIZE = 256
"""The largest head whose sums fit the registers of the form for tensor cores."""
_ROW_TILE = 16
_ACCUMULATORS = 200  # registers of a thread for scores and sums; the rest is for fragments and addresses
_ROOMY = 160  # accumulators with which nothing spills
_HELD = 168  # with the queries' fragments in registers too
_PART_KEYS = 128  # a part of fewer keys costs more to put together than it saves
_BLOCKS = 4  # a multiprocessor, beyond which no more parts are made
_PLAIN_ROWS = 16


@dataclass(frozen=True)
class CudaAttentionSchedule(Schedule):
    """A block holds ``rows`` (queries of a group of heads) and goes over tiles of ``keys``, ``stages`` of them under way.

    ``form`` is ``mma`` (tensor cores) or ``plain`` (f32). The ``warps`` of an ``mma`` block share its ``keys`` and split
    the rows, or share its ``rows`` and take a tile of keys each. The keys of a sequence are cut into up to ``parts``.
    """

    name: ClassVar[str] = "cuda_attention"
    form: str = knob("mma", ("mma", "plain"))
    share: str = knob("keys", ("keys", "rows"))
    rows: int = knob(128, (1, 2, 4, 8, 16, 32, 64, 128, 256))
    keys: int = knob(64, (16, 32, 64, 128))
    warps: int = knob(4, (1, 2, 4, 8))
    stages: int = knob(2, (2, 3, 4, 6))
    parts: int = knob(1, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128))

    @property
    def warp_rows(self) -> int:
        """Rows of a warp in the form for tensor cores."""
        return self.rows // (self.warps if self.share == "keys" else 1)

    @constraint
    def rows_make_tiles(self, target: CudaTarget) -> str | None:
        if self.form == "mma" and self.warp_rows not in (_ROW_TILE, 2 * _ROW_TILE):
            return f"a warp multiplies one or two tiles of {_ROW_TILE} rows, not {self.warp_rows} rows"
        if self.form == "plain" and self.share != "keys":
            return "in the plain form warps share keys"
        return None

    @constraint
    def has_a_thread_a_row(self, target: CudaTarget) -> str | None:
        return f"{self.rows} rows for {32 * self.warps} threads" if self.rows > 32 * self.warps else None


@dataclass(frozen=True)
class Codes:
    """Of a cache: ``bits`` of a code, bytes of a row of a ``key`` and of a ``value``, and of a ``scale`` with its zero."""

    bits: int
    key: int
    value: int
    scale: int


@dataclass(frozen=True)
class Heads:
    """Sizes: ``group`` query heads share each of ``heads`` key heads."""

    heads: int
    group: int
    dim: int
    vdim: int
    codes: Codes | None = None

    @property
    def fits_tensor_cores(self) -> bool:
        return max(self.dim, self.vdim) <= TENSOR_CORE_SIZE


@dataclass(frozen=True)
class Tiling:
    """What a schedule means for heads of given sizes. Strides keep rows of shared memory in different banks."""

    schedule: CudaAttentionSchedule
    heads: Heads

    @property
    def is_mma(self) -> bool:
        return self.schedule.form == "mma"

    @property
    def own_keys(self) -> bool:
        """Whether each warp has keys of its own."""
        return self.is_mma and self.schedule.share == "rows"

    @property
    def step(self) -> int:
        """Keys that a block takes at once."""
        return self.schedule.keys * (self.schedule.warps if self.own_keys else 1)

    @property
    def element(self) -> int:
        """Bytes of an element of a tile."""
        return 2 if self.is_mma else 4

    def width(self, size: int) -> int:
        """Elements of a row of a tile."""
        return round_up(size, 16 if self.is_mma or self.heads.codes else 4)

    def stride(self, size: int) -> int:
        """From row to row: an odd number of 16 bytes, where the width is an even one."""
        return self.width(size) + 16 // self.element

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of keys and one of values, as they are multiplied."""
        return self.element * self.schedule.keys * (self.stride(self.heads.dim) + self.stride(self.heads.vdim))

    @property
    def stage_bytes(self) -> int:
        """Bytes of a tile of keys and one of values, as they are brought: codes with their scales behind them."""
        codes = self.heads.codes
        return self.schedule.keys * (codes.key + codes.value + 2 * codes.scale) if codes else self.tile_bytes

    @property
    def slices(self) -> int:
        """Sums of each row that are added up at the end."""
        return self.schedule.warps if self.own_keys else 1

    @property
    def shared_bytes(self) -> int:
        """Of a block: queries, stages and, in the plain form, scores; later the sums."""
        rings = self.schedule.warps if self.own_keys else 1
        rows = self.schedule.rows
        tiles = self.tile_bytes if self.heads.codes else 0
        loop = self.element * rows * self.stride(self.heads.dim) + rings * (tiles + self.schedule.stages * self.stage_bytes)
        if not self.is_mma:
            loop += 4 * rows * (self.schedule.keys + 4 + 3)
        return max(loop, 4 * self.slices * rows * (self.sum_stride + 2))

    @property
    def sum_stride(self) -> int:
        return self.width(self.heads.vdim) + 8

    @property
    def tiles(self) -> int:
        """Tiles of rows a warp."""
        return self.schedule.warp_rows // _ROW_TILE

    @property
    def accumulators(self) -> int:
        """Registers of a thread for scores and sums."""
        if not self.is_mma:
            each = self._each(self.heads.vdim)
            return -(-self.schedule.rows // each * self.heads.vdim // (32 * self.schedule.warps)) * each
        return self.tiles * (self.width(self.heads.vdim) + self.schedule.keys) // 2

    @property
    def holds_queries(self) -> bool:
        """Whether the queries' fragments stay in registers."""
        return self.accumulators + self.tiles * self.width(self.heads.dim) // 4 <= _HELD

    @property
    def constants(self) -> dict[str, int]:
        """The sizes that the C of the kernels asks for."""
        s, h = self.schedule, self.heads
        key, value = self.stride(h.dim), self.stride(h.vdim)
        rows = {"KEY_ROW": self.width(h.dim), "VALUE_ROW": self.width(h.vdim), "KEY_HELD": h.dim, "VALUE_HELD": h.vdim,
                "KEY_STEP": key, "VALUE_STEP": value}  # fmt: skip
        if h.codes:
            rows = {f"{what}_{name}": count for name in ("ROW", "HELD", "STEP")
                    for what, count in (("KEY", h.codes.key), ("VALUE", h.codes.value))}  # fmt: skip
        return rows | {
            "HEADS": h.heads, "GROUP": h.group, "DIM": h.dim, "VDIM": h.vdim, "ROWS": s.rows, "KEYS": s.keys,
            "WARPS": s.warps, "THREADS": 32 * s.warps, "STAGES": s.stages, "STEP": self.step,
            "LEAST": -(-_PART_KEYS // self.step), "TILES": self.tiles, "OWN_KEYS": int(self.own_keys),
            "HELD": int(self.holds_queries), "SCORES_EACH": self._each(s.keys), "SUMS_EACH": self._each(h.vdim),
            "SLICES": self.slices, "STAGE": self.stage_bytes // (1 if h.codes else self.element),
            "WIDTH": self.width(h.dim), "VALUE_WIDTH": self.width(h.vdim),
            "KEY_STRIDE": key, "VALUE_STRIDE": value, "SUM_STRIDE": self.sum_stride,
            "CODE_BITS": h.codes.bits if h.codes else 0, "SCALE_BYTES": h.codes.scale if h.codes else 0,
            "ZEROS": int(h.codes is not None and h.codes.bits < 8),
            "SCORE_STRIDE": s.keys + 4, "RECORD": round_up(h.vdim + 2, 4),
        }  # fmt: skip

    def _each(self, columns: int) -> int:
        """Rows that a thread of the plain form takes at once, so that all threads have work."""
        return max(n for n in (1, 2, 4) if n == 1 or (n <= self.schedule.rows and n * 32 * self.schedule.warps
                                                      <= self.schedule.rows * columns))  # fmt: skip

    def parts(self, lanes: Dim, target: CudaTarget) -> Dim:
        """Parts of the keys of each of ``lanes`` blocks: fewer where there are blocks enough without."""
        if self.schedule.parts == 1:
            return 1
        enough = floor_div(size(_BLOCKS * target.multiprocessors), size(lanes))
        return as_dim(sympy.Max(1, sympy.Min(self.schedule.parts, poly_dim(enough))))

    def refusal(self, target: CudaTarget) -> str | None:
        """Why a block cannot run on ``target``, or None."""
        if self.is_mma and not self.heads.fits_tensor_cores:
            return f"heads of more than {TENSOR_CORE_SIZE} elements do not fit the registers"
        if self.accumulators > _ACCUMULATORS:
            return f"{self.accumulators} accumulators a thread; {_ACCUMULATORS} fit the registers"
        if self.shared_bytes > target.shared_bytes:
            return f"{self.shared_bytes} bytes of shared memory; {target} has {target.shared_bytes}"
        return None


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def default_schedule(heads: Heads, queries: int | None, keys: int | None, mma: bool, target: CudaTarget
                     ) -> CudaAttentionSchedule:  # fmt: skip
    """The first of what is preferred that fits, twice where that can be; ``queries`` and ``keys`` where they are known."""
    rows = None if queries is None else queries * heads.group
    tilings = [Tiling(option, heads) for option in (_mma(rows) if mma else _plain(rows))]
    fitting = [t for t in tilings if t.refusal(target) is None and t.accumulators <= _ROOMY] or tilings[-1:]
    chosen = next((t for t in fitting if 2 * t.shared_bytes + 2048 <= target.shared_bytes), fitting[0]).schedule
    if rows is None:
        return chosen
    blocks = heads.heads * -(-rows // chosen.rows)
    return replace(chosen, parts=_parts(blocks, keys, target))


def _mma(rows: int | None) -> Iterator[CudaAttentionSchedule]:
    """With few rows warps have keys of their own; otherwise rows, first as many as the registers hold."""
    if rows is not None and rows <= 2 * _ROW_TILE:
        rows = round_up(rows, _ROW_TILE)
        for warps, stages in ((4, 4), (4, 3), (4, 2), (2, 3), (2, 2), (1, 2)):
            yield CudaAttentionSchedule("mma", "rows", rows, 16, warps, stages)
        return
    for rows, keys in ((128, 64), (128, 32), (64, 64), (64, 32), (64, 16)):
        for stages in (3, 2):
            yield CudaAttentionSchedule("mma", "keys", rows, keys, 4, stages)


def _plain(rows: int | None) -> Iterator[CudaAttentionSchedule]:
    most = min(_PLAIN_ROWS, 1 << (rows - 1).bit_length()) if rows else _PLAIN_ROWS
    for keys, stages in ((32, 3), (32, 2), (16, 2)):
        yield CudaAttentionSchedule("plain", "keys", most, keys, 4, stages)
    yield CudaAttentionSchedule("plain", "keys", min(4, most), 16, 4, 2)


def _parts(blocks: int, keys: int | None, target: CudaTarget) -> int:
    """As many as give every multiprocessor two blocks of one sequence, none of too few keys."""
    most = 2 * target.multiprocessors // blocks
    if keys is not None:
        most = min(most, keys // _PART_KEYS)
    return max(n for n in CudaAttentionSchedule.domains()["parts"] if n <= max(most, 1))
