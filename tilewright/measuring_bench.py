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
from pathlib import Path

import numpy as np

from tilewright.codegen.emitters import pack
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.packing import Packing
from tilewright.ir import DType, KVType, eval_dim
from tilewright.ir.caches import origin
from tilewright.measuring_inputs import Array, Operand, Subject, make_inputs
from tilewright.measuring_reference import Expected, expected
from tilewright.runtime.memory import address, as_aligned, parts_of_pages

_WARM = 256 << 10
_LEAST_COLD, _MOST_COLD = 128 << 20, 512 << 20
_CACHES = 4  # times the last-level cache
_USUAL_CACHE = 32 << 20
_MOST_COPIES = 256
_KEPT = 1200 << 20
"""Bytes of packed weights that are kept, those used last."""
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


@dataclass
class Bench:
    """A workload ready to be measured: its inputs, and what its results should be."""

    subject: Subject
    threads: int
    inputs: list[Operand]
    expected: list[tuple[Expected, ...]]
    plain: dict[int, Copies] = field(default_factory=dict)
    packed: dict[tuple[int, str], Copies] = field(default_factory=dict)

    @classmethod
    def make(cls, subject: Subject, threads: int, seed: int = 0) -> Bench:
        """Makes the inputs and computes the reference. Raises InterpreterError when that fails."""
        inputs = make_inputs(subject, seed)
        return cls(subject, threads, inputs, expected(subject, inputs))

    @cached_property
    def copies(self) -> int:
        """How many copies of weights and caches there are."""
        total = 0
        for i, arg in enumerate(self.subject.kernel.args):
            if isinstance(arg.type, KVType):
                layout = self.subject.layout(arg)
                total += self.subject.batch(arg) * (layout.k_bytes + layout.v_bytes)
            elif self.subject.is_constant(i):
                total += eval_dim(arg.tensor.bytes, self.subject.dims)
        wanted = min(max(_CACHES * last_level_cache(), _LEAST_COLD), _MOST_COLD)
        return 1 if total < _WARM else min(-(-wanted // total), _MOST_COPIES)

    @cached_property
    def changed(self) -> dict[int, int]:
        """The caches that the kernel changes in place: index of the result -> of the argument."""
        kernel = self.subject.kernel
        caches = {i: origin(self.subject.module, v) for i, v in enumerate(kernel.returns) if isinstance(v.type, KVType)}
        return {i: next(at for at, arg in enumerate(kernel.args) if arg is value) for i, value in caches.items()}

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
        total = sum(len(c) * c[0][0].nbytes for c in self.packed.values())
        for key in list(self.packed):
            if total > _KEPT and key[1] not in keep:
                dropped = self.packed.pop(key)
                total -= len(dropped) * dropped[0][0].nbytes

    def _packed(self, index: int, packing: str) -> Copies:
        layout = Packing.parse(packing)
        parts = parts_of_pages([layout.nbytes] * self.copies)
        layout.pack(self.inputs[index], parts[0].view(DType(layout.stored).np).reshape(layout.shape))
        for other in parts[1:]:
            other[...] = parts[0]
        return [(part,) for part in parts]

    def _plain(self, index: int) -> Copies:
        arg = self.subject.kernel.args[index]
        if isinstance(arg.type, KVType):
            return copied(self.cache_before(index), self.copies)
        array = as_aligned(pack(self.inputs[index], ""))
        once = self.copies == 1 or not self.subject.is_constant(index)
        return [(array,)] * self.copies if once else copied([array], self.copies)

    def cache_before(self, index: int) -> tuple[Array, Array]:
        """A cache as it is before a call."""
        return self.subject.layout(self.subject.kernel.args[index]).write(*self.inputs[index])

    def pointers(self, code: KernelCode, copy: int, changed: Mapping[int, Copies]) -> list[int]:
        """The arguments' addresses; ``changed`` has the memory of the caches that are changed, by argument."""
        found: list[int] = []
        for i in range(len(self.subject.kernel.args)):
            packing = code.packing.get(i, "")
            memory = self.packed[i, packing] if packing else changed.get(i) or self.plain[i]
            found += map(address, memory[copy])
        return found


def copied(arrays: Sequence[Array], count: int) -> Copies:
    """So many copies of ``arrays``, together in large pages."""
    parts = parts_of_pages([a.nbytes for a in arrays] * count)
    for i, part in enumerate(parts):
        part[...] = arrays[i % len(arrays)].reshape(-1).view(np.uint8)
    return [tuple(parts[i : i + len(arrays)]) for i in range(0, len(parts), len(arrays))]
