"""``nn.linear(x, @w)`` -> ``nn.linear(x * @w.keep, @w.rest) + nn.linear(core.gather(x, @w.columns), @w.outliers)``.

Columns that do harm when they are quantized become a small layer that is not (LLM.int8(), arXiv:2208.07339).
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
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.weights import as_weight, derive_together

_ROWS_AT_ONCE = 1 << 22  # elements that are widened to f32 at a time
_ACTIVATIONS: dict[str, type[ops.Unary]] = {
    "relu": ops.Relu,
    "silu": ops.Silu,
    "gelu": ops.Gelu,
    "gelu_tanh": ops.GeluTanh,
}


@dataclass(frozen=True)
class OutlierColumns(Pass):
    """Take the columns out of linear layers that quantization harms most; the rest is for ``quantize`` behind this pass.

    ``fraction`` of a layer's inputs, at least one, are taken: those of the largest magnitude, when the compilation has
    calibration data, or ``statistics`` (weight name -> largest magnitude a channel, ``[K]``) among its options; else
    those whose columns of the weight have the largest norm. Known magnitudes below ``threshold`` stay (LLM.int8() has 6).
    ``inputs`` sets what is taken to zero among the layer's other inputs too, for schemes that round activations; else
    its columns of the weight alone are zero. Gated layers come apart into their two products.
    """

    name: ClassVar[str] = "outlier-columns"
    fraction: float = 0.01
    threshold: float = 0.0
    inputs: bool = True
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for options that make no sense."""
        if not 0 < self.fraction <= 0.5:
            raise PassError(f"{self.name} takes a fraction of a layer's inputs, above 0, at most 0.5; got {self.fraction}")
        if not self.threshold >= 0:
            raise PassError(f"the threshold of {self.name} is a magnitude, 0 or more; got {self.threshold}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        check_patterns(self.name, module, self.skip, self.only)
        rw = Rewriter(module, pattern=self.name)
        work = _Work(self, rw, self.statistics(module, ctx))
        for function in module.entries():
            work.shared.clear()
            for op in function.walk(ops.Linear, ops.GatedLinear):
                work.layer(op)
        taken = sum(parts.count for parts in work.done.values())
        ctx.note(f"{taken} of {sum(int(w.shape[1]) for w in work.done)} columns of {len(work.done)} weights are outliers")
        return ctx.take(rw)

    def statistics(self, module: Module, ctx: PassContext) -> Mapping[str, Any]:
        """The largest magnitudes of channels by name of weight, as far as they are known."""
        given = ctx.options.get("statistics")
        return channel_statistics(module, ctx, self.name, lambda found: found.top) if given is None else given


@dataclass(frozen=True)
class Parts:
    """A weight ``[N, K]`` as what :func:`split` gives; ``key`` is equal for weights known to have equal columns."""

    weights: tuple[Weight, ...]
    key: object

    @property
    def count(self) -> int:
        """Columns that were taken."""
        return int(self.weights[1].shape[1])


@dataclass
class _Work:
    """What one run of the pass has made so far."""

    options: OutlierColumns
    rw: Rewriter
    statistics: Mapping[str, Any]
    done: dict[Weight, Parts] = field(default_factory=dict)
    shared: dict[tuple[Value, object], tuple[Value, Value]] = field(default_factory=dict)

    def layer(self, op: Op) -> None:
        names = ("weight",) if isinstance(op, ops.Linear) else ("gate", "up")
        weights = [as_weight(getattr(op, name), 2) for name in names]
        for weight in weights:
            reason = left_alone(weight, self.options.skip, self.options.only) or self.reason(op, weight)
            if reason is not None:
                return self.rw.skip(op, reason)
        first, *second = (self.parts(weight) for weight in weights if weight is not None)
        b = self.rw.before(op)
        if isinstance(op, ops.GatedLinear):
            gate = self.product(b, op.x, first, op.gate_bias)
            return replace(self.rw, op, gated(b, op.act, gate, self.product(b, op.x, second[0], op.up_bias)))
        assert isinstance(op, ops.Linear)
        return replace(self.rw, op, self.product(b, op.x, first, op.bias))

    def reason(self, op: Op, weight: Weight | None) -> str | None:
        """Why a layer's columns stay together."""
        assert weight is not None
        if not isinstance(op.operands[0].shape[-1], int) or op.operands[0].dtype is not weight.dtype:
            return f"@{weight.name} is {weight.type}, its inputs are {op.operands[0].type}"
        if is_outliers(op):
            return f"@{weight.name} holds outliers already"
        chosen = self.columns(weight)
        if chosen is not None and not len(chosen):
            return f"no input of @{weight.name} reaches {self.options.threshold} in calibration"
        return None

    def columns(self, weight: Weight) -> Any:
        """The columns of a weight that calibration chooses, ascending; None without statistics of it."""
        given = self.statistics.get(weight.name)
        if given is None:
            return None
        size = np.asarray(given, np.float32)
        k = int(weight.shape[1])
        if size.shape != (k,) or not np.isfinite(size).all():
            raise PassError(f"the statistics of @{weight.name} are not {k} finite numbers, but {size.shape}")
        found = largest(size, count_of(k, self.options.fraction))
        return found[size[found] >= self.options.threshold]

    def parts(self, weight: Weight) -> Parts:
        if weight in self.done:
            return self.done[weight]
        n, k = map(int, weight.shape)
        chosen = self.columns(weight)
        count = count_of(k, self.options.fraction) if chosen is None else len(chosen)
        types = {
            f"{weight.name}.rest": weight.tensor,
            f"{weight.name}.outliers": TensorType((n, count), weight.dtype),
            f"{weight.name}.columns": TensorType((count,), DType.i64),
            f"{weight.name}.keep": TensorType((k,), weight.dtype),
        }
        made = derive_together(self.rw.module, types, weight, partial(split, count=count, columns=chosen))
        self.done[weight] = Parts(made, weight if chosen is None else chosen.tobytes())
        return self.done[weight]

    def product(self, b: Builder, x: Value, parts: Parts, bias: Value | None) -> Value:
        """The layer as the sum of two."""
        rest, outliers, columns, keep = parts.weights
        if (x, parts.key) not in self.shared:
            others = b.add(ops.Mul(x, keep)) if self.options.inputs else x
            self.shared[x, parts.key] = others, b.add(ops.Gather(x, columns, axis=x.tensor.rank - 1))
        others, picked = self.shared[x, parts.key]
        return b.add(ops.Add(b.add(ops.Linear(others, rest, bias)), b.add(ops.Linear(picked, outliers))))


def gated(b: Builder, act: str, gate: Value, up: Value) -> Op:
    """What a gated layer does with its two products."""
    active: Value = b.add(_ACTIVATIONS[act](gate)) if act in _ACTIVATIONS else gate
    product: Op = ops.Mul(active, up)
    return product


def is_outliers(op: Op) -> bool:
    """Whether ``op`` is the small layer that this pass makes: a linear one whose inputs a constant picks."""
    made = op.x.owner if isinstance(op, ops.Linear) else None
    return isinstance(made, ops.Gather) and isinstance(made.indices, Weight) and made.axis == made.x.tensor.rank - 1


def count_of(k: int, fraction: float) -> int:
    """How many of ``k`` columns are taken."""
    return max(1, round(k * fraction))


def largest(sizes: Any, count: int) -> Any:
    """The indices of the ``count`` largest of ``sizes``, ascending; of equal ones the first."""
    return np.sort(np.argsort(-sizes, kind="stable")[:count]).astype(np.int64)


def split(weight: Any, count: int, columns: Any = None) -> tuple[Any, Any, Any, Any]:
    """``weight`` ``[N, K]`` with 0 in ``count`` columns; these ``[N, count]``; which they are; ``[K]``: 0 there, else 1."""
    if columns is None:
        columns = largest(squares(weight), count)
    rest, outliers = weight.copy(), np.ascontiguousarray(weight[:, columns])
    rest[:, columns] = 0
    keep = np.ones(weight.shape[1], weight.dtype)
    keep[columns] = 0
    return rest, outliers, columns, keep


def squares(weight: Any) -> Any:
    """The sum of squares of each column, f32 ``[K]``."""
    step = max(1, _ROWS_AT_ONCE // weight.shape[1])
    blocks = (weight[i : i + step].astype(np.float32) for i in range(0, len(weight), step))
    return np.sum([np.einsum("nk,nk->k", block, block) for block in blocks], axis=0)
