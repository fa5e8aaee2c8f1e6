"""Caches of codes beside which the newest tokens stay in full, as a kernel finds them and as it should leave them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.ir import KVType
from tilewright.ir.ops.kv_codes import appended, rounded

Array = np.ndarray[Any, Any]
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Held:
    """Which tokens a cache holds: ``tokens`` [B] of each sequence, in its own slots or in the pages of ``table`` [B, T]."""

    kind: KVType
    tokens: Array
    table: Array | None = None

    def places(self) -> Iterator[tuple[Any, Any]]:
        """Of each sequence where those that are codes are, and the others: indices of regions and slots."""
        for sequence, tokens in enumerate(self.tokens.tolist()):
            coded = self.kind.coded(tokens)
            yield self._at(sequence, np.arange(coded)), self._at(sequence, np.arange(coded, tokens))

    def _at(self, sequence: int, positions: Array) -> Any:
        if self.table is None:
            return np.full_like(positions, sequence), positions
        return self.table[sequence, positions // self.kind.page], positions % self.kind.page

    def decoded(self, numbers: Pair) -> Pair:
        """What slots decode to that hold ``numbers``; zeros where there is no token."""
        out = np.zeros_like(numbers[0]), np.zeros_like(numbers[1])
        for old, new in self.places():
            for at, as_held in ((old, rounded), (new, appended)):
                if at[1].size:
                    for part, x in zip(out, as_held(self.kind, numbers[0][at], numbers[1][at])):
                        part[at] = x
        return out

    def written(self, layout: CodeLayout, numbers: Pair, before: tuple[Array, ...] = ()) -> tuple[Array, ...]:
        """The memory of the cache: codes of old tokens, the others in windows, whose other rows are as ``before``."""
        codes = np.zeros_like(numbers[0]), np.zeros_like(numbers[1])
        for old, _ in self.places():
            for part, x in zip(codes, numbers):
                part[old] = x[old]
        memory = layout.write(*codes)
        memory += layout.own(len(self.tokens))
        windows = layout.windows_of(memory)
        for part, x in zip(windows, layout.windows_of(before) if before else ()):
            part[...] = x
        for sequence, (_, new) in enumerate(self.places()):
            rows = np.arange(self.tokens[sequence] - new[1].size, self.tokens[sequence]) % layout.window
            for part, x in zip(windows, numbers):
                part[sequence, :, rows, : x.shape[-1]] = x[new]
        return memory
