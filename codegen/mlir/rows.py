"""Rows of q and k as attention kernels read them: f32 vectors, rotated on the way when ``nn.rope`` stands before."""

from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import Val, constant, fma, iota, shuffle


@dataclass(frozen=True)
class Rope:
    """``nn.rope`` of the first ``rotated`` elements; cos and sin are ``[B, S, rotated]``, without B if not ``batched``."""

    rotated: int
    style: str = "half"
    batched: bool = False
    dtype: str = "f32"

    def place(self, batch: Val, token: Val, tokens: Val) -> Val:
        """Where cos and sin of a token start."""
        return (batch * tokens + token if self.batched else token) * self.rotated


@dataclass(frozen=True)
class Angles:
    """The tables of a `Rope`."""

    rope: Rope
    cos: Buffer
    sin: Buffer


@dataclass(frozen=True)
class Row:
    """``size`` elements of ``memory`` from ``place`` on, rotated by the entries of ``angles`` from ``at`` on.

    A rotated row is rounded to the dtype of the memory, as the operation would.
    """

    kernel: Kernel
    memory: Buffer
    place: Val
    size: int
    angles: Angles | None = None
    at: Val | None = None

    def load(self, start: int) -> Val:
        """One vector of elements from ``start`` on, as f32; zeros behind the end."""
        x = self._part(self.memory, self.place, start, 0, self.size)
        if self.angles is None or start >= self.angles.rope.rotated:
            return x
        assert self.at is not None
        rotated = self.angles.rope.rotated
        cos = self._part(self.angles.cos, self.at, start, 0, rotated, outside=1.0)
        sin = self._part(self.angles.sin, self.at, start, 0, rotated)
        turned = self._turned(x, start, rotated // 2)
        return fma(x, cos, turned * sin).to(self.memory.dtype).to("f32")

    def _turned(self, x: Val, start: int, half: int) -> Val:
        """The other element of each pair, negated for the first: half a rotation further on, or the neighbour."""
        if self.angles.rope.style == "interleaved":  # type: ignore[union-attr]
            swapped = shuffle(x, x, [lane ^ 1 for lane in range(x.lanes)])
            return (iota(x.lanes) & 1).eq(0).select(-swapped, swapped)
        parts = []
        if start < half:
            parts.append(-self._part(self.memory, self.place + half, start, 0, half))
        if start + x.lanes > half:
            parts.append(self._part(self.memory, self.place - half, start, half, 2 * half))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _part(self, memory: Buffer, place: Val, start: int, low: int, high: int, outside: float = 0.0) -> Val:
        """The elements of one vector whose numbers lie in ``[low, high)``, the others as ``outside``."""
        lanes = self.kernel.lanes
        if low <= start and start + lanes <= high:
            return memory.load(place + start, lanes).to("f32")
        mask = iota(lanes) < high - start
        if low > start:
            mask = mask & (iota(lanes) >= low - start)
        value = memory.load(place + start, lanes, mask).to("f32")
        return mask.select(value, constant(outside, "f32", lanes)) if outside else value
