"""The table of methods: which weights go, and what becomes of the others. One more method is one file and one row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

import numpy as np

from tilewright.ir import PassError
from tilewright.passes.calibration.data import Array
from tilewright.passes.formats import check_finite
from tilewright.passes.sparsity import alps
from tilewright.passes.sparsity.dsnot import swapped
from tilewright.passes.sparsity.inputs import Inputs
from tilewright.passes.sparsity.patterns import Pattern
from tilewright.passes.sparsity.sparsegpt import SparseGpt

_AT_ONCE = 1 << 22  # elements of a weight in work at a time
Refine = Callable[[Array, Array, Inputs, Pattern], Array]
"""Rows of a weight f32 ``[R, K]`` and which of them stay -> which stay after all."""


@dataclass(frozen=True)
class Method(ABC):
    """Makes zeros in weights ``[N, K]`` by one ``pattern``."""

    pattern: Pattern
    refine: Refine | None = None
    needs_data: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    """Whether weights that stay change."""
    paper: ClassVar[str] = ""

    @abstractmethod
    def pruned(self, rows: Array, sparsity: float, inputs: Inputs | None) -> Array:
        """Rows f32 ``[R, K]`` with the share ``sparsity`` of zeros."""

    def prune(self, weight: Array, sparsity: float, inputs: Inputs | None = None, name: str = "weight") -> Array:
        """``weight`` in its own type with zeros in it; raises PassError for numbers that are not finite."""
        out = np.empty_like(weight)
        step = max(1, _AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].astype(np.float32)
            check_finite(rows, name, start)
            out[start : start + step] = self.pruned(rows, sparsity, inputs)
        out[out == 0] = 0  # never -0
        return out


class Selecting(Method):
    """Weights that stay are as they were: a method only says what the loss of each costs."""

    @abstractmethod
    def saliency(self, rows: Array, inputs: Inputs | None) -> Array:
        """What it costs to lose each weight of ``rows`` f32 ``[R, K]``, as a squared error."""

    def pruned(self, rows: Array, sparsity: float, inputs: Inputs | None) -> Array:
        keep = self.pattern.keeps(self.saliency(rows, inputs), sparsity)
        if self.refine is not None:
            assert inputs is not None
            keep = self.refine(rows, keep, inputs, self.pattern)
        return np.where(keep, rows, 0)


class Magnitude(Selecting):
    """The smallest weights of each row. No data."""

    def saliency(self, rows: Array, inputs: Inputs | None) -> Array:
        return np.square(rows)


class Wanda(Selecting):
    """The smallest products of a weight and the norm of its input."""

    needs_data = True
    paper = "arXiv:2306.11695"

    def saliency(self, rows: Array, inputs: Inputs | None) -> Array:
        assert inputs is not None
        return np.square(rows) * inputs.square


class Compensating(Method):
    """Columns one by one; those still to come make up for what is lost."""

    needs_data = True
    moves = True
    paper = "arXiv:2301.00774"

    def pruned(self, rows: Array, sparsity: float, inputs: Inputs | None) -> Array:
        assert inputs is not None
        return SparseGpt(self.pattern, sparsity).prune(rows, inputs.prepared)


class Splitting(Method):
    """Which weights go and what the others become, found together."""

    needs_data = True
    moves = True
    paper = "arXiv:2406.07831"

    def pruned(self, rows: Array, sparsity: float, inputs: Inputs | None) -> Array:
        assert inputs is not None
        return alps.prune(rows, inputs.spectrum, self.pattern, sparsity)


METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": Compensating,
    "alps": Splitting,
}
"""What the option ``method`` of the pass ``prune`` may be."""
REFINEMENTS: dict[str, Refine | None] = {"none": None, "dsnot": swapped}
"""What its option ``refine`` may be."""


def find_method(name: str, refine: str, pattern: Pattern) -> Method:
    """The method with a refinement of its choice; raises PassError with those that exist."""
    for option, value, known in (("method", name, METHODS), ("refine", refine, REFINEMENTS)):
        if value not in known:
            close = get_close_matches(value, list(known), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise PassError(f"prune has no {option} {value!r}{hint}; there are {', '.join(known)}")
    if METHODS[name].moves and REFINEMENTS[refine] is not None:
        raise PassError(f"refine={refine} swaps weights that stay as they are, method={name} changes them: leave one out")
    return METHODS[name](pattern, REFINEMENTS[refine])
