"""``nn.linear(x, @w)`` -> ``nn.linear(x, @w.pruned)``: a dense weight of the same type, with exact zeros in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from tilewright.ir import (
    ComputedSource,
    DType,
    Module,
    Op,
    PassError,
    Rewriter,
    TensorType,
    Value,
    Weight,
    WeightSource,
)
from tilewright.ir.ops import numerics
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Array, calibration
from tilewright.passes.calibration.spill import Spill
from tilewright.passes.calibration.stream import LAYERS, Layer, stream
from tilewright.passes.outlier_columns import is_outliers
from tilewright.passes.quantize import linear_layers, makes_results
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.sparsity.allocation import Layers, find_allocation
from tilewright.passes.sparsity.inputs import Inputs
from tilewright.passes.sparsity.methods import METHODS, Method, find_method
from tilewright.passes.sparsity.patterns import Pattern, find_pattern
from tilewright.passes.weights import place, weights_of

Shares = Mapping[Weight, float]


@dataclass(frozen=True)
class Prune(Pass):
    """Weights of linear layers become exact zeros: the share ``sparsity`` of all that are chosen.

    ``pattern``: ``unstructured``, or ``N:M`` (2:4): N of M neighbours along K stay. Both are of units of ``group``
    neighbours that go together. ``method`` says which, and what becomes of the rest (``sparsity/methods.py``): all but
    ``magnitude`` need calibration data. ``refine`` exchanges weights afterwards. ``allocation`` gives each layer its own
    share, at most ``spread`` from ``sparsity``, as many zeros in sum. ``damping`` is that of ``quantize``.

    ``layers``: ``head`` are those that make the function's results, ``body`` all others; ``skip`` and ``only`` are
    patterns of weight names. Tables of embeddings stay, and a weight that is quantized already.
    """

    name: ClassVar[str] = "prune"
    method: str = "magnitude"
    sparsity: float | None = None
    pattern: str = "unstructured"
    group: int = 1
    refine: str = "none"
    allocation: str = "uniform"
    spread: float = 0.1
    damping: float = 0.01
    layers: Literal["all", "head", "body"] = "body"
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for methods and patterns that do not exist, and for shares that make no sense."""
        assert self.chooser
        find_allocation(self.allocation)
        said = self.shape.sparsity
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise PassError(f"sparsity is a share of zeros between 0 and 1; got {self.sparsity}")
        if said is not None and self.sparsity is not None and abs(self.sparsity - said) > 1e-6:
            raise PassError(f"pattern={self.pattern} has a sparsity of {said:g}, not of {self.sparsity:g}: leave one out")
        if said is not None and self.allocation != "uniform":
            raise PassError(f"pattern={self.pattern} is the same in all layers: allocation={self.allocation} is for "
                            "pattern=unstructured")  # fmt: skip
        if not (self.damping >= 0 and self.spread >= 0):
            raise PassError(f"damping and spread are 0 or more; got {self.damping} and {self.spread}")

    @property
    def shape(self) -> Pattern:
        """The pattern."""
        return find_pattern(self.pattern, self.group)

    @property
    def chooser(self) -> Method:
        """The method."""
        return find_method(self.method, self.refine, self.shape)

    @property
    def target(self) -> float:
        """The share of zeros in all weights together."""
        found = self.shape.sparsity if self.sparsity is None else self.sparsity
        return 0.5 if found is None else found

    @property
    def needs_data(self) -> bool:
        return METHODS[self.method].needs_data or self.refine != "none"

    def run(self, module: Module, ctx: PassContext) -> bool:
        rw = Rewriter(module, pattern=self.name)
        check_patterns(self.name, module, self.skip, self.only)
        layers = {op: found for op in linear_layers(module) if (found := self.chosen(op, rw))}
        if not layers:
            ctx.note("there is no weight to prune")
            return ctx.take(rw)
        given = calibration(module, ctx, str(self)) if self.needs_data else None
        shares = find_allocation(self.allocation)(self, module, ctx, layers)
        work = _Pruning(self, shares)
        if given is not None:
            stream(*given, partial(work.visit, layers), [op for op in layers if op.parent is given[0]])
        for weight in shares:
            self.replace(rw, weight, work.source(weight), layers)
        self.report(ctx, shares, work.zeros)
        return ctx.take(rw)

    def chosen(self, op: Op, rw: Rewriter) -> list[Weight]:
        """The weights of a layer that are pruned; says why others are not. Raises PassError for one that does not fit."""
        if self.layers != "all" and (self.layers == "head") != makes_results(op):
            return []
        found = []
        for weight in weights_of(op).values():
            reason = left_alone(weight, self.skip, self.only) or self.reason(op, weight)
            if reason is not None:
                rw.skip(op, reason)
            elif weight is not None:
                unfit = self.shape.unfit(int(weight.shape[1]))
                if unfit is not None:
                    raise PassError(f"{self}: @{weight.name}: {unfit}; choose another, or skip={weight.name}", op.loc)
                found.append(weight)
        return found

    def reason(self, op: Op, weight: Weight | None) -> str | None:
        assert weight is not None
        if is_outliers(op):
            return f"@{weight.name} holds the outliers of another layer"
        others = [user for user in weight.users if not isinstance(user, LAYERS)]
        return f"{others[0].name} takes @{weight.name} too" if others else None

    def replace(self, rw: Rewriter, weight: Weight, source: WeightSource | None, layers: Layers) -> None:
        """Let the layers take the weight with zeros."""
        [new] = place(rw.module, {f"{weight.name.removesuffix('.pruned')}.pruned": weight.tensor}, [source])
        for op in [op for op, weights in layers.items() if weight in weights]:
            op.replace_operand(weight, new)
            rw.changed += 1

    def report(self, ctx: PassContext, shares: Shares, zeros: Mapping[Weight, int]) -> None:
        """Zeros of each weight, and of all."""
        counts = {w: zeros.get(w, round(int(w.tensor.elements) * share)) for w, share in shares.items()}
        for weight, count in counts.items():
            size = int(weight.tensor.elements)
            ctx.note(f"@{weight.name}: {count} of {size} weights are 0 ({count / size:.1%})")
        total, size = sum(counts.values()), sum(int(w.tensor.elements) for w in counts)
        ctx.note(f"{total} of {size} weights in {len(counts)} matrices are 0 ({total / max(size, 1):.2%})")


class _Pruning:
    """Prunes weights as the stream comes to their layers; the stream goes on with what is left of them."""

    def __init__(self, options: Prune, shares: Shares) -> None:
        self.options, self.shares, self.method = options, shares, options.chooser
        self.spill = Spill()
        self.found: dict[Weight, WeightSource] = {}
        self.zeros: dict[Weight, int] = {}

    def visit(self, layers: Layers, op: Layer, arrays: Sequence[Array]) -> dict[Value, Array]:
        weights = [w for w in layers[op] if w not in self.found]  # one that layers share is the first one's
        inputs = Inputs(arrays, self.options.damping, ", @".join(w.name for w in weights))
        changes: dict[Value, Array] = {}
        for weight in weights:
            pruned = self.method.prune(weight.load(), self.shares[weight], inputs, weight.name)
            self.zeros[weight] = int(pruned.size - np.count_nonzero(pruned))
            self.found[weight] = self.kept(weight, pruned)
            changes[weight] = numerics.wide(pruned)
            weight.release()
        return changes

    def kept(self, weight: Weight, pruned: Array) -> WeightSource:
        """Where the numbers wait: a bit a weight when those that stay are as they were."""
        if self.method.moves:
            return self.spill.put(pruned, weight.tensor)
        bits = np.packbits(pruned != 0)
        assert weight.source is not None, "it was loaded"
        return ComputedSource((weight.source, self.spill.put(bits, TensorType((bits.size,), DType.u8))), masked)

    def source(self, weight: Weight) -> WeightSource | None:
        """The numbers with zeros; those that calibration did not reach by magnitude, computed when they are asked for."""
        if weight in self.found or weight.source is None:
            return self.found.get(weight)
        method = METHODS["magnitude"](self.method.pattern)
        return ComputedSource((weight.source,), partial(method.prune, sparsity=self.shares[weight], name=weight.name))


def masked(weight: Array, bits: Array) -> Array:
    """``weight`` with 0 where ``bits`` (packed) has one."""
    keep = np.unpackbits(bits, count=weight.size).view(bool).reshape(weight.shape)
    return np.where(keep, weight, np.zeros((), weight.dtype))
