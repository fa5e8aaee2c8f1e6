"""Where inputs of linear layers become zero. Limits are weights whose numbers calibration fills in later.

    linear(x, @w)                      -> linear(threshold(x, @w.limits), @w)
    linear(gated(x, @g, @u), @w)       -> linear(threshold(g * u, @w.limits, by=g), @w), with g and u layers of their own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import ArraySource, DType, Module, Op, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.activations.low_rank import LowRank
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.sites import fields
from tilewright.passes.calibration.stream import Layer, Stream
from tilewright.passes.outlier_columns import active
from tilewright.passes.weights import as_weight, free_name

Factors = Callable[["Place", Stream], Array]
"""f32 ``[K]``: what magnitudes of a place's channels are multiplied by before they are compared. The run stands at the
place."""


@dataclass(frozen=True, eq=False)
class Place:
    """A threshold in front of linear layers; ``weights`` ``[N, K]`` are those whose columns it lets them leave out.

    ``stop`` is the operation before which all is known that limits depend on: ``beside`` is what a gate multiplies.
    """

    threshold: ops.Threshold
    weights: tuple[Weight, ...]
    stop: Op
    factors: Factors | None = None
    beside: Value | None = None
    low_rank: LowRank | None = None

    @property
    def name(self) -> str:
        """That of the first layer."""
        return self.weights[0].name

    @property
    def judged(self) -> Value:
        """What has the magnitudes."""
        return self.threshold.by if self.threshold.by is not None else self.threshold.x

    @property
    def limits(self) -> Weight:
        """f32 ``[1]`` or ``[K]``."""
        assert isinstance(self.threshold.limits, Weight)
        return self.threshold.limits

    @property
    def bytes(self) -> int:
        """Of the weights: what reading no column saves."""
        return sum(int(w.tensor.bytes) for w in self.weights)

    @property
    def extra(self) -> int:
        """Bytes of the low-rank part."""
        return self.low_rank.bytes if self.low_rank is not None else 0

    def array(self, limit: float, factors: Array | None) -> Array:
        """The numbers of :attr:`limits` for magnitudes, times ``factors``, that stay from ``limit`` on."""
        if factors is None:
            return np.full(self.limits.shape, limit, np.float32)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found: Array = np.where(factors > 0, np.float32(limit) / factors, np.float32(np.inf)).astype(np.float32)
        return found

    def set(self, limits: Array) -> None:
        """Fill in the limits."""
        self.limits.source = ArraySource(limits)


def matrices(op: Layer) -> list[Weight]:
    """The weights of a linear or gated layer, those that are computed left out."""
    return [w for f in fields(op) if (w := as_weight(getattr(op, f), 2)) is not None]


def at_inputs(rw: Rewriter, layers: Sequence[Layer], factors: Factors | None = None) -> list[Place]:
    """A place for each value that some of ``layers`` read."""
    groups: dict[Value, list[Layer]] = {}
    for op in layers:
        groups.setdefault(op.x, []).append(op)
    return [_before(rw, x, group, factors) for x, group in groups.items()]


def _before(rw: Rewriter, x: Value, layers: Sequence[Layer], factors: Factors | None) -> Place:
    weights = tuple(w for op in layers for w in matrices(op))
    threshold = ops.Threshold(x, limits_of(rw.module, weights[0], factors is not None))
    rw.before(layers[0]).insert(threshold)
    for op in layers:
        op.replace_operand(x, threshold.result)
    rw.changed += 1
    return Place(threshold, weights, threshold, factors)


def limits_of(module: Module, weight: Weight, is_each: bool) -> Weight:
    """A weight without numbers yet, one for all columns or one for each."""
    count = int(weight.shape[1]) if is_each else 1
    return module.weight(free_name(module, f"{weight.name}.limits"), TensorType((count,), DType.f32))


def at_gates(rw: Rewriter, layers: Sequence[Layer], factors: Factors | None = None) -> list[Place]:
    """A place for each gated layer among ``layers`` whose result others of them read: small gates end it."""
    places = []
    for op in layers:
        if not isinstance(op, ops.GatedLinear):
            continue
        readers = [user for user in layers if user.x is op.result]
        if not readers:
            rw.skip(op, "no layer that may be sparse reads what it makes")
            continue
        parts = apart(rw, op)
        product = parts.product
        weights = tuple(w for reader in readers for w in matrices(reader))
        threshold = ops.Threshold(product.result, limits_of(rw.module, weights[0], factors is not None), parts.gate)
        rw.before(readers[0]).insert(threshold)
        for reader in readers:
            reader.replace_operand(product.result, threshold.result)
        places.append(Place(threshold, weights, product, factors, product.b))
    return places


@dataclass(frozen=True)
class Apart:
    """A gated layer as two layers; ``gate`` stands behind the activation."""

    layers: tuple[ops.Linear, ops.Linear]
    gate: Value
    product: ops.Mul


def apart(rw: Rewriter, op: ops.GatedLinear) -> Apart:
    """Put two layers and their product in the place of a gated layer."""
    b = rw.before(op)
    layers = ops.Linear(op.x, op.gate, op.gate_bias), ops.Linear(op.x, op.up, op.up_bias)
    first, second = (b.add(layer) for layer in layers)
    gate = active(b, op.act, first)
    product = ops.Mul(gate, second)
    rw.replace(op, product)
    return Apart(layers, gate, product)
