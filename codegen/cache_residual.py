"""How factors and outliers (GEAR, arXiv:2403.05527) lie in a run of codes on CPUs, behind its scales and zeros.

First the factors of tokens, ``[rank][run]``, then those of components, ``[run / group][rank][row]``, zeros behind the last
component, all of the type of scales. Then what outliers lack, of the same type, and bytes with their places among the
numbers that share a scale: ``[2 * outliers][run]``, or ``[run / group][2 * outliers][row]`` where these are a channel's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilewright.ir.ops.kv_codes import Coded


@dataclass(frozen=True)
class ResidualLayout:
    """Of a run of ``run`` keys, or values, of ``size`` components, from byte ``start`` on; ``row`` of them in memory.

    ``stored`` is the type of scales; ``channels`` says that these are of components, not of tokens.
    """

    start: int
    run: int
    group: int
    size: int
    row: int
    rank: int
    outliers: int
    stored: np.dtype
    channels: bool

    @property
    def groups(self) -> int:
        """Of a run."""
        return self.run // self.group

    @property
    def components(self) -> int:
        """The byte where the factors of components begin."""
        return self.start + self.rank * self.run * self.stored.itemsize

    @property
    def lack(self) -> int:
        """The byte where what outliers lack begins."""
        return self.components + self.groups * self.rank * self.row * self.stored.itemsize

    @property
    def places(self) -> int:
        """The byte where their places begin."""
        return self.lack + self.lines * 2 * self.outliers * self.line * self.stored.itemsize

    @property
    def lines(self) -> int:
        """Lines of ``line`` numbers, each number one of the first, second .. outliers of those that share a scale."""
        return self.groups if self.channels else 1

    @property
    def line(self) -> int:
        return self.row if self.channels else self.run

    @property
    def bytes(self) -> int:
        return self.places - self.start + self.lines * 2 * self.outliers * self.line

    def pack(self, coded: Coded) -> list[np.ndarray]:
        """The bytes of runs ``[..., groups, group, size]``: some ``[..., bytes]``, in order."""
        parts: list[np.ndarray] = []
        if coded.factors is not None:
            a, b = coded.factors
            parts += [np.moveaxis(a, -1, -3), self._wide(np.swapaxes(b, -1, -2))]
        if coded.outliers is not None:
            for x in reversed(coded.outliers):
                parts.append(self._wide(x) if self.channels else np.moveaxis(x, -1, -3))
            parts[-1] = parts[-1].astype(np.uint8)
        return [np.ascontiguousarray(x).reshape(*coded.codes.shape[:-3], -1).view(np.uint8) for x in parts]

    def _wide(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.row - self.size)])

    def add(self, numbers: np.ndarray, runs: np.ndarray) -> np.ndarray:
        """What codes decode to, ``[..., run, size]``, and what the runs ``[..., bytes]`` have beside these."""
        first, found = numbers.shape[:-2], numbers.reshape(*numbers.shape[:-2], self.groups, self.group, self.size)
        if self.rank:
            a = self._floats(runs[..., self.start : self.components]).reshape(*first, self.rank, self.groups, self.group)
            b = self._floats(runs[..., self.components : self.lack]).reshape(*first, self.groups, self.rank, self.row)
            found = found + np.moveaxis(a, -3, -1) @ b[..., : self.size]
        if self.outliers:
            axis, both = -2 if self.channels else -1, 2 * self.outliers
            parts = self._floats(runs[..., self.lack : self.places]), runs[..., self.places : self.start + self.bytes]
            lack, places = (self._along(x.reshape(*first, self.lines, both, self.line)) for x in parts)
            np.put_along_axis(found, places, np.take_along_axis(found, places, axis) + lack, axis)
        return found.reshape(numbers.shape)

    def _along(self, lines: np.ndarray) -> np.ndarray:
        """Lines as they lie along groups of numbers."""
        if self.channels:
            return lines[..., : self.size]
        return np.moveaxis(lines, -2, -1).reshape(*lines.shape[:-3], self.groups, self.group, -1)

    def _floats(self, part: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(part).view(self.stored).astype(np.float32)
