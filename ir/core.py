"""The graph: locations, values, operations, functions, modules.

Operations are declared as classes (see :class:`Op`); parser, printer, verifier and the reference page derive from
the declaration. A value knows its users, so a rewrite never searches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np

from tilewright.ir.errors import VerifyError
from tilewright.ir.sources import ArraySource, WeightSource, release
from tilewright.ir.types import Dim, DType, KVType, TensorType, Type, as_dim, dim_symbols, eval_dim


@dataclass(frozen=True)
class Loc:
    """Where an operation comes from: the module path in the model and the user's file and line."""

    module: str = ""
    file: str | None = None
    line: int | None = None

    def describe(self) -> str:
        where = f"{self.file}:{self.line}" if self.file else ""
        return ", ".join(p for p in (self.module and f"module {self.module}", where) if p) or "unknown location"


UNKNOWN = Loc()


class Value:
    """Something an operation can take: an argument, a result, a weight or a state."""

    def __init__(self, name: str | None, type: Type) -> None:
        self.name = name
        self.type = type
        self.users: dict[Op, None] = {}

    @property
    def tensor(self) -> TensorType:
        """The type, known to be a tensor; raises VerifyError for a cache."""
        if not isinstance(self.type, TensorType):
            raise VerifyError(f"expected a tensor, got {self.type}")
        return self.type

    @property
    def cache(self) -> KVType:
        """The type, known to be a cache; raises VerifyError for a tensor."""
        if not isinstance(self.type, KVType):
            raise VerifyError(f"expected a kv cache, got {self.type}")
        return self.type

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def owner(self) -> Op | None:
        """The operation that makes this value, if one does."""
        return None

    def replace_all_uses(self, new: Value) -> None:
        """Make every user of this value take ``new`` instead."""
        for op in list(self.users):
            op.replace_operand(self, new)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or ''} : {self.type}>"


class Argument(Value):
    """An argument of a function."""


class Result(Value):
    """The ``index``-th result of ``op``."""

    def __init__(self, op: Op, index: int, type: Type) -> None:
        super().__init__(None, type)
        self.op, self.index = op, index

    @property
    def owner(self) -> Op:
        return self.op


class Weight(Value):
    """A constant of the module. ``source`` is None when only the text of the module is known."""

    name: str

    def __init__(self, name: str, type: TensorType, source: WeightSource | None = None) -> None:
        super().__init__(name, type)
        self.source = source

    def load(self) -> np.ndarray:
        """The numbers; raises VerifyError when there are none or they do not fit the type."""
        if self.source is None:
            raise VerifyError(f"weight @{self.name} has no data: the module was read from text")
        array = self.source.load()
        if array.shape != self.shape or array.dtype != self.dtype.np:
            raise VerifyError(f"weight @{self.name}: expected {self.type}, its source gave {array.dtype}{array.shape}")
        return array

    def release(self) -> None:
        """Let go of mapped pages once the numbers were read."""
        release(self.source)


class State(Value):
    """A KV cache that outlives a call."""

    name: str


@dataclass(frozen=True)
class Field:
    """One declared field of an operation."""

    name: str
    kind: str  # "operand", "optional", "variadic" or the annotation of an attribute
    default: Any

    @property
    def is_operand(self) -> bool:
        return self.kind in ("operand", "optional", "variadic")

    @property
    def is_required(self) -> bool:
        return self.default is _REQUIRED


_REQUIRED: Any = object()
_INSTANCE = ("loc", "parent", "results")
_OPERANDS = {"Value": "operand", "Value | None": "optional", "tuple[Value, ...]": "variadic"}


@dataclass
class Env:
    """What an operation may ask for while it is interpreted."""

    dims: Mapping[str, int]
    call: Callable[[str, Sequence[Any]], Sequence[Any]] | None = None

    def dim(self, dim: Dim) -> int:
        return eval_dim(dim, self.dims)

    def shape(self, dims: Iterable[Dim]) -> tuple[int, ...]:
        return tuple(map(self.dim, dims))


class Op:
    """Base of all operations.

    A subclass declares ``name`` and annotated fields: ``Value`` is an operand, ``Value | None`` an optional one,
    ``tuple[Value, ...]`` a variadic one, anything else an attribute. It implements :meth:`infer`, :meth:`evaluate`
    and, where it does arithmetic, :meth:`flops`.
    """

    name: ClassVar[str] = ""
    fields: ClassVar[tuple[Field, ...]] = ()
    registry: ClassVar[dict[str, type[Op]]] = {}
    has_effect: ClassVar[bool] = False
    """True when the op must stay even if nothing uses its results."""

    def __init_subclass__(cls) -> None:
        fields = {f.name: f for f in cls.fields}
        for name, note in inspect.get_annotations(cls).items():
            if str(note).startswith("ClassVar"):
                continue
            if hasattr(Op, name) or name in _INSTANCE:
                raise TypeError(f"{cls.__name__}: a field cannot be called {name!r}, every operation has that")
            fields[name] = Field(name, _OPERANDS.get(str(note), str(note)), cls.__dict__.get(name, _REQUIRED))
        cls.fields = tuple(fields.values())
        if "name" in cls.__dict__ and cls.name:
            if cls.name in Op.registry:
                raise TypeError(f"operation {cls.name} is declared twice")
            Op.registry[cls.name] = cls

    def __init__(self, *args: Any, loc: Loc = UNKNOWN, **kwargs: Any) -> None:
        self.loc = loc
        self.parent: Function | None = None
        self._bind(args, kwargs)
        self.results = tuple(Result(self, i, t) for i, t in enumerate(self.infer()))
        for value in self.operands:
            value.users[self] = None

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > len(self.fields):
            raise TypeError(f"{self.name} takes {len(self.fields)} fields, got {len(args)}")
        given = dict(zip((f.name for f in self.fields), args)) | kwargs
        for f in self.fields:
            value = given.pop(f.name, f.default)
            if value is _REQUIRED:
                raise TypeError(f"{self.name} needs {f.name!r}")
            setattr(self, f.name, value if f.is_operand and f.kind != "variadic" else _normal(value, f.kind))
        if given:
            raise TypeError(f"{self.name} has no field {next(iter(given))!r}; it has {[f.name for f in self.fields]}")

    # -- to be implemented by an operation -------------------------------------------------------------------------

    def infer(self) -> tuple[Type, ...]:
        """Types of the results; calls :meth:`fail` when operands or attributes break the op's rules."""
        raise NotImplementedError(f"{self.name} declares no result types")

    def evaluate(self, env: Env, *args: Any) -> Any:
        """The meaning in NumPy: one array, or a tuple of them, for the operands in declared order (None if absent)."""
        raise NotImplementedError(f"{self.name} declares no meaning")

    def flops(self) -> Dim:
        """Floating-point operations of one evaluation."""
        return 0

    # -- the generic part ------------------------------------------------------------------------------------------

    @property
    def result(self) -> Result:
        """The only result."""
        if len(self.results) != 1:
            raise VerifyError(f"{self.name} has {len(self.results)} results, not one", self.loc)
        return self.results[0]

    @property
    def operands(self) -> list[Value]:
        """All operands that are present, in declared order."""
        return [v for v in self.operand_slots() if v is not None]

    def operand_slots(self) -> list[Value | None]:
        """Operands in declared order, variadic ones spread, absent optional ones as None."""
        out: list[Value | None] = []
        for f in self.fields:
            if f.kind == "variadic":
                out.extend(getattr(self, f.name))
            elif f.is_operand:
                out.append(getattr(self, f.name))
        return out

    @property
    def attrs(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in self.fields if not f.is_operand}

    @property
    def result_types(self) -> tuple[Type, ...]:
        return tuple(r.type for r in self.results)

    def bytes_moved(self) -> Dim:
        """Bytes read and written when every operand and result crosses memory once."""
        types = [v.type for v in (*self.operands, *self.results)]
        return as_dim(sum((t.bytes for t in types if isinstance(t, TensorType)), start=0))

    def replace_operand(self, old: Value, new: Value) -> None:
        """Take ``new`` wherever this op took ``old``."""
        for f in self.fields:
            if not f.is_operand:
                continue
            value = getattr(self, f.name)
            if f.kind == "variadic":
                setattr(self, f.name, tuple(new if v is old else v for v in value))
            elif value is old:
                setattr(self, f.name, new)
        old.users.pop(self, None)
        new.users[self] = None

    def clone(self, mapping: Mapping[Value, Value], **changes: Any) -> Op:
        """A detached copy with operands looked up in ``mapping`` and attributes replaced by ``changes``."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return mapping.get(value, value)

        given = {f.name: move(getattr(self, f.name)) if f.is_operand else getattr(self, f.name) for f in self.fields}
        return type(self)(loc=self.loc, **(given | changes))

    def drop(self) -> None:
        """Take this op out of its function; its results must have no users left."""
        if any(r.users for r in self.results):
            raise VerifyError(f"{self.name} still has users", self.loc)
        for value in self.operands:
            value.users.pop(self, None)
        if self.parent is not None:
            self.parent.body.remove(self)
            self.parent = None

    def fail(self, message: str) -> NoReturn:
        """Raise a VerifyError that names this op and its location."""
        raise VerifyError(f"{self.name}: {message}", self.loc)

    def expect(self, condition: bool, message: str) -> None:
        """Fail with ``message`` unless ``condition`` holds."""
        if not condition:
            self.fail(message)

    def __repr__(self) -> str:
        return f"<{self.name} at {self.loc.describe()}>"


def _normal(value: Any, kind: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, np.generic):
        value = value.item()  # the text form has Python's numbers only
    if kind == "tuple[int, ...]":
        return tuple(map(int, value))
    if kind == "Dim":
        return as_dim(value)
    if kind == "tuple[Dim, ...]":
        return tuple(map(as_dim, value))
    if kind == "float" and value is not None:
        return float(value)
    return value


class Return(Op):
    """The last op of a function: its results."""

    name = "return"
    has_effect = True
    values: tuple[Value, ...]

    def infer(self) -> tuple[Type, ...]:
        return ()

    def evaluate(self, env: Env, *values: Any) -> Any:
        return ()


class Function:
    """A list of operations over arguments. ``kind`` is ``func``, or ``kernel`` for a region that fusion cut out."""

    def __init__(self, name: str, args: Sequence[Argument] = (), kind: str = "func") -> None:
        self.name, self.kind = name, kind
        self.args = list(args)
        self.body: list[Op] = []

    def arg(self, name: str, type: Type) -> Argument:
        """Add an argument."""
        self.args.append(Argument(name, type))
        return self.args[-1]

    @property
    def terminator(self) -> Return:
        if not self.body or not isinstance(self.body[-1], Return):
            raise VerifyError(f"function @{self.name} does not end in a return")
        return self.body[-1]

    @property
    def returns(self) -> tuple[Value, ...]:
        return self.terminator.values

    def append(self, op: Op) -> Op:
        return self.insert(len(self.body), op)

    def insert(self, index: int, op: Op) -> Op:
        if op.parent is not None:
            raise VerifyError(f"{op.name} is already in function @{op.parent.name}", op.loc)
        op.parent = self
        self.body.insert(index, op)
        return op

    def symbols(self) -> list[str]:
        """Names of the symbolic dimensions in the signature and the body, sorted."""
        found: set[str] = set()
        for value in [*self.args, *(r for op in self.body for r in op.results)]:
            if isinstance(value.type, TensorType):
                found |= dim_symbols(value.shape)
        for op in self.body:
            for attr in op.attrs.values():
                dims = attr if isinstance(attr, tuple) else (attr,)
                found |= dim_symbols([d for d in dims if hasattr(d, "free_symbols")])
        return sorted(found)

    def walk(self, *kinds: type[Op]) -> Iterator[Op]:
        """The operations (of the given classes) as they stand now; safe against changes while iterating."""
        for op in list(self.body):
            if op.parent is self and (not kinds or isinstance(op, kinds)):
                yield op


@dataclass(eq=False)
class Module:
    """Functions, weights, states and the ranges of symbolic dimensions.

    ``meta`` holds what later stages ask about the model (task, token input, ...); it is kept in the text form.
    """

    name: str
    functions: dict[str, Function] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    dims: dict[str, tuple[int, int]] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    def add(self, function: Function) -> Function:
        if function.name in self.functions:
            raise VerifyError(f"function @{function.name} exists already")
        self.functions[function.name] = function
        return function

    def weight(self, name: str, type: TensorType, source: WeightSource | None = None) -> Weight:
        """Add a weight; raises VerifyError when the name is taken."""
        if name in self.weights or name in self.states:
            raise VerifyError(f"@{name} exists already")
        self.weights[name] = Weight(name, type, source)
        return self.weights[name]

    def state(self, name: str, type: KVType) -> State:
        """Add a KV cache; raises VerifyError when the name is taken."""
        if name in self.weights or name in self.states:
            raise VerifyError(f"@{name} exists already")
        self.states[name] = State(name, type)
        return self.states[name]

    def constant(self, array: np.ndarray, name: str) -> Weight:
        """A weight that holds ``array``, under ``name`` or ``name.1``, ``name.2``, ... when that is taken."""
        unique, n = name, 0
        while unique in self.weights or unique in self.states:
            n += 1
            unique = f"{name}.{n}"
        kept = np.ascontiguousarray(array).reshape(array.shape)
        return self.weight(unique, TensorType(array.shape, DType.of(array.dtype)), ArraySource(kept))

    def ops(self, *kinds: type[Op]) -> Iterator[Op]:
        """Operations of all functions."""
        for function in list(self.functions.values()):
            yield from function.walk(*kinds)

    def kernels(self) -> list[Function]:
        return [f for f in self.functions.values() if f.kind == "kernel"]

    def entries(self) -> list[Function]:
        """The functions a user can call."""
        return [f for f in self.functions.values() if f.kind == "func"]

    def __eq__(self, other: object) -> bool:
        from tilewright.ir.compare import difference

        return isinstance(other, Module) and difference(self, other) is None

    __hash__ = None  # type: ignore[assignment]
