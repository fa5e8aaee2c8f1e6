"""What a kernel should give, and whether it does.

The reference is the IR interpreter on the same inputs. Two things are asked of every result: its largest error relative to
its largest magnitude, which finds a single wrong element, and its mean square error, which finds a small thing wrong
everywhere (a product that lacks one of two thousand terms). The allowance is that of the narrowest floats the kernel works
in, since kernels keep more digits between fused operations than the interpreter. Integers are equal, but for codes of
quantized activations: one that lies between two may be rounded to either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright.codegen.emitters import pack
from tilewright.ir import DType, Function, KVType, interpret, ops
from tilewright.measuring_inputs import Array, Operand, Subject
from tilewright.measuring_sampled import is_finite, sample

_LARGEST = {DType.f64: 1e-9, DType.f32: 1e-4, DType.f16: 4e-3, DType.bf16: 3e-2}
_SQUARE = {DType.f64: 1e-10, DType.f32: 2e-5, DType.f16: 2e-3, DType.bf16: 1e-2}
_WIDEST = (DType.bf16, DType.f16, DType.f32, DType.f64)  # the first that a kernel has is its narrowest
_ROUNDED_OTHERWISE = {DType.f64: 0.001, DType.f32: 0.01, DType.f16: 0.1, DType.bf16: 0.5}  # share of codes


def narrowest(kernel: Function) -> DType:
    """The narrowest float that the kernel computes with; scales of codes are only read."""
    values = [*kernel.args, *(r for op in kernel.body for r in op.results)]
    scales = {op.scale for op in kernel.body if isinstance(op, (ops.Dequantize, ops.Lookup))}
    scales |= {op.table for op in kernel.body if isinstance(op, ops.Lookup)}
    found = {v.dtype for v in values if v not in scales}
    return next((d for d in _WIDEST if d in found), DType.f32)


@dataclass(frozen=True)
class Expected:
    """A result as it should be, in the memory layout in which the kernel leaves it."""

    array: Array
    wide: Array
    top: float
    square: float
    narrow: DType
    codes: bool
    shape: tuple[int, ...]
    features: Array | None = None
    """Places along the last axis where the result is known; None is everywhere."""

    @classmethod
    def of(cls, array: Array, narrow: DType, codes: bool = False) -> Expected:
        wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
        known = wide[np.isfinite(wide)]
        top = float(np.abs(known).max(initial=0.0))
        square = float(np.sqrt(np.mean(np.square(known, dtype=np.float64)))) if known.size else 0.0
        return cls(array, wide, top, square, narrow, codes, array.shape)

    def complaint(self, got: Array) -> str | None:
        """What is wrong with ``got``, or None."""
        if self.features is not None:
            if not is_finite(got):
                return "is not written with numbers everywhere"
            got = np.take(got, self.features, -1)
        if got.tobytes() == self.array.tobytes():
            return None
        if self.array.dtype.kind in "iub":
            return self._integers(got)
        other = got.astype(self.wide.dtype)
        known = np.isfinite(self.wide)
        if not known.all():
            if not np.array_equal(other[~known], self.wide[~known], equal_nan=True):
                return "is finite, or infinite, or NaN elsewhere than it should be"
            other, want = other[known], self.wide[known]
        else:
            want = self.wide
        with np.errstate(all="ignore"):
            error = np.abs(other - want)
            largest = float(error.max(initial=0.0)) / (self.top or 1.0)
            square = float(np.sqrt(np.mean(np.square(error, dtype=np.float64)))) / (self.square or 1.0)
        if not largest <= _LARGEST[self.narrow]:
            return f"differs by {largest:.3g} of the largest magnitude, allowed {_LARGEST[self.narrow]:g}"
        if not square <= _SQUARE[self.narrow]:
            return f"differs by {square:.3g} in the mean square, allowed {_SQUARE[self.narrow]:g}"
        return None

    def _integers(self, got: Array) -> str | None:
        away = np.abs(got.astype(np.int64) - self.array.astype(np.int64))
        share = float(np.mean(away > 0))
        if self.codes and away.max() <= 1 and share <= _ROUNDED_OTHERWISE[self.narrow]:
            return None
        return f"{100 * share:.3g} % of the integers differ, by up to {away.max()}"


def reference(subject: Subject, inputs: Sequence[Operand]) -> list[Operand]:
    """The kernel's results by the interpreter. Raises InterpreterError for inputs that an operation cannot take."""
    kernel = subject.kernel
    return list(interpret(subject.module, kernel.name, list(inputs), dims=subject.dims))


def expected(subject: Subject, inputs: Sequence[Operand]) -> list[tuple[Expected, ...]]:
    """The results ready to be compared with what kernels give: one for a tensor, those of K and V for a cache.

    Of a very large linear layer they are known in part: see ``measuring_sampled``. Raises InterpreterError.
    """
    if part := sample(subject):
        (result,) = reference(part.subject, part.inputs(inputs))
        known, shape = Expected.of(result, narrowest(subject.kernel)), subject.shape(subject.kernel.returns[0])
        return [(replace(known, shape=shape, features=part.features),)]
    return _all(subject, reference(subject, inputs))


def _all(subject: Subject, results: Sequence[Any]) -> list[tuple[Expected, ...]]:
    kernel, narrow = subject.kernel, narrowest(subject.kernel)
    codes = any(isinstance(op, ops.Quantize) for op in kernel.body)
    found: list[tuple[Expected, ...]] = []
    for value, result in zip(kernel.returns, results):
        if isinstance(value.type, KVType):
            found.append(tuple(Expected.of(a, narrow) for a in subject.layout(value).write(*result)))
        else:
            found.append((Expected.of(pack(result, "", value.dtype), narrow, codes and value.dtype is DType.i8),))
    return found
