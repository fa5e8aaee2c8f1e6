"""What a kernel that attends to a cache is: its facts while compiling, and its arguments."""

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.attention_pattern import DENSE, Slice
from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import SLOT_STEP, round_up
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.kv_chosen import Blocks
from tilewright.codegen.mlir.kv_codes import ONE_DIGIT, Digits
from tilewright.codegen.mlir.kv_parts import part_size
from tilewright.codegen.mlir.rows import Rope
from tilewright.codegen.mlir.value import Val
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.ir import Paged, Ring
from tilewright.ir.ops.kv_policies import Rule

PIECE = 512
"""In decoding the keys of a head are attended to in pieces that begin at multiples of this, each for itself."""

POOL_SPACE = 64
"""Elements before and behind worths that are pooled."""


@dataclass(frozen=True)
class AttendSpec:
    """q ``[B, S, heads, dim]`` over a cache -> ``[B, S, heads, vdim]``; query s of sequence b stands at start[b] + s.

    ``bias`` names the axes it has, out of "bhst" with t the cache's length. ``s`` is S when it is static, as in decoding.
    With ``rope`` the queries are rotated on the way. ``far`` says where the queries lie that meet a ring's sinks, if these
    are others. With ``chosen`` a head of keys is seen on so many pages at the most, which are given, with ``blocks`` on
    chosen blocks. With a ``rule`` the cache keeps tokens by it afterwards, by weights at ``temperature``.
    """

    heads: int
    cache: CacheLayout | CodeLayout
    dtype: str = "f32"
    out_dtype: str = "f32"
    scale: float = 1.0
    window: int = -1
    chunk: int = 0
    softcap: float = 0.0
    bias: str | None = None
    bias_dtype: str = "f32"
    sinks: str | None = None
    s: int | None = None
    rope: Rope | None = None
    digits: Digits = ONE_DIGIT
    q: Slice = DENSE
    out: Slice = DENSE
    far: Slice | None = None
    chosen: int = 0
    blocks: Blocks | None = None
    rule: Rule | None = None
    temperature: float = 1.0

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.cache.heads

    @property
    def sinks_kept(self) -> int:
        """Positions that a ring keeps for good."""
        return self.cache.layout.sinks if isinstance(self.cache.layout, Ring) else 0

    def queries(self, schedule: AttentionSchedule) -> int:
        """Queries of one task."""
        most = max(schedule.rows // self.group, 1)
        return self.blocks.queries_of_task(most) if self.blocks else most

    def keys(self, schedule: AttentionSchedule) -> int:
        """Keys of a block."""
        return max(schedule.keys, self.cache.run) if isinstance(self.cache, CodeLayout) else schedule.keys

    def piece(self, schedule: AttentionSchedule) -> int:
        """Keys of a piece, whole blocks."""
        return round_up(PIECE, self.keys(schedule))

    def pieces(self, schedule: AttentionSchedule) -> int:
        """The most pieces that what a query sees of one head lies in; 1 when they are not told apart."""
        if self.s != 1:
            return 1
        size, layout = self.piece(schedule), self.cache.layout
        if isinstance(layout, Ring):
            return -(-(layout.window + self.keys(schedule)) // size) + 1
        most = min(self.cache.most, self.chosen * self.cache.run) if self.chosen else self.cache.most
        return -(-most // size)

    def together(self, schedule: AttentionSchedule) -> int:
        """Sequences that may go through a piece in one task, where they have the same pages there."""
        whole = not self.chosen and self.window <= 0 and self.chunk <= 0
        floats = isinstance(self.cache, CacheLayout) and isinstance(self.cache.layout, Paged)
        return self.queries(schedule) if whole and floats and self.pieces(schedule) > 1 else 1

    def tasks(self, schedule: AttentionSchedule, b: Any, s: Any) -> Any:
        """Number of tasks: an int, or an expression when ``b`` or ``s`` is symbolic."""
        return b * self.cache.heads * (self.parts(schedule) if self.s == 1 else -(-s // self.queries(schedule)))

    def parts(self, schedule: AttentionSchedule) -> int:
        """Tasks that the pieces of one head are dealt out to."""
        return min(schedule.parts, self.pieces(schedule))

    def in_pieces(self, schedule: AttentionSchedule) -> bool:
        """Whether what a task found is kept, for the tasks that run last."""
        return self.pieces(schedule) > 1 or (self.rule is not None and self.s == 1)

    def last(self, schedule: AttentionSchedule, b: Any) -> Any:
        """Number of tasks that put pieces together, or choose what stays."""
        return b * self.cache.heads if self.in_pieces(schedule) or self.rule else 0

    def temporaries(self, schedule: AttentionSchedule) -> dict[str, int]:
        """f32 elements for each sequence of buffers that tasks leave to those that run last, or work in."""
        found: dict[str, int] = {}
        if self.in_pieces(schedule):
            found["parts"] = self.pieces(schedule) * self.heads * part_size(self.cache.vdim)
        if self.rule is not None:
            rows = self.heads if self.s == 1 else self.cache.heads * self.group * self.queries(schedule)
            found["weights"] = rows * self.cache.slots
            found["tops"] = rows * self.runs
            found["choice"] = self.cache.heads * self.spaces * (2 * POOL_SPACE + self.cache.slots)
        return found

    @property
    def spaces(self) -> int:
        """Numbers for each slot that choosing works with; merging takes two more."""
        return 4 if self.rule is not None and self.rule.merge else 2

    @property
    def runs(self) -> int:
        """Runs of SLOT_STEP slots of a sequence, rounded up to whole vectors."""
        return -(-self.cache.slots // SLOT_STEP // 16) * 16

    def scratch(self, schedule: AttentionSchedule, b: Any) -> tuple[Any, ...]:
        """Bytes of the temporaries."""
        return tuple(b * 4 * count for count in self.temporaries(schedule).values())


@dataclass(frozen=True)
class AttendBuffers:
    """Arguments of the kernel; ``k`` and ``v`` are the cache, ``start`` is i64 [B].

    Pages have a ``table`` i32 [B, T], whose ``width`` is T; ``pages`` i32 [B, heads, chosen] are those to see, numbered in
    the sequence. ``far`` are the queries that meet a ring's sinks, ``blocks`` the lists of those chosen. ``count`` i64 [B]
    are the tokens of the text, where some are chosen to stay. ``parts`` and what follows ``count`` are temporaries, but for
    the windows ``kw`` and ``vw`` of sequences whose codes are in pages.
    """

    q: Buffer
    k: Buffer
    v: Buffer
    start: Buffer
    out: Buffer
    bias: Buffer | None = None
    sinks: Buffer | None = None
    cos: Buffer | None = None
    sin: Buffer | None = None
    parts: Buffer | None = None
    table: Buffer | None = None
    width: Val | None = None
    far: Buffer | None = None
    pages: Buffer | None = None
    blocks: Buffer | None = None
    count: Buffer | None = None
    weights: Buffer | None = None
    tops: Buffer | None = None
    choice: Buffer | None = None
    kw: Buffer | None = None
    vw: Buffer | None = None
