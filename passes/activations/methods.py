"""The table of methods: which inputs become zero, and how channels are compared. One more is a function and a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tilewright.ir import Rewriter, ops
from tilewright.passes.activations.attention import queries_and_outputs
from tilewright.passes.activations.low_rank import add_low_rank
from tilewright.passes.activations.places import Place, apart, at_gates, at_inputs
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.spill import Spill
from tilewright.passes.calibration.statistics import moments
from tilewright.passes.calibration.stream import Layer, Stream
from tilewright.passes.outlier_columns import squares

Find = Callable[[Rewriter, Sequence[Layer], int], list[Place]]
"""Puts thresholds in front of layers, or of what it makes of them; the number is the option ``rank``."""


@dataclass(frozen=True)
class Method:
    """``find`` says what is thresholded. ``has_one_limit``: it is the same in all places; ``is_low_rank``: what falls below
    is not lost."""

    find: Find
    paper: str = ""
    has_one_limit: bool = False
    is_low_rank: bool = False


def inputs(rw: Rewriter, layers: Sequence[Layer], rank: int) -> list[Place]:
    """All inputs of layers, by magnitude."""
    return at_inputs(rw, layers)


def weighed_inputs(rw: Rewriter, layers: Sequence[Layer], rank: int) -> list[Place]:
    """All inputs of layers, by magnitude times the norm of the columns that read them."""
    return at_inputs(rw, layers, column_norms)


def gates(rw: Rewriter, layers: Sequence[Layer], rank: int) -> list[Place]:
    """What gated layers make, by the magnitude of the gate behind its activation."""
    return at_gates(rw, layers)


def weighed_gates(rw: Rewriter, layers: Sequence[Layer], rank: int) -> list[Place]:
    """What gated layers make, by the gate times the mean magnitude of what it multiplies; inputs at attention."""
    return at_inputs(rw, queries_and_outputs(rw, layers)) + at_gates(rw, layers, mean_beside)


def split_inputs(rw: Rewriter, layers: Sequence[Layer], rank: int) -> list[Place]:
    """All inputs of layers, by magnitude; small ones go through a part of low rank."""
    plain: list[Layer] = []
    for op in layers:
        if isinstance(op, ops.GatedLinear):
            plain += apart(rw, op).layers
        else:
            plain.append(op)
    spill = Spill()
    places = []
    for place in at_inputs(rw, plain):
        readers = [op for op in place.threshold.result.users if isinstance(op, ops.Linear)]
        places.append(replace(place, low_rank=add_low_rank(rw, place.threshold, readers, rank, spill)))
    return places


def column_norms(place: Place, run: Stream) -> Array:
    """The norm of each column, of all weights that read the channel together: f32 ``[K]``."""
    total = np.zeros(int(place.weights[0].shape[1]), np.float32)
    for weight in place.weights:
        total += squares(weight.load())
        weight.release()
    return np.sqrt(total)


def mean_beside(place: Place, run: Stream) -> Array:
    """The mean magnitude of each channel that a gate multiplies: f32 ``[K]``."""
    assert place.beside is not None
    return moments(run.values(place.beside)).mean


METHODS: dict[str, Method] = {
    "plain": Method(inputs, has_one_limit=True),
    "teal": Method(inputs, "arXiv:2408.14690"),
    "wina": Method(weighed_inputs, "arXiv:2505.19427"),
    "cats": Method(gates, "arXiv:2404.08763"),
    "chess": Method(weighed_gates, "arXiv:2409.01366"),
    "r-sparse": Method(split_inputs, "arXiv:2504.19449", is_low_rank=True),
}
"""What the option ``method`` of ``sparsify-activations`` may be."""
