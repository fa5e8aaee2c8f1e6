"""What of a quantized module is which weight of the model it came from: joined ones are cut apart again by their rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tilewright.ir import ArraySource, Module, Op, UnsupportedError, Value, Weight, ops
from tilewright.passes.fuse_rules import DECODING

Shapes = Mapping[str, tuple[int, ...]]
_NORMS = (ops.RmsNorm, ops.LayerNorm)
_CHANGED = ("scaled",)  # what passes add to the name of a weight whose numbers they change


@dataclass(frozen=True)
class Rows:
    """Rows ``[start, stop)`` of a stored weight are the model's weight ``name``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight of the module, or codes with what belongs to them, and the weights of the model that it is.

    ``dynamic``: its layers round their inputs to 8 bits, a scale a token. ``linear``: linear layers take it, no embedding.
    """

    codes: Weight
    rows: tuple[Rows, ...]
    scale: Weight | None = None
    zero: Weight | None = None
    dynamic: bool = False
    linear: bool = False

    @property
    def parts(self) -> tuple[Weight, ...]:
        return tuple(w for w in (self.codes, self.scale, self.zero) if w is not None)


def originals(module: Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a traced model's weights; what is made up while tracing is none of them."""
    coded: dict[Weight, Value] = {}
    for op in module.ops(*DECODING):
        coded.update({w: op.result for w in op.operands if isinstance(w, Weight)})
    found = {_base(w.name): value.tensor.shape for w, value in coded.items()}
    plain = [w for w in module.weights.values() if w not in coded and not isinstance(w.source, ArraySource)]
    found |= {w.name: w.tensor.shape for w in plain}
    return {name: tuple(map(int, shape)) for name, shape in found.items()}


def constants(module: Module) -> set[str]:
    """Names of what a traced module has besides the model's weights."""
    return {w.name for w in module.weights.values() if isinstance(w.source, ArraySource)}


def stored(module: Module, shapes: Shapes, given: Collection[str] = ()) -> list[Stored]:
    """All weights of ``module``, which passes made of a model with the weights ``shapes`` and the constants ``given``.

    Raises UnsupportedError naming the weight for one that cannot be told apart, is new, or is not there any more.
    """
    found: dict[Weight, Stored] = {}
    for op in [op for function in module.entries() for op in function.walk(ops.Linear, ops.GatedLinear, ops.Embedding)]:
        for value in _matrices(op):
            new = _stored(op, value, shapes)
            if new is not None:
                old = found.get(new.codes, new)
                linear, dynamic = old.linear and new.linear, old.dynamic or new.dynamic
                found[new.codes] = replace(new, linear=linear, dynamic=dynamic)
    taken = {part for s in found.values() for part in s.parts}
    for weight in [w for w in module.weights.values() if w.users]:
        if weight not in taken and (rows := split(weight.name, weight.tensor.shape, shapes)) is not None:
            found[weight] = Stored(weight, rows)
        elif weight not in taken and weight.name not in given and any(isinstance(u, _NORMS) for u in weight.users):
            raise UnsupportedError(f"@{weight.name} was added by the passes, and the model has no place for it")
    have = {rows.name for s in found.values() for rows in s.rows}
    missing = [name for name in shapes if name not in have]
    if missing:
        raise UnsupportedError(f"@{missing[0]} is not in the module any more as it was; export after other passes")
    return list(found.values())


def _matrices(op: Op) -> Iterator[Value]:
    if isinstance(op, ops.Linear):
        yield op.weight
    elif isinstance(op, ops.GatedLinear):
        yield from (op.gate, op.up)
    elif isinstance(op, ops.Embedding):
        yield op.table


def _stored(op: Op, value: Value, shapes: Shapes) -> Stored | None:
    linear = not isinstance(op, ops.Embedding)
    maker = value.owner
    dynamic = linear and _is_rounded(op)
    if isinstance(value, Weight):
        rows = split(value.name, value.tensor.shape, shapes)
        if rows is not None and dynamic:
            raise UnsupportedError(f"@{value.name}: inputs are rounded, the weight is not", op.loc)
        return None if rows is None else Stored(value, rows, linear=linear)
    if not isinstance(maker, DECODING):
        return None
    if not isinstance(maker, ops.Dequantize) or not all(isinstance(v, Weight) for v in maker.operands):
        raise UnsupportedError(f"a weight by way of {maker.name} is not carried by the format", op.loc)
    assert isinstance(maker.codes, Weight)
    if maker.offset is not None:
        raise UnsupportedError(f"@{maker.codes.name}: an offset is not carried by the format", op.loc)
    rows = split(_base(maker.codes.name), value.tensor.shape, shapes)
    if rows is None:
        raise UnsupportedError(f"@{maker.codes.name}: it is not known which weight of the model it was", op.loc)
    assert isinstance(maker.scale, Weight)
    zero = maker.zero if isinstance(maker.zero, Weight) else None
    return Stored(maker.codes, rows, maker.scale, zero, dynamic, linear)


def _is_rounded(op: Op) -> bool:
    """Whether the input of a layer is rounded, a scale a token; raises UnsupportedError for another way."""
    x = op.operands[0]
    rounded = isinstance(x.owner, ops.Dequantize)
    if isinstance(x.owner, ops.Dequantize):
        maker = x.owner.codes.owner
        if not isinstance(maker, ops.Quantize) or maker.group:
            raise UnsupportedError("inputs that are rounded in groups are not carried by the format", op.loc)
        x = maker.x
    if isinstance(x.owner, ops.Gather) and isinstance(x.owner.indices, Weight):
        raise UnsupportedError("columns in an order of their own are not carried by the format", op.loc)
    return rounded


def _base(name: str) -> str:
    """``a.weight.i4`` -> ``a.weight``."""
    lead, _, last = name.rpartition(".")
    return _base(lead) if last.isdigit() and lead else lead


def split(name: str, shape: Sequence[object], shapes: Shapes) -> tuple[Rows, ...] | None:
    """The weights of the model that a weight of the module is, by its name and shape; None when it is none."""
    while name not in shapes and name.rpartition(".")[2] in _CHANGED:
        name = name.rpartition(".")[0]
    if name in shapes:
        return (Rows(name, 0, shapes[name][0]),) if tuple(shape) == shapes[name] else None
    *lead, middle, tail = name.split(".") if name.count(".") else (name, "")
    names = _joined(".".join(lead), middle, tail, shapes)
    if names is None or sum(shapes[n][0] for n in names) != shape[0]:
        return None
    rows, start = [], 0
    for part in names:
        rows.append(Rows(part, start, start + shapes[part][0]))
        start += shapes[part][0]
    return tuple(rows)


def _joined(lead: str, middle: str, tail: str, shapes: Shapes) -> list[str] | None:
    """The weights ``lead.X.tail`` whose X make ``middle``, joined by underscores as passes join them."""
    if not middle:
        return []
    for name in shapes:
        own = name.removeprefix(f"{lead}.").removesuffix(f".{tail}")
        if name != f"{lead}.{own}.{tail}" or not f"{middle}_".startswith(f"{own}_"):
            continue
        rest = _joined(lead, middle[len(own) + 1 :], tail, shapes)
        if rest is not None:
            return [name, *rest]
    return None
