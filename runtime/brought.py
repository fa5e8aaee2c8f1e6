"""Weights that whoever loads an artifact brings: its file of weights ends behind the header, which says where each lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.runtime.manifest import DTYPES
from tilewright.runtime.memory import address, pages

if TYPE_CHECKING:
    from tilewright.runtime.cuda import Device, Memory

Table = Mapping[str, tuple[str, Sequence[int], int]]
Bring = Callable[[Mapping[str, Any]], object]
"""Writes all weights, which it is given as arrays by name: NumPy's, or `dlpack.DeviceArray` on a GPU."""


class BroughtWeights:
    """``size`` bytes of weights that ``bring`` writes; ``address``: where they are, on a CPU once there was `on_host`.

    ``table`` is that of a file of weights whose data would begin at byte ``begin``.
    """

    def __init__(self, table: Table, begin: int, bring: Bring) -> None:
        self.places = {name: (DTYPES[dtype], tuple(shape), at - begin) for name, (dtype, shape, at) in table.items()}
        self.size = max((at + nbytes(dtype, shape) for dtype, shape, at in self.places.values()), default=0)
        self.bring, self.address, self.bytes = bring, 0, 0

    def on_host(self) -> None:
        """Have them written to memory of this process."""
        self._memory = pages(self.size, huge=True)
        self.address = address(self._memory)
        self.bring({name: self._memory[at : at + nbytes(dtype, shape)].view(dtype).reshape(shape)
                    for name, (dtype, shape, at) in self.places.items()})  # fmt: skip

    def on_device(self, memory: Memory, device: Device) -> None:
        """Have them written to a GPU's memory; the work that does so may still be under way on the default stream."""
        from tilewright.runtime.dlpack import DeviceArray

        def to_host(array: DeviceArray) -> np.ndarray[Any, Any]:
            return device.read(array.address, np.empty(array.shape, array.dtype))

        self.bring({name: DeviceArray(memory.address + at, shape, dtype, device.ordinal, memory, to_host)
                    for name, (dtype, shape, at) in self.places.items()})  # fmt: skip
        device.settle()


def nbytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
