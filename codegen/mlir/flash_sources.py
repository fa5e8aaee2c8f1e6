"""Where blocks of keys and values lie that attention goes over (see flash.py)."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.value import Val


@dataclass(frozen=True)
class Straight:
    """A block in one piece: keys start at ``keys``; a head's ``slots`` values at ``values``, the block with ``first``."""

    k: Buffer
    v: Buffer
    keys: Val
    values: Val
    slots: int
    first: Val


@dataclass(frozen=True)
class Scattered:
    """A block in runs: ``run_of(n)`` is the number of that with the block's n-th key and value, see `Places`.

    It is asked for those of the next block too, and gives any number for those behind the last key. ``keys_of(run)`` is
    where the keys of a run begin.
    """

    k: Buffer
    v: Buffer
    run_of: Callable[[Val], Val]
    keys_of: Callable[[Val], Val]


@dataclass(frozen=True)
class Picked:
    """Blocks of a head's ``slots`` that lie in one piece, in runs as `Scattered`; the head is number ``lane`` in memory."""

    k: Buffer
    v: Buffer
    run_of: Callable[[Val], Val]
    keys_of: Callable[[Val], Val]
    lane: Val
    slots: int


Source = Straight | Scattered | Picked
