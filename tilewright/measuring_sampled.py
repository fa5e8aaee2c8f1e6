"""A linear layer with very many features (a language model's head), of which the reference computes some.

A feature depends on its own row of the weight alone, so those that are computed are exact: the first, the last, and as many
drawn at random, more than any tile holds. All others must still be written, with finite numbers. Kernels whose operations
are a linear layer, what makes its weights of codes, and elementwise operations behind it are cut this way; others never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir import Function, Module, TensorType, Value, VerifyError, ops
from tilewright.ir.ops.elementwise import Elementwise
from tilewright.measuring_inputs import Array, Operand, Subject

_LARGE = 1 << 25
"""Elements of weights up to which all features are computed."""
_ENDS, _DRAWN = 256, 2048
_DECODING = (ops.Dequantize, ops.Lookup, ops.Expand)
_FEATURES = ("weight", "gate", "up", "bias", "gate_bias", "up_bias")


@dataclass(frozen=True)
class Sample:
    """A smaller subject, and how its inputs are taken of the whole one's: the axis of features by argument."""

    subject: Subject
    axes: Mapping[int, int]
    features: Array

    def inputs(self, inputs: Sequence[Operand]) -> list[Operand]:
        """The part of ``inputs`` that the smaller kernel takes."""
        return [np.take(x, self.features, self.axes[i]) if i in self.axes else x for i, x in enumerate(inputs)]


def sample(subject: Subject) -> Sample | None:
    """A smaller version of a large linear kernel; None for a kernel that is not large or cannot be cut."""
    kernel = subject.kernel
    layers = [op for op in kernel.body if isinstance(op, (ops.Linear, ops.GatedLinear))]
    if len(layers) != 1 or len(kernel.returns) != 1:
        return None
    features = layers[0].result.shape[-1]
    axes = feature_axes(kernel, layers[0].result)
    if axes is None or not isinstance(features, int):
        return None
    sizes = [math.prod(subject.shape(kernel.args[i])) for i, axis in axes.items() if axis == 0]
    if sum(sizes) <= _LARGE or features <= 2 * _ENDS + _DRAWN:
        return None
    drawn = np.random.default_rng(0).choice(features, _DRAWN, replace=False)
    chosen = np.union1d(drawn, np.r_[:_ENDS, features - _ENDS : features])
    try:
        return Sample(narrowed(subject, axes, len(chosen)), axes, chosen)
    except VerifyError:  # a shape that is spelled out somewhere
        return None


def feature_axes(kernel: Function, made: Value) -> dict[int, int] | None:
    """Which axis of each argument has the features of the layer's result; None when that is not all there is to it."""
    carrying: dict[Value, int] = {made: -1}
    for op in reversed(kernel.body[:-1]):  # back from the layer to the arguments its weights come from
        if op is made.owner:
            carrying |= {v: 0 for f in _FEATURES if (v := getattr(op, f, None)) is not None}
        elif isinstance(op, _DECODING) and op.result in carrying:
            carrying |= {v: 0 for v in op.operands if v.shape[0] != 1}  # a table may be one for all
    for op in kernel.body[:-1]:
        behind = [v for v in op.operands if carrying.get(v) == -1]
        if op is made.owner or (isinstance(op, _DECODING) and not behind):
            continue
        if not isinstance(op, Elementwise) or not behind:
            return None
        carrying |= {v: -1 for v in op.operands if v.shape and v.shape[-1] == made.shape[-1]}
        carrying[op.result] = -1
    known = {i: carrying[arg] for i, arg in enumerate(kernel.args) if arg in carrying}
    return known if carrying.get(kernel.returns[0]) == -1 else None


def narrowed(subject: Subject, axes: Mapping[int, int], count: int) -> Subject:
    """The kernel with ``count`` features. Raises VerifyError when an operation says how many there are."""
    kernel, small = subject.kernel, Function(subject.kernel.name, kind=subject.kernel.kind)
    mapping: dict[Value, Any] = {}
    for i, arg in enumerate(kernel.args):
        shape = list(arg.shape)
        if i in axes:
            shape[axes[i]] = count
        mapping[arg] = small.arg(arg.name or f"a{i}", TensorType(tuple(shape), arg.dtype))
    for op in kernel.body:
        copy = small.append(op.clone(mapping))
        mapping |= dict(zip(op.results, copy.results))
    module = Module("sample", dims=dict(subject.module.dims))
    module.add(small)
    return Subject(module, small, subject.dims, subject.target)
