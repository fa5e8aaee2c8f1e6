"""``nn.attention(%q, %k, %v)`` -> ``nn.attention(%q', %k', %v)`` with fewer channels of queries and keys.

    %0 = core.reshape(%k) {shape=[B, S, 128]}
    %1 = core.gather(%0, @k.channels) {axis=2}
    %k' = core.reshape(%1) {shape=[B, S, 2, 40]}

Behind it everything has the smaller size: what is appended, the cache, and attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import Builder, Module, PassError, Rewriter, Value, dim_symbols, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Array, calibration
from tilewright.passes.calibration.stream import Stream

HEADS, SIZE = 2, 3


@dataclass(frozen=True)
class PruneKeys(Pass):
    """Take the channels out of keys, and of their queries, that scores need least (ThinK, arXiv:2407.21018).

    ``share`` of the channels go; what stays is rounded to a multiple of ``multiple``. Each head of keys loses those for
    which the norm of its queries times that of its keys is least, as attention takes them: after rotation.

    ThinK chooses for each prompt, by its last queries. Here channels are chosen once, on calibration data, so that keys are
    stored without them from the first token on. The scale of scores stays.
    """

    name: ClassVar[str] = "prune-keys"
    share: float = 0.4
    multiple: int = 4

    def __post_init__(self) -> None:
        """Raises PassError for options that make no sense."""
        if not 0 < self.share < 1 or self.multiple < 1:
            raise PassError(f"{self.name} takes a share above 0 and below 1, and a multiple of 1 or more")

    def run(self, module: Module, ctx: PassContext) -> bool:
        function, batches = calibration(module, ctx, self.name)
        rw = Rewriter(module, pattern=self.name)
        found = [op for op in function.walk(ops.Attention) if isinstance(op, ops.Attention) and self._fits(op, rw)]
        run = Stream(function, batches, found)
        energies: dict[ops.Attention, Array] = {}
        while found and run.at < len(run.body):
            op = run.body[run.at]
            if isinstance(op, ops.Attention) and op in found:
                energies[op] = energy(run, op)
            run.step()
        for op, score in energies.items():
            self._prune(rw, op, score, ctx)
        return ctx.take(rw)

    def kept(self, size: int) -> int:
        """How many of ``size`` channels stay."""
        return max(1, round(size * (1 - self.share) / self.multiple)) * self.multiple

    def _fits(self, op: ops.Attention, rw: Rewriter) -> bool:
        sizes = [op.q.shape[HEADS], op.k.shape[HEADS], op.k.shape[SIZE]]
        if dim_symbols(sizes):
            rw.skip(op, "heads of symbolic number or size")
            return False
        if self.kept(int(op.k.shape[SIZE])) >= int(op.k.shape[SIZE]):
            rw.skip(op, f"of {op.k.shape[SIZE]} channels none would go: they stay by {self.multiple}")
            return False
        return True

    def _prune(self, rw: Rewriter, op: ops.Attention, score: Array, ctx: PassContext) -> None:
        count = self.kept(score.shape[1])
        channels = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :count], axis=1)
        shared = int(op.q.shape[HEADS]) // len(channels)
        b = rw.before(op)
        q = picked(rw.module, b, op.q, np.repeat(channels, shared, 0))
        k = picked(rw.module, b, op.k, channels)
        left = np.take_along_axis(score, channels, 1).sum() / max(score.sum(), 1e-30)
        ctx.note(f"{op.loc.module or op.name}: {count} of {score.shape[1]} channels of keys, {left:.1%} of their energy")
        rw.replace(op, op.clone({}, q=q, k=k))


def energy(run: Stream, op: ops.Attention) -> Array:
    """For each head of keys and channel the squared norm of queries times that of keys, by sequence: ``[H, D]``."""
    total = np.zeros((int(op.k.shape[HEADS]), int(op.k.shape[SIZE])))
    for q, k in zip(run.values(op.q), run.values(op.k)):
        queries = np.square(q.astype(np.float32)).sum(1)
        queries = queries.reshape(len(q), len(total), -1, total.shape[1]).sum(2)
        total += (queries * np.square(k.astype(np.float32)).sum(1)).sum(0)
    return total


def picked(module: Module, b: Builder, value: Value, channels: Array) -> Value:
    """Of ``[B, S, H, D]`` the ``channels`` ``[H, N]`` of each head: ``[B, S, H, N]``."""
    heads, size = int(value.shape[HEADS]), int(value.shape[SIZE])
    places = (np.arange(heads)[:, None] * size + channels).astype(np.int64).ravel()
    index = module.constant(places, "channels")
    flat = b(ops.Reshape, value, (*value.shape[:2], heads * size))
    return b(ops.Reshape, b(ops.Gather, flat, index, 2), (*value.shape[:2], heads, channels.shape[1]))
