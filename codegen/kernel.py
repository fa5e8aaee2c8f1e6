"""What an emitter gives for a kernel, and what every emitter offers.

Adding a kernel family is one emitter class and one line in ``codegen/emitters.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from tilewright.codegen.schedule import Schedule, Space
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Dim, Function


@dataclass(frozen=True)
class KernelCode:
    """Machine code of one kernel: ``void symbol(int64 begin, int64 end, int64 dims..., void *args..., void *results...)``.

    ``dims`` are the kernel's free symbols, sorted. Work is ``tasks`` units; a chunk of fewer than ``grain`` is not worth a
    thread. ``packing`` maps the index of an argument that must be a weight to the text of the layout it is stored in;
    arguments not listed are plain row-major. A cache is passed as two pointers, K and V, and never again as a result.
    ``scratch`` are the bytes of temporaries, whose pointers follow those of the results.
    ``last`` further tasks, numbered from ``tasks`` on, run when all of those are done: they put partial results together.
    """

    symbol: str
    object: bytes
    dims: tuple[str, ...]
    tasks: Dim
    grain: Dim = 1
    packing: Mapping[int, str] = field(default_factory=dict)
    scratch: tuple[Dim, ...] = ()
    last: Dim = 0


class Emitter(Protocol):
    """A kernel family: decides whether it can lower a kernel, offers schedules, and writes the code."""

    name: ClassVar[str]

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        """None when this emitter can lower ``kernel``, else why not."""

    def default_schedule(self, kernel: Function, target: CpuTarget) -> Schedule:
        """A good schedule, chosen by rule."""

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        """The schedules worth trying with dims of ``sizes``: knobs that make no difference there keep their default."""

    def layouts(self, kernel: Function, schedule: Schedule, target: CpuTarget) -> Mapping[int, str]:
        """``KernelCode.packing`` as ``emit`` gives it, without generating any code."""

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        """For a cost model, what follows from the kernel's structure under a schedule: see ``codegen/features.py``."""

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        """The code of ``kernel`` under the name ``symbol``. Raises CodegenError."""
