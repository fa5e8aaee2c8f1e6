"""``nn.linear(x, @w)`` -> ``nn.linear(x * @w.keep, @w.rest) + nn.linear(core.gather(x, @w.columns), @w.outliers)``.

Columns that do harm when they are quantized become a small layer that is not (LLM.int8(), arXiv:2208.07339).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import Builder, DType, Module, Op, PassError, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.channels import channel_statistics
from tilewright.passes.match import replace
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.weights import derive, derive_together, weights_of

Choose = Callable[[Any], Any]
"""Weight ``[N, K]`` -> the columns to take, ascending."""

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

    ``inputs`` is for schemes that round activations: what is taken becomes zero among the layer's other inputs too.
    Without it columns of the weight alone become zero, and what counts is magnitude times norm. Gated layers come apart
    into their two products.
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
    """A weight ``[N, K]`` as what :func:`without` and :func:`outliers` give.

    ``key`` is equal for weights that are known to have equal columns.
    """

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
        weights = list(weights_of(op).values())
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
        if self.count(weight) == 0:
            return f"no input of @{weight.name} reaches {self.options.threshold} in calibration"
        return None

    def sizes(self, weight: Weight) -> Any:
        """Calibrated magnitudes f32 ``[K]`` of the layer's inputs, 0 for those below the threshold; None if unknown."""
        given = self.statistics.get(weight.name)
        if given is None:
            return None
        size, k = np.asarray(given, np.float32), int(weight.shape[1])
        if size.shape != (k,) or not np.isfinite(size).all():
            raise PassError(f"the statistics of @{weight.name} are not {k} finite numbers, but {size.shape}")
        return np.where(size >= self.options.threshold, size, 0)

    def count(self, weight: Weight) -> int:
        """How many columns are taken."""
        most, sizes = max(1, round(int(weight.shape[1]) * self.options.fraction)), self.sizes(weight)
        return most if sizes is None else min(most, int(np.count_nonzero(sizes)))

    def parts(self, weight: Weight) -> Parts:
        if weight in self.done:
            return self.done[weight]
        (n, k), count, sizes = map(int, weight.shape), self.count(weight), self.sizes(weight)
        by_inputs = sizes is not None and self.options.inputs
        choose: Choose = partial(by_size if by_inputs else by_norm, count=count, sizes=sizes)
        types = {
            f"{weight.name}.outliers": TensorType((n, count), weight.dtype),
            f"{weight.name}.columns": TensorType((count,), DType.i64),
            f"{weight.name}.keep": TensorType((k,), weight.dtype),
        }
        rest = derive(self.rw.module, f"{weight.name}.rest", weight.tensor, [weight], partial(without, choose=choose))
        taken = derive_together(self.rw.module, types, weight, partial(outliers, choose=choose))
        self.done[weight] = Parts((rest, *taken), largest(sizes, count).tobytes() if by_inputs else weight)
        return self.done[weight]

    def product(self, b: Builder, x: Value, parts: Parts, bias: Value | None) -> Value:
        """The layer as the sum of two."""
        rest, small, columns, keep = parts.weights
        if (x, parts.key) not in self.shared:
            others = b.add(ops.Mul(x, keep)) if self.options.inputs else x
            self.shared[x, parts.key] = others, b.add(ops.Gather(x, columns, axis=x.tensor.rank - 1))
        others, picked = self.shared[x, parts.key]
        return b.add(ops.Add(b.add(ops.Linear(others, rest, bias)), b.add(ops.Linear(picked, small))))


def gated(b: Builder, act: str, gate: Value, up: Value) -> Op:
    """What a gated layer does with its two products."""
    product: Op = ops.Mul(active(b, act, gate), up)
    return product


def active(b: Builder, act: str, gate: Value) -> Value:
    """The gate of a gated layer behind its activation."""
    return b.add(_ACTIVATIONS[act](gate)) if act in _ACTIVATIONS else gate


def is_outliers(op: Op) -> bool:
    """Whether ``op`` is the small layer that this pass makes: a linear one whose inputs a constant picks."""
    made = op.x.owner if isinstance(op, ops.Linear) else None
    return isinstance(made, ops.Gather) and isinstance(made.indices, Weight) and made.axis == made.x.tensor.rank - 1


def largest(sizes: Any, count: int) -> Any:
    """The indices of the ``count`` largest of ``sizes``, ascending; of equal ones the first."""
    return np.sort(np.argsort(-sizes, kind="stable")[:count]).astype(np.int64)


def by_size(weight: Any, count: int, sizes: Any) -> Any:
    """The columns of ``weight`` ``[N, K]`` whose inputs have the largest ``sizes`` ``[K]``."""
    return largest(sizes, count)


def by_norm(weight: Any, count: int, sizes: Any = None) -> Any:
    """The columns of the largest norm, times the ``sizes`` of their inputs where these are known."""
    return largest(squares(weight) * (1 if sizes is None else np.square(sizes)), count)


def without(weight: Any, choose: Choose) -> Any:
    """``weight`` ``[N, K]`` with zeros in the columns that are chosen."""
    rest = weight.copy()
    rest[:, choose(weight)] = 0
    return rest


def outliers(weight: Any, choose: Choose) -> tuple[Any, Any, Any]:
    """The columns of ``weight`` ``[N, K]`` that are chosen, which they are, and ``[K]``: 0 for them, 1 for the others."""
    columns = choose(weight)
    keep = np.ones(weight.shape[1], weight.dtype)
    keep[columns] = 0
    return np.ascontiguousarray(weight[:, columns]), columns, keep


def squares(weight: Any) -> Any:
    """The sum of squares of each column, f32 ``[K]``."""
    step = max(1, _ROWS_AT_ONCE // weight.shape[1])
    blocks = (weight[i : i + step].astype(np.float32) for i in range(0, len(weight), step))
    return np.sum([np.einsum("nk,nk->k", block, block) for block in blocks], axis=0)
