"""Kernels around ``nn.linear`` and ``nn.gated_linear`` in the IR: the one layer, its operands by role, what comes after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.ir import Argument, Dim, DType, Function, Op, Value, as_dim, ops, product

FLOATS = ("f32", "bf16", "f16")
"""Element types of x, and of weights that are no codes."""


@dataclass(frozen=True)
class Tensor:
    """An operand of the layer: an argument, or the codes, scales and zero points that are dequantized to it.

    Of a compressed or sparse one, ``data`` is what is made of ``compressed`` or by ``sparse``, which is no argument.
    """

    data: Value
    scale: Value | None = None
    zero: Value | None = None
    compressed: tuple[Value, ...] = ()
    table: Value | None = None
    step: Value | None = None
    offset: Value | None = None
    sparse: ops.SparseExpand | None = None

    @classmethod
    def of(cls, value: Value) -> Tensor:
        op = value.owner
        if isinstance(op, ops.SparseExpand):
            return cls(value, sparse=op)
        if isinstance(op, ops.Decompress):
            return cls(value, compressed=tuple(op.operands))
        if isinstance(op, ops.Lookup):
            return cls(op.codes, op.scale, table=op.table)
        if not isinstance(op, ops.Dequantize):
            return cls(value)
        inner = op.codes.owner
        if isinstance(inner, ops.Expand):
            return cls(inner.codes, op.scale, inner.zero, step=inner.scale)
        if isinstance(inner, ops.SparseExpand):
            return cls(op.codes, op.scale, op.zero, offset=op.offset, sparse=inner)
        return cls(op.codes, op.scale, op.zero, offset=op.offset)

    @property
    def values(self) -> tuple[Value, ...]:
        """What of it the kernel is given."""
        data = self.compressed or (self.sparse.operands if self.sparse else (self.data,))
        parts = (self.scale, self.zero, self.table, self.step, self.offset)
        return (*data, *(v for v in parts if v is not None))

    @property
    def format(self) -> tuple[object, ...]:
        """What tensors that one kernel treats alike have in common."""
        stored = self.sparse and (self.sparse.layout, self.data.shape)
        return (stored, *((v.dtype, v.shape) for v in self.values))

    @property
    def groups(self) -> int:
        """Scales of a row; 1 without scales."""
        return 1 if self.scale is None else int(self.scale.shape[-1])


@dataclass(frozen=True)
class Pattern:
    """A kernel's linear layer, its operands by role, and the operations after it."""

    anchor: ops.Linear | ops.GatedLinear
    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Value, ...]
    tail: tuple[Op, ...]
    result: Value
    threshold: ops.Threshold | None = None
    """What x goes through before it meets the weights."""

    @property
    def rows(self) -> Dim:
        """M: how many rows of x there are."""
        return as_dim(product(self.anchor.x.shape[:-1]))

    @property
    def features(self) -> int:
        """N."""
        return int(self.weights[0].data.shape[0])

    @property
    def depth(self) -> int:
        """K."""
        return int(self.weights[0].data.shape[1])

    @property
    def activation(self) -> str | None:
        """Of a gated layer."""
        return self.anchor.act if isinstance(self.anchor, ops.GatedLinear) else None


def find(kernel: Function, refuse: Callable[[Pattern], str | None], skips: bool = False) -> Pattern | str:
    """The pattern of ``kernel``, or why it has none; ``refuse`` says what a family of kernels does not do.

    ``skips``: whether the family leaves out what x has no part in, below a threshold.
    """
    anchors = [op for op in kernel.body if isinstance(op, (ops.Linear, ops.GatedLinear))]
    if len(anchors) != 1 or len(kernel.returns) != 1:
        return "not one linear layer with one result"
    anchor = anchors[0]
    if isinstance(anchor, ops.Linear):
        factors, biases = [anchor.weight], [anchor.bias]
    else:
        factors, biases = [anchor.gate, anchor.up], [anchor.gate_bias, anchor.up_bias]
    lead = anchor.x.owner if isinstance(anchor.x.owner, ops.Threshold) else None
    if lead is not None and not skips:
        return "it multiplies all of x, a threshold or not"
    x, weights = Tensor.of(lead.x if lead else anchor.x), tuple(map(Tensor.of, factors))
    given = tuple(bias for bias in biases if bias is not None)
    if len(given) not in (0, len(weights)):
        return "only one of gate and up has a bias"
    before = {v.owner for v in (anchor.x, *factors)}
    before |= {op.codes.owner for op in before if isinstance(op, ops.Dequantize)}
    before |= {lead, *(v.owner for v in lead.operands if list(v.users) == [lead])} if lead else set()
    if x.compressed or x.sparse or not all(isinstance(v, Argument) for t in (x, *weights) for v in (*t.values, *given)):
        return "an operand of the linear layer is computed in the kernel"
    tail = tuple(op for op in kernel.body[:-1] if op is not anchor and op not in before)
    pattern = Pattern(anchor, x, weights, given, tail, kernel.returns[0], lead)
    return refusal(pattern) or refuse(pattern) or pattern


def refusal(p: Pattern) -> str | None:
    """What of a pattern no family of kernels does."""
    weight = p.weights[0]
    if not all(isinstance(d, int) for d in weight.data.shape):
        return "the weight's shape is not static"
    if any(w.format != weight.format for w in p.weights):
        return "gate and up differ in format"
    if len({b.dtype for b in p.biases}) > 1:
        return "biases of two element types"
    return _number_refusal(p)


def _number_refusal(p: Pattern) -> str | None:
    """What of the element types no family does."""
    for value in p.anchor.operands:
        if isinstance(value.owner, (ops.Dequantize, ops.Lookup)) and value.dtype is not DType.f32:
            return f"dequantized to {value.dtype.value}: sums are made of unrounded numbers"
    x, weight = p.x, p.weights[0]
    for tensor in (x, weight):
        if tensor.scale is None and tensor.table is None and tensor.data.dtype.value not in FLOATS:
            return f"no kernel for x {x.data.dtype.value} and weight {weight.data.dtype.value}"
    if x.table or x.step:
        return "activations come out of a table or expand"
    if x.scale and (x.data.dtype is not DType.i8 or x.scale.shape[-1] != 1 or x.scale.dtype is not DType.f32):
        return f"activations are {x.data.dtype.value} with scales {x.scale.type}, not i8 with one f32 scale a row"
    return None
