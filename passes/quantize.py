"""``nn.linear(x, @w)`` -> ``nn.linear(quant.dequantize(quant.quantize(x)), quant.dequantize(@w.i4, @w.scale))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tilewright.ir import Argument, DType, Module, Op, PassError, Return, Rewriter, Value, Weight, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.methods import METHODS, Method, Settings, Sources
from tilewright.passes.formats import Format, Scheme, check_finite, find_scheme
from tilewright.passes.match import replace
from tilewright.passes.outlier_columns import is_outliers
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.weights import as_weight, derive_together, given, place, weights_of

Parts = tuple[Weight, ...]


@dataclass(frozen=True)
class Quantize(Pass):
    """Weights in few bits; where the scheme says so activations are rounded too, a scale a token at run time.

    ``scheme`` is a name of the table in ``formats/schemes.py``; ``group``, the neighbours along K that share a scale (0:
    all, one scale an output channel), and ``zero``, zero points, are those of the scheme unless given. ``layers``: ``head``
    are the layers that make the function's results and the embeddings of tokens, ``body`` all other linear layers. ``skip``
    and ``only`` are patterns of weight names (``*lm_head*``). A weight that is quantized already stays as it is.

    ``method`` chooses the numbers: ``rtn`` rounds to the nearest, ``clip`` searches the ranges of groups, ``gptq`` makes
    up for errors column by column (``damping``, ``order``, ``clip``: see ``calibration/gptq.py``) and needs calibration
    data. Numbers that need none are computed when the artifact is written, a weight at a time.
    """

    name: ClassVar[str] = "quantize"
    scheme: str = "w8a16"
    group: int | None = None
    zero: bool | None = None
    layers: Literal["all", "head", "body"] = "all"
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    method: Literal["rtn", "clip", "gptq"] = "rtn"
    damping: float = 0.01
    order: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        """Raises PassError for a scheme that does not exist, or has no such options, and for a damping below 0."""
        assert self.format
        if not self.damping >= 0:
            raise PassError(f"damping is a fraction of the mean diagonal, 0 or more; got {self.damping}")

    @property
    def row(self) -> Scheme:
        """The scheme's row of the table."""
        return find_scheme(self.scheme)

    @property
    def format(self) -> Format:
        return self.row.with_options(self.scheme, group=self.group, zero=self.zero)

    @property
    def chooser(self) -> Method:
        """The method that chooses the numbers."""
        return METHODS[self.method](self.format, Settings(self.damping, self.order, self.clip))

    def run(self, module: Module, ctx: PassContext) -> bool:
        rw = Rewriter(module, pattern=self.name)
        check_patterns(self.name, module, self.skip, self.only)
        layers = {op: found for op in linear_layers(module) if (found := self.chosen(op, rw)) is not None}
        numbers = self.chooser.sources(module, ctx, {op: list(found.values()) for op, found in layers.items()})
        thresholds = [op for op in layers if isinstance(op.operands[0].owner, ops.Threshold)]
        if thresholds and self.row.activations is not None:
            ctx.note(f"{self.scheme} rounds the inputs of {len(thresholds)} layers, whose zeros no kernel leaves out then")
        done: dict[Weight, Parts] = {}
        for function in module.entries():
            rows: dict[Value, Value] = {}
            for op in [op for op in layers if op.parent is function]:
                self.layer(op, layers[op], rw, numbers, done, rows)
            for op in function.walk(ops.Embedding):
                assert isinstance(op, ops.Embedding)
                self.table(op, rw, numbers, done)
        before, after = (sum(int(w.tensor.bytes) for w in ws) for ws in (done, [q for p in done.values() for q in p]))
        ctx.note(f"{len(done)} weights of {before} bytes became {after} bytes")
        return ctx.take(rw)

    def chosen(self, op: Op, rw: Rewriter) -> dict[str, Weight] | None:
        """The weights of a linear layer by their fields: all of them are quantized, or none (None)."""
        if self.layers != "all" and (self.layers == "head") != makes_results(op):
            return None
        weights = weights_of(op)
        if any(self.refuses(op, name, weight, rw) for name, weight in weights.items()):
            return None
        found = {name: weight for name, weight in weights.items() if weight is not None}
        for weight in found.values():
            self.check(weight, op)
        return found

    def layer(self, op: Op, weights: dict[str, Weight], rw: Rewriter, numbers: Sources, done: dict[Weight, Parts],
              rows: dict[Value, Value]) -> None:  # fmt: skip
        """Quantize the weights of one linear layer, and its input if the scheme says so."""
        changes: dict[str, Value] = {}
        for name, weight in weights.items():
            parts = self.parts(rw.module, weight, numbers, done)
            changes[name] = self.format.value(rw.before(op).add, parts, DType.f32)
        kind = op.operands[0].dtype
        if self.row.activations is not None:
            changes["x"] = quantized_rows(op, rw, rows)
        new = rw.before(op).insert(op.clone({}, **changes))
        narrow = ops.Cast(new.result, kind) if new.result.dtype is not kind else new.result
        replace(rw, op, narrow)

    def table(self, op: ops.Embedding, rw: Rewriter, numbers: Sources, done: dict[Weight, Parts]) -> None:
        """Quantize the table of tokens; it shares the numbers of a head that is tied to it."""
        table = as_weight(op.table, 2)
        tied = table in done
        if not is_given(op.indices) or (self.layers == "body" and not tied) or self.refuses(op, "table", table, rw):
            return
        assert table is not None
        self.check(table, op)
        parts = self.parts(rw.module, table, numbers, done)
        replace(rw, op, op.clone({}, table=self.format.value(rw.before(op).add, parts, table.dtype)))

    def check(self, weight: Weight, op: Op) -> None:
        """Raise PassError for a weight that the format cannot hold, or whose numbers are not finite; this reads them."""
        n, k = map(int, weight.shape)
        reason = self.format.unfit(n, k)
        if reason is not None:
            remedy = f"choose another group or scheme, or skip={weight.name}"
            raise PassError(f"{self}: @{weight.name}: {reason}; {remedy}", op.loc)
        for array in given(weight.source):
            check_finite(array, weight.name)

    def parts(self, module: Module, weight: Weight, numbers: Sources, done: dict[Weight, Parts]) -> Parts:
        """What is stored for ``weight``."""
        if weight not in done:
            names = self.format.parts(weight.name, *map(int, weight.shape))
            if weight in numbers:
                done[weight] = place(module, names, numbers[weight])
            else:
                done[weight] = derive_together(module, names, weight, self.chooser.make(weight.name))
        return done[weight]

    def refuses(self, op: Op, field: str, weight: Weight | None, rw: Rewriter) -> bool:
        """Whether a weight stays as it is; says why."""
        if isinstance(getattr(op, field).owner, (ops.Dequantize, ops.Lookup)):
            return True
        reason = "it holds the outliers of another layer" if is_outliers(op) else left_alone(weight, self.skip, self.only)
        if reason is not None:
            rw.skip(op, reason)
        return reason is not None


def linear_layers(module: Module) -> list[Op]:
    """The linear and gated layers of all entries."""
    return [op for function in module.entries() for op in function.walk(ops.Linear, ops.GatedLinear)]


def quantized_rows(op: Op, rw: Rewriter, done: dict[Value, Value]) -> Value:
    """The layer's input, rounded to 8 bits a token: once for all layers that read it."""
    x = op.operands[0]
    if x not in done:
        codes, scale = rw.before(op).insert(ops.Quantize(x)).results
        done[x] = rw.before(op).add(ops.Dequantize(codes, scale, dtype=DType.f32))
    return done[x]


def is_given(value: Value) -> bool:
    """Whether ``value`` is an argument of the function, as token ids are and positions are not."""
    owner = value.owner
    return isinstance(value, Argument) or (isinstance(owner, (ops.Reshape, ops.Slice)) and is_given(owner.x))


def makes_results(op: Op) -> bool:
    """Whether what ``op`` makes goes straight to the results of its function."""
    users = [user for result in op.results for user in result.users]
    plain = (ops.Elementwise, ops.Reshape, ops.Slice, ops.Transpose, ops.ArgMax)
    return bool(users) and all(isinstance(u, Return) or (isinstance(u, plain) and makes_results(u)) for u in users)
