"""The memory that candidates of one workload work on.

Inputs are the same arrays in every call and stay in the processor's caches, as they do in a model. Weights and KV caches do
not: a model reads those of all other layers before it comes to the same ones again. So each call takes the next of many
copies, several times as much in all as the last-level cache holds, in large pages as an artifact's are. Where they are less
than 256 KiB in all there is one copy.

A ``Bench`` is made once a workload; its memory is shared with the forked processes that run the candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from mmap import PAGESIZE
from pathlib import Path

import numpy as np

from tilewright.codegen.emitters import pack
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.packing import parse_packing
from tilewright.ir import DType, KVType, eval_dim
from tilewright.measuring_inputs import Array, Operand, Subject, make_inputs
from tilewright.measuring_reference import expected
from tilewright.runtime.memory import address, as_aligned, pages
from tilewright.runtime.tolerance import Expected

_WARM = 256 << 10
_LEAST_COLD, _MOST_COLD = 128 << 20, 512 << 20
_CACHES = 4  # times the last-level cache
_USUAL_CACHE = 32 << 20
_MOST_COPIES = 256
_KEPT = 1200 << 20
"""Bytes of packed weights that are kept, those used last."""
_SPARE = 1024 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Copies = list[tuple[Array, ...]]
"""The memory of an argument, for each copy: one array, or K and V."""


@cache
def last_level_cache() -> int:
    """Bytes of this machine's largest cache, 32 MB where it does not say."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in _UNITS:
            found.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(found) or _USUAL_CACHE


class Blocks:
    """Memory in large pages that is used again: where memory is short, the system takes long to find such pages."""

    def __init__(self) -> None:
        self.spare: list[Array] = []

    def take(self, sizes: Sequence[int]) -> tuple[Array, list[Array]]:
        """A block, and parts of these sizes of it, each at a page of its own; what is in them is of no account."""
        begins = list(accumulate((-(-size // PAGESIZE) * PAGESIZE for size in sizes), initial=0))
        fit = [b for b in self.spare if begins[-1] <= b.size <= 2 * begins[-1]]
        block = min(fit, key=lambda b: b.size) if fit else pages(begins[-1], huge=True)
        self.spare = [b for b in self.spare if b is not block]
        return block, [block[begin : begin + size] for begin, size in zip(begins, sizes)]

    def give(self, block: Array) -> None:
        """Have ``block`` used again."""
        self.spare.append(block)
        while sum(b.size for b in self.spare) > _SPARE:
            self.spare.pop(0)


@dataclass
class Bench:
    """A workload ready to be measured: its inputs, and what its results should be."""

    subject: Subject
    threads: int
    inputs: list[Operand]
    expected: list[tuple[Expected, ...]]
    blocks: Blocks = field(default_factory=Blocks)
    plain: dict[int, Copies] = field(default_factory=dict)
    packed: dict[tuple[int, str], tuple[Array, Copies]] = field(default_factory=dict)
    held: list[Array] = field(default_factory=list)

    @classmethod
    def make(cls, subject: Subject, threads: int, seed: int = 0, blocks: Blocks | None = None) -> Bench:
        """Makes the inputs and computes the reference. Raises InterpreterError when that fails."""
        inputs = make_inputs(subject, seed)
        return cls(subject, threads, inputs, expected(subject, inputs), blocks or Blocks())

    def close(self) -> None:
        """Give the memory back; the bench is of no more use."""
        for block in [*self.held, *(block for block, _ in self.packed.values())]:
            self.blocks.give(block)
        self.held, self.plain, self.packed = [], {}, {}

    @cached_property
    def copies(self) -> int:
        """How many copies of weights and caches there are."""
        total = 0
        for i, arg in enumerate(self.subject.kernel.args):
            if isinstance(arg.type, KVType):
                layout = self.subject.layout(arg)
                total += self.subject.regions(arg) * (layout.k_bytes + layout.v_bytes)
            elif self.subject.is_constant(i):
                total += eval_dim(arg.tensor.bytes, self.subject.dims)
        wanted = min(max(_CACHES * last_level_cache(), _LEAST_COLD), _MOST_COLD)
        return 1 if total < _WARM else min(-(-wanted // total), _MOST_COPIES)

    @cached_property
    def changed(self) -> dict[int, int]:
        """The caches that the kernel changes in place: index of the result -> of the argument."""
        return self.subject.changed()

    def prepare(self, code: KernelCode, keep: Collection[str] = ()) -> None:
        """Have all arguments in memory as ``code`` takes them; what is packed like ``keep`` stays there too.

        Raises ValueError for a packing that does not fit its argument.
        """
        for i in range(len(self.subject.kernel.args)):
            if packing := code.packing.get(i, ""):
                made = self.packed.pop((i, packing), None)  # to the end: used last
                self.packed[i, packing] = made or self._packed(i, packing)
            elif i not in self.plain and i not in self.changed.values():
                self.plain[i] = self._plain(i)
        self._forget({*keep, *code.packing.values()})

    def _forget(self, keep: Collection[str]) -> None:
        total = sum(block.size for block, _ in self.packed.values())
        for key in list(self.packed):
            if total > _KEPT and key[1] not in keep:
                block, _ = self.packed.pop(key)
                total -= block.size
                self.blocks.give(block)

    def _packed(self, index: int, packing: str) -> tuple[Array, Copies]:
        layout = parse_packing(packing)
        block, parts = self.blocks.take([layout.nbytes] * self.copies)
        layout.pack(self.inputs[index], parts[0].view(DType(layout.stored).np).reshape(layout.shape))
        for other in parts[1:]:
            other[...] = parts[0]
        return block, [(part,) for part in parts]

    def _plain(self, index: int) -> Copies:
        arg = self.subject.kernel.args[index]
        if isinstance(arg.type, KVType):
            return self._copied(self.cache_before(index))
        array = as_aligned(pack(self.inputs[index], "", arg.dtype))
        once = self.copies == 1 or not self.subject.is_constant(index)
        return [(array,)] * self.copies if once else self._copied([array])

    def _copied(self, arrays: Sequence[Array]) -> Copies:
        """All copies of ``arrays``, which belong together."""
        block, parts = self.blocks.take([a.nbytes for a in arrays] * self.copies)
        self.held.append(block)
        for i, part in enumerate(parts):
            part[...] = arrays[i % len(arrays)].reshape(-1).view(np.uint8)
        return [tuple(parts[i : i + len(arrays)]) for i in range(0, len(parts), len(arrays))]

    def cache_before(self, index: int) -> tuple[Array, ...]:
        """A cache as it is before a call."""
        return self.subject.cache_before(index, self.inputs)

    def pointers(self, code: KernelCode, copy: int, changed: Mapping[int, Copies]) -> list[int]:
        """The arguments' addresses; ``changed`` has the memory of the caches that are changed, by argument."""
        found: list[int] = []
        for i in range(len(self.subject.kernel.args)):
            packing = code.packing.get(i, "")
            memory = self.packed[i, packing][1] if packing else changed.get(i) or self.plain[i]
            found += map(address, memory[copy])
        return found

