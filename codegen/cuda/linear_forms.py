"""The forms of a linear kernel: which tiles a schedule means for a layer, for how many rows each is, and the default.

The number of rows decides at launch. A few rows (decoding) are bound by the bandwidth of the weights: each warp streams
some by itself. With some rows, blocks divide K until all multiprocessors have work. Many rows are bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tilewright.codegen.cuda.linear_layer import Layer
from tilewright.codegen.cuda.linear_schedule import MOST_SUMS, CudaLinearSchedule
from tilewright.codegen.cuda.target import CudaTarget

FEW = (1, 2, 4, 8)
SOME = (16, 32, 64)
SPLIT_ROWS, SOME_ROWS, _MANY_ROWS = 128, 512, 1 << 40
_MOST_SPLITS = 16
_THREADS, _PLAIN_THREADS = 1024, 512
_PLAIN_K = 16
_FEW_THREADS = 512  # of a multiprocessor
_STAGES = (4, 3, 2)
_WIDE = 4096  # features from which on tiles are wide


@dataclass(frozen=True)
class Form:
    """A function for ``least`` to ``most`` rows: a block has ``m`` rows and ``n`` features, ``splits`` blocks divide K."""

    layer: Layer
    least: int
    most: int
    m: int
    n: int
    splits: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        raise NotImplementedError

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block."""
        raise NotImplementedError

    @property
    def sums(self) -> int:
        """That a thread keeps."""
        raise NotImplementedError

    @property
    def under_way(self) -> int:
        """Bytes of weights that a block has asked for at any time."""
        raise NotImplementedError

    @property
    def resident(self) -> int:
        """Blocks that registers must suffice for: a few rows wait for memory, others for arithmetic."""
        return max(_FEW_THREADS // self.threads, 1) if self.most <= FEW[-1] else 1

    @property
    def call(self) -> str:
        """The C function template, with its arguments."""
        raise NotImplementedError

    def blocks(self, rows: int) -> int:
        return -(-rows // self.m) * -(-self.layer.n // self.n) * self.splits

    def refusal(self, target: CudaTarget) -> str | None:
        """Why the form cannot run on ``target``, or None."""
        if self.threads > _THREADS:
            return f"{self.threads} threads a block, at most {_THREADS}"
        if self.sums > MOST_SUMS:
            return f"{self.sums} sums a thread, at most {MOST_SUMS}"
        if self.shared > target.shared_bytes:
            return f"{self.shared} bytes of shared memory of {target.shared_bytes}"
        return None


@dataclass(frozen=True)
class Tile(Form):
    """For tensor cores, ``tw_shape`` of linear_mma.cuh: ``across * down`` warps a team, ``k`` elements of K a stage."""

    k: int = 0
    across: int = 1
    down: int = 1
    teams: int = 1
    stages: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.across * self.down * self.teams

    @property
    def columns(self) -> int:
        """Tiles of 8 rows of a warp."""
        return -(-self.m // 8) // self.down

    @property
    def sums(self) -> int:
        return sums_of(self.layer, self.n // (16 * self.across), self.columns)

    @property
    def shared(self) -> int:
        x = -(-self.m * self.k * self.layer.x_bits // 1024) * 128
        stages = self.teams * self.stages * (x + self._weight_stage)
        columns = self.columns // (self.columns & -self.columns)  # the fewest whose sums are written together
        return max(stages, self.threads // 32 * self.layer.parts * 32 * columns * (self.n // self.across + 4))

    @property
    def _weight_stage(self) -> int:
        return self.layer.parts * self.n * self.k * self.layer.bits // 8

    @property
    def under_way(self) -> int:
        return self.teams * (self.stages - 1) * self._weight_stage

    @property
    def call(self) -> str:
        numbers = (self.n, self.m, self.k, self.across, self.down, self.teams, self.stages)
        return f"tw_multiply<tw_layer, tw_shape<{', '.join(map(str, numbers))}>>"


@dataclass(frozen=True)
class PlainTile(Form):
    """For f32 and what tensor cores cannot multiply: a thread has ``each_m * each_n`` sums of each part."""

    each_m: int = 1
    each_n: int = 1
    warps: int = 0
    """Not 0: lanes share a row of K, as linear_plain.cuh has it for a few rows."""

    @property
    def threads(self) -> int:
        return 32 * self.warps or self.m * self.n // (self.each_m * self.each_n)

    @property
    def sums(self) -> int:
        return self.layer.parts * self.each_m * self.each_n

    @property
    def shared(self) -> int:
        if self.warps:
            return 0
        parts = self.layer.parts
        return 4 * max(_PLAIN_K * (self.m + 4 + parts * (self.n + 1)), parts * self.m // self.each_m * self.n)

    @property
    def under_way(self) -> int:
        k = 4 * 32 if self.warps else _PLAIN_K
        return self.layer.parts * self.n * k * self.layer.bits // 8

    @property
    def call(self) -> str:
        if self.warps:
            return f"tw_multiply_few<tw_layer, {self.each_m}, {self.each_n}>"
        return f"tw_multiply_plain<tw_layer, {self.m}, {self.n}, {_PLAIN_K}, {self.each_m}, {self.each_n}>"

    def refusal(self, target: CudaTarget) -> str | None:
        if self.threads > _PLAIN_THREADS:
            return f"{self.threads} threads a block, at most {_PLAIN_THREADS}"
        return super().refusal(target)


def sums_of(layer: Layer, tiles: int, columns: int) -> int:
    """That a thread keeps for tiles of 16 features and columns of 8 rows: twice where those of groups add up apart."""
    return layer.parts * tiles * columns * 4 * (2 if layer.grouped else 1)


def fitting(layer: Layer, tiles: int, columns: int) -> int:
    """As many tiles of 16 features as a warp's registers hold sums for, at most ``tiles``."""
    while tiles > 1 and sums_of(layer, tiles, columns) > MOST_SUMS:
        tiles //= 2
    return tiles


def forms(layer: Layer, schedule: CudaLinearSchedule, target: CudaTarget, on_tensor_cores: bool) -> list[Form]:
    """For any number of rows, the fewest first."""
    return list(_tiles(layer, schedule, target) if on_tensor_cores else _plain(layer, schedule))


def form_for(found: Iterable[Form], rows: int) -> Form:
    """The one that runs with ``rows``."""
    return next(f for f in found if rows <= f.most)


def refusal(found: Iterable[Form], target: CudaTarget) -> str | None:
    """Why not all forms can run on ``target``, or None."""
    return next((reason for f in found if (reason := f.refusal(target))), None)


def _tiles(layer: Layer, s: CudaLinearSchedule, target: CudaTarget) -> Iterable[Form]:
    k = max(8 * s.few_bytes // layer.bits, layer.least_k)
    for rows in FEW:
        yield Tile(layer, rows // 2 + 1, rows, rows, s.few_n, k=k, teams=s.few_warps, stages=s.few_stages)
    k = max(s.some_k, layer.least_k)
    for rows in SOME:
        across = rows // 16
        n = 16 * across * fitting(layer, s.some_n // 16, rows // 8)
        teams = max(s.some_warps // across, 1)
        tile = Tile(layer, rows // 2 + 1, rows, rows, n, k=k, across=across, teams=teams, stages=s.some_stages)
        most = SPLIT_ROWS if rows == SOME[-1] else rows
        yield replace(tile, most=most, splits=_splits(tile, s.fill * target.multiprocessors))
    yield replace(tile, least=SPLIT_ROWS + 1, most=SOME_ROWS)
    columns = s.block_m // 8 // s.warps_m
    n = 16 * s.warps_n * fitting(layer, s.block_n // 16 // s.warps_n, columns)
    yield Tile(layer, SOME_ROWS + 1, _MANY_ROWS, s.block_m, n, k=max(s.block_k, layer.least_k), across=s.warps_n,
               down=s.warps_m, stages=s.stages)  # fmt: skip


def _splits(tile: Tile, wanted: int) -> int:
    """How many blocks divide K: until ``wanted`` are nearly there, each team with two units at least."""
    splits, units = 1, -(-tile.layer.k // tile.k)
    while splits < _MOST_SPLITS and 4 * tile.blocks(tile.m) * splits < 3 * wanted and units >= 4 * splits * tile.teams:
        splits *= 2
    return splits


def _plain(layer: Layer, s: CudaLinearSchedule) -> Iterable[Form]:
    features = s.few_n // 16
    for rows in FEW:
        yield PlainTile(layer, rows // 2 + 1, rows, rows, features * s.few_warps, each_m=rows, each_n=features,
                        warps=s.few_warps)  # fmt: skip
    yield PlainTile(layer, FEW[-1] + 1, SOME[-1], 32, 64, each_m=4, each_n=4)
    yield PlainTile(layer, SOME[-1] + 1, _MANY_ROWS, s.block_m, s.block_n, each_m=8, each_n=8 // layer.parts)


def default_schedule(layer: Layer, target: CudaTarget, on_tensor_cores: bool) -> CudaLinearSchedule:
    """By rule: a warp that streams asks for two KiB at a time, and pipelines are as deep as shared memory allows."""
    if not on_tensor_cores:
        return CudaLinearSchedule()
    chosen = CudaLinearSchedule(
        few_n=32 if layer.parts == 1 and layer.bits <= 4 and layer.n >= 2 * _WIDE else 16,
        few_bytes=128 if layer.parts == 1 and layer.bits >= 8 else 64,
        some_k=32 if layer.bits == 16 else 64,
        block_n=256 if layer.n >= _WIDE else 128,
    )
    deep = [{"few_stages": n} for n in _STAGES]
    chosen = _first(layer, chosen, target, deep, FEW[-1], 2)
    deep = [{"some_stages": n} for n in _STAGES]
    chosen = _first(layer, chosen, target, deep, SOME_ROWS)
    deep = [{"block_k": k, "stages": n} for k, n in ((64, 4), (64, 3), (32, 4), (32, 3), (32, 2))]
    return _first(layer, chosen, target, deep, _MANY_ROWS)


def _first(layer: Layer, schedule: CudaLinearSchedule, target: CudaTarget, knobs: Iterable[dict[str, int]], most: int,
           blocks: int = 1) -> CudaLinearSchedule:  # fmt: skip
    """``schedule`` with the first of ``knobs`` with which so many ``blocks`` for up to ``most`` rows fit shared memory."""
    for values in knobs:
        schedule = replace(schedule, **values)
        found = [f for f in forms(layer, schedule, target, True) if f.most <= most]
        if all(f.shared * blocks <= target.shared_bytes for f in found):
            break
    return schedule
