"""``nn.linear(x, @w)`` -> ``nn.linear(x, @w.rest) + sparse.linear(x, @w.values, @w.columns)``.

Single weights that quantization would harm become a sparse layer that is not quantized (SpQR, arXiv:2306.03078; the
dense-and-sparse split of SqueezeLLM, arXiv:2306.07629), as many in each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import Builder, DType, Module, Op, PassError, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.channels import channel_statistics
from tilewright.passes.match import replace
from tilewright.passes.outlier_columns import gated
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.weights import derive, derive_together, weights_of

_ROWS_AT_ONCE = 1 << 22  # elements that are looked at at a time
Parts = tuple[Weight, ...]


@dataclass(frozen=True)
class OutlierWeights(Pass):
    """Take the largest weights of each row out of linear layers; the rest is for ``quantize`` behind this pass.

    ``fraction`` of a row, at least one, are taken: those of the largest magnitude, times the root mean square of their
    input when the compilation has calibration data. In what is left they are zero. Gated layers come apart into their
    two products.
    """

    name: ClassVar[str] = "outlier-weights"
    fraction: float = 0.005
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for a fraction that makes no sense."""
        if not 0 < self.fraction <= 0.5:
            raise PassError(f"{self.name} takes a fraction of a row, above 0, at most 0.5; got {self.fraction}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        check_patterns(self.name, module, self.skip, self.only)
        rw = Rewriter(module, pattern=self.name)
        sizes = channel_statistics(module, ctx, self.name, lambda found: np.sqrt(found.square))
        work = _Work(self, rw, sizes)
        for function in module.entries():
            for op in function.walk(ops.Linear, ops.GatedLinear):
                work.layer(op)
        taken = sum(int(values.tensor.elements) for _, values, _ in work.done.values())
        ctx.note(f"{taken} of {sum(int(w.tensor.elements) for w in work.done)} weights are outliers")
        return ctx.take(rw)


@dataclass
class _Work:
    """What one run of the pass has made so far."""

    options: OutlierWeights
    rw: Rewriter
    sizes: Mapping[str, Any]
    done: dict[Weight, Parts] = field(default_factory=dict)

    def layer(self, op: Op) -> None:
        weights = list(weights_of(op).values())
        for weight in weights:
            reason = left_alone(weight, self.options.skip, self.options.only)
            if reason is not None:
                return self.rw.skip(op, reason)
        b, parts = self.rw.before(op), [self.parts(weight) for weight in weights if weight is not None]
        if isinstance(op, ops.GatedLinear):
            products = [self.product(b, op.x, p, bias) for p, bias in zip(parts, (op.gate_bias, op.up_bias))]
            return replace(self.rw, op, gated(b, op.act, *products))
        assert isinstance(op, ops.Linear)
        return replace(self.rw, op, self.product(b, op.x, parts[0], op.bias))

    def parts(self, weight: Weight) -> Parts:
        if weight not in self.done:
            n, k = map(int, weight.shape)
            count = max(1, round(k * self.options.fraction))
            types = {
                f"{weight.name}.values": TensorType((n, count), weight.dtype),
                f"{weight.name}.columns": TensorType((n, count), DType.i16 if k <= 1 << 15 else DType.i32),
            }
            sizes = self.sizes.get(weight.name)
            # apart, so that nothing keeps the large one while the small ones are asked for
            less, taken = (partial(make, count=count, sizes=sizes) for make in (without, outliers))
            rest = derive(self.rw.module, f"{weight.name}.rest", weight.tensor, [weight], less)
            self.done[weight] = (rest, *derive_together(self.rw.module, types, weight, taken))
        return self.done[weight]

    def product(self, b: Builder, x: Value, parts: Parts, bias: Value | None) -> Value:
        """The layer as the sum of two."""
        rest, values, columns = parts
        return b.add(ops.Add(b.add(ops.Linear(x, rest, bias)), b.add(ops.SparseLinear(x, values, columns))))


def without(weight: Any, count: int, sizes: Any = None) -> Any:
    """``weight`` ``[N, K]`` with 0 for what :func:`outliers` takes."""
    rest = weight.copy()
    np.put_along_axis(rest, columns_of(weight, count, sizes), 0, 1)
    return rest


def outliers(weight: Any, count: int, sizes: Any = None) -> tuple[Any, Any]:
    """The ``count`` largest of each row of ``weight`` ``[N, K]``, and their columns in ascending order: ``[N, count]``."""
    columns = columns_of(weight, count, sizes)
    return np.take_along_axis(weight, columns, 1), columns.astype(np.int16 if weight.shape[1] <= 1 << 15 else np.int32)


def columns_of(weight: Any, count: int, sizes: Any = None) -> Any:
    """The columns of the ``count`` largest of each row; ``sizes`` f32 ``[K]`` multiply magnitudes before that."""
    n, k = weight.shape
    found = np.empty((n, count), np.int64)
    step = max(1, _ROWS_AT_ONCE // k)
    for start in range(0, n, step):
        block = np.abs(weight[start : start + step].astype(np.float32))
        block *= 1 if sizes is None else sizes
        found[start : start + step] = np.sort(np.argpartition(block, k - count, axis=1)[:, k - count :], axis=1)
    return found
