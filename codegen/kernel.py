"""What an emitter gives for a kernel, and what every emitter offers.

Adding a kernel family is one emitter class and one line in ``codegen/emitters.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from tilewright.codegen.schedule import Schedule, Space
from tilewright.codegen.target import Target
from tilewright.ir import Dim, Function


@dataclass(frozen=True)
class Launch:
    """One grid of a CUDA kernel, a function ``symbol`` of its cubin. ``shared`` are the bytes of dynamic shared memory.

    With ``when``, a dim and the least and greatest value at which this grid runs, the host chooses among launches.
    """

    symbol: str
    grid: tuple[Dim, Dim, Dim]
    block: int
    shared: int = 0
    when: tuple[Dim, int, int] | None = None


@dataclass(frozen=True)
class DeviceCode:
    """What a CUDA kernel has besides its cubin.

    ``launches`` run one after the other, each passed ``int64 dims..., void *args..., void *results..., void *scratch...``.
    ``source`` is the CUDA C; ``resources`` has a row for each function: registers, bytes spilled, of shared memory.
    """

    launches: tuple[Launch, ...]
    source: str
    resources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelCode:
    """Machine code of one kernel: ``void symbol(int64 begin, int64 end, int64 dims..., void *args..., void *results...)``.

    ``dims`` are the kernel's free symbols, sorted. Work is ``tasks`` units; a chunk of fewer than ``grain`` is not worth a
    thread. ``packing`` maps the index of an argument that must be a weight to the text of the layout it is stored in;
    arguments not listed are plain row-major. A cache is passed as two pointers, K and V, and never again as a result.
    ``scratch`` are the bytes of temporaries, whose pointers follow those of the results.
    ``last`` further tasks, numbered from ``tasks`` on, run when all of those are done: they put partial results together.
    On a GPU ``object`` is a cubin, ``device`` says how it is launched, and there are no tasks.
    """

    symbol: str
    object: bytes
    dims: tuple[str, ...]
    tasks: Dim = 0
    grain: Dim = 1
    packing: Mapping[int, str] = field(default_factory=dict)
    scratch: tuple[Dim, ...] = ()
    last: Dim = 0
    device: DeviceCode | None = None


class Emitter(Protocol):
    """A kernel family: decides whether it can lower a kernel, offers schedules, and writes the code."""

    name: ClassVar[str]

    def match(self, kernel: Function, target: Target) -> str | None:
        """None when this emitter can lower ``kernel``, else why not."""

    def default_schedule(self, kernel: Function, target: Target) -> Schedule:
        """A good schedule, chosen by rule."""

    def space(self, kernel: Function, target: Target, sizes: Mapping[str, int]) -> Space:
        """The schedules worth trying with dims of ``sizes``: knobs that make no difference there keep their default."""

    def layouts(self, kernel: Function, target: Target) -> Callable[[Schedule], Mapping[int, str]]:
        """``KernelCode.packing`` as ``emit`` gives it under a schedule, without generating any code."""

    def features(self, kernel: Function, target: Target, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        """For a cost model, what follows from the kernel's structure under a schedule: see ``codegen/features.py``."""

    def emit(self, kernel: Function, schedule: Schedule, target: Target, symbol: str) -> KernelCode:
        """The code of ``kernel`` under the name ``symbol``. Raises CodegenError."""
