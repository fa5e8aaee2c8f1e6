"""What stands in for channels that go: their means as a bias (FLAP, arXiv:2312.11983), or the other columns corrected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tilewright.ir import DType, Function, Module, TensorType, Value, Weight, WeightSource, ops
from tilewright.ir.ops import numerics
from tilewright.passes.calibration.data import Array, Batch
from tilewright.passes.calibration.spill import Spill
from tilewright.passes.calibration.statistics import hessian
from tilewright.passes.calibration.stream import Layer, stream
from tilewright.passes.structured.axes import Axis
from tilewright.passes.structured.obs import corrected, damped
from tilewright.passes.structured.scores import spread
from tilewright.passes.weights import derive, free_name

Gone = Mapping[Layer, Array]
"""Of each layer's input channels which go, bool ``[K]``."""


def pairs(op: Layer) -> list[tuple[str, str]]:
    """The fields of a layer's weights and of their biases."""
    return [("weight", "bias")] if isinstance(op, ops.Linear) else [("gate", "gate_bias"), ("up", "up_bias")]


def each(gone: Gone) -> Iterator[tuple[Layer, str, str]]:
    for op in gone:
        for field, bias in pairs(op):
            yield op, field, bias


# ---- the mean of what goes ---------------------------------------------------------------------------------------


def add_means(module: Module, gone: Gone, means: Mapping[Layer, Array]) -> None:
    """Give the layers biases with what channels that go had on average; ``means`` f64 ``[K]``. Computed when written."""
    for op, field, bias_field in each(gone):
        weight, bias = getattr(op, field), getattr(op, bias_field)
        kind = TensorType((weight.shape[0],), op.x.dtype if bias is None else bias.dtype)
        make = partial(with_means, np.where(gone[op], means[op], 0), kind.dtype)
        put(op, bias_field, derive(module, bias_name(weight), kind, [weight] if bias is None else [weight, bias], make))


def with_means(lost: Array, dtype: DType, weight: Array, bias: Any = 0.0) -> Array:
    """``bias + weight @ lost`` in ``dtype``; only columns where ``lost`` f64 ``[K]`` is not 0 are read."""
    columns = np.nonzero(lost)[0]
    added = numerics.wide(weight[:, columns]).astype(np.float64) @ lost[columns]
    return np.asarray(numerics.wide(np.asarray(bias)) + added).astype(dtype.np)


# ---- columns that make up for others -----------------------------------------------------------------------------


def correct(module: Module, function: Function, batches: Sequence[Batch], gone: Gone, damping: float) -> None:
    """Correct the columns that stay for those that go, and the biases; zeros are left in the place of what goes.

    Runs the data: a layer's inputs are what the layers before it give by then. Numbers wait in a temporary file.
    """
    for op, field, bias_field in each(gone):
        if getattr(op, bias_field) is None:
            weight = getattr(op, field)
            put(op, bias_field, module.constant(np.zeros(int(weight.shape[0]), op.x.dtype.np), bias_name(weight)))
    work = _Correction(gone, damping)
    stream(function, batches, work.visit, list(gone))
    for op, *names in each(gone):
        for name in names:
            old = getattr(op, name)
            put(op, name, module.weight(free_name(module, f"{old.name}.corrected"), old.tensor, work.sources[old]))


class _Correction:
    """Corrects layers as the stream comes to them; the stream goes on with what came out."""

    def __init__(self, gone: Gone, damping: float) -> None:
        self.gone, self.damping, self.spill = gone, damping, Spill()
        self.sources: dict[Weight, WeightSource] = {}

    def visit(self, op: Layer, inputs: Sequence[Array]) -> dict[Value, Array]:
        mean, gone = spread(inputs).mean, self.gone[op]
        covariance = damped(hessian(inputs) - np.outer(mean, mean), self.damping)
        changes: dict[Value, Array] = {}
        for field, bias_field in pairs(op):
            weight, bias = getattr(op, field), getattr(op, bias_field)
            wide = numerics.wide(weight.load()).astype(np.float64)
            new, shares = corrected(wide, covariance, gone)
            lost = wide[:, gone] @ (mean[gone] - shares @ mean[~gone])
            arrays = [new.astype(weight.dtype.np), (numerics.wide(bias.load()) + lost).astype(bias.dtype.np)]
            weight.release()
            self.sources[weight], self.sources[bias] = self.spill.put_all(arrays, [weight.tensor, bias.tensor])
            changes |= {weight: numerics.wide(arrays[0]), bias: arrays[1]}
        return changes


# ---- shared ------------------------------------------------------------------------------------------------------


def bias_name(weight: Weight) -> str:
    return f"{weight.name.removesuffix('.weight')}.bias"


def put(op: Layer, field: str, value: Weight) -> None:
    """Make ``op`` take ``value`` as ``field``."""
    old = getattr(op, field)
    if old is not None:
        op.replace_operand(old, value)
        return
    setattr(op, field, value)
    value.users[op] = None


def follow(kept: dict[Axis, Array], gone: Gone) -> None:
    """Tell ``kept`` about the weights and biases that layers have by now."""
    for op, field, bias_field in each(gone):
        weight, bias = getattr(op, field), getattr(op, bias_field)
        kept[weight, 1] = ~gone[op]
        rows = kept.get((op.result, op.result.tensor.rank - 1))
        if rows is not None:
            kept[weight, 0] = rows
        if rows is not None and bias is not None:
            kept[bias, 0] = rows
