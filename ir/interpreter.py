"""Runs a module in NumPy. This is the definition of what the IR means; every pass and backend is checked against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tilewright.ir.caches import origin
from tilewright.ir.core import Env, Function, Module, Op, Return, State, Value, Weight
from tilewright.ir.errors import InterpreterError, TilewrightError, VerifyError
from tilewright.ir.kv_kept import NOTES
from tilewright.ir.ops.kernel import Call
from tilewright.ir.types import Dim, KVType, TensorType, dim_symbols, dim_text, eval_dim

Array = np.ndarray[Any, Any]
Cache = tuple[Array, ...]
"""K and V, and the notes on kept tokens."""
Observer = Callable[[Op, Sequence[Any]], None]


def empty_states(module: Module, batch: int, pages: int | None = None) -> dict[str, Cache]:
    """Zeroed KV caches for ``batch`` sequences: name -> (K, V), of kept tokens also the notes on them.

    A pool has ``pages``; none is all that they may need.
    """
    return {name: _empty(s.cache, batch, pages) for name, s in module.states.items()}


def _empty(t: KVType, batch: int, pages: int | None) -> Cache:
    own = (batch * t.pages if pages is None else pages, t.page) if t.page else (batch, t.slots)
    notes = [np.zeros((batch, t.heads, NOTES, t.slots), np.float32)] if t.budget else []
    return np.zeros((*own, t.heads, t.dim), t.held.np), np.zeros((*own, t.heads, t.own_vdim), t.held.np), *notes


def interpret(
    module: Module,
    function: str,
    inputs: Mapping[str, Array] | Sequence[Array],
    states: dict[str, Cache] | None = None,
    observer: Observer | None = None,
    dims: Mapping[str, int] | None = None,
) -> list[Array]:
    """Run ``function`` on ``inputs`` (by name or in order) and give its results.

    ``states`` is updated in place with the caches the function leaves. ``observer`` sees every operation with its
    results. ``dims`` are the sizes of symbols that no input tells. Raises InterpreterError for inputs that do not fit and
    for an operation that fails, naming it.
    """
    if function not in module.functions:
        raise InterpreterError(f"there is no function @{function}; there are {', '.join(module.functions)}")
    target = module.functions[function]
    values = _ordered(target, inputs)
    run = _Run(module, states if states is not None else {}, observer)
    return run.function(target, values, dims)


def _ordered(function: Function, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Any]:
    if not isinstance(inputs, Mapping):
        values = list(inputs)
    else:
        missing = [a.name for a in function.args if a.name not in inputs]
        unknown = set(inputs) - {a.name for a in function.args}
        if missing or unknown:
            raise InterpreterError(f"@{function.name}: missing inputs {missing}, unknown inputs {sorted(unknown)}")
        values = [inputs[a.name or ""] for a in function.args]
    if len(values) != len(function.args):
        raise InterpreterError(f"@{function.name} takes {len(function.args)} inputs, got {len(values)}")
    return values


def bind_dims(args: Sequence[Value], values: Sequence[Any]) -> dict[str, int]:
    """The sizes of the symbolic dims that ``values`` give; raises InterpreterError when a value does not fit."""
    env: dict[str, int] = {}
    later: list[tuple[str, Dim, int]] = []
    for arg, value in zip(args, values):
        if not isinstance(arg.type, TensorType):
            continue
        if not isinstance(value, np.ndarray) or value.dtype != arg.dtype.np or value.ndim != arg.type.rank:
            got = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
            raise InterpreterError(f"input {arg.name}: expected {arg.type}, got {got}")
        for dim, size in zip(arg.shape, value.shape):
            if not isinstance(dim, int) and dim.is_Symbol:
                env.setdefault(str(dim), size)
            later.append((f"{arg.name}", dim, size))
    for name, dim, size in later:
        expected = _size(dim, env)
        if expected not in (None, size):
            raise InterpreterError(f"input {name}: expected size {dim_text(dim)}={expected}, got {size}")
    return env


def _size(dim: Dim, env: Mapping[str, int]) -> int | None:
    """The value of ``dim``; None when ``env`` lacks one of its symbols."""
    return eval_dim(dim, env) if dim_symbols([dim]) <= env.keys() else None


def _check(op: Op, results: Sequence[Any], env: Env) -> None:
    """Raise InterpreterError when what an operation computed is not of its result types."""
    if len(results) != len(op.results):
        raise InterpreterError(f"{op.name}: computed {len(results)} results, it has {len(op.results)}", op.loc)
    for i, (type, value) in enumerate(zip(op.result_types, results)):
        if not isinstance(type, TensorType):
            continue
        sizes = [_size(d, env.dims) for d in type.shape]
        fits = value.ndim == len(sizes) and all(n in (None, got) for n, got in zip(sizes, value.shape))
        if value.dtype != type.dtype.np or not fits:
            got = f"{value.dtype}{list(value.shape)}"
            raise InterpreterError(f"{op.name}: result {i} is {got}, its type is {type} with {dict(env.dims)}", op.loc)


@contextmanager
def _naming(op: Op) -> Iterator[None]:
    """Errors inside become InterpreterErrors that name ``op``."""
    try:
        yield
    except VerifyError as error:
        raise InterpreterError(error.message, error.loc or op.loc) from error
    except TilewrightError:
        raise
    except Exception as error:
        raise InterpreterError(f"{op.name}: {type(error).__name__}: {error}", op.loc) from error


def evaluate(op: Op, env: Env, args: Sequence[Any]) -> list[Any]:
    """Results of one operation on the values of its operand slots; raises InterpreterError that names it."""
    with _naming(op), np.errstate(all="ignore"):
        out = op.evaluate(env, *args)
    found = out if len(op.results) != 1 or isinstance(op, Call) else (out,)
    # np.asarray: NumPy gives scalars where the IR has tensors of rank 0
    results = [v if isinstance(r.type, KVType) else np.asarray(v) for r, v in zip(op.results, found)]
    _check(op, results, env)
    return results


class _Run:
    def __init__(self, module: Module, states: dict[str, Cache], observer: Observer | None) -> None:
        self.module, self.states, self.observer = module, states, observer

    def function(self, function: Function, values: Sequence[Any], outer: Mapping[str, int] | None = None) -> list[Any]:
        env = Env({**(outer or {}), **bind_dims(function.args, values)}, None)
        env.call = lambda name, args: self.function(self.module.functions[name], args, env.dims)
        known: dict[Value, Any] = dict(zip(function.args, values))
        left: dict[Value, int] = {v: len(v.users) for op in function.body for v in op.results}
        for op in function.body:
            if isinstance(op, Return):
                return [self.look_up(known, v) for v in op.values]
            known.update(zip(op.results, self.step(op, env, known)))
            for value in left.keys() & set(op.operands):  # users counts an op once, even if it takes a value twice
                left[value] -= 1
            for value in (*op.operands, *op.results):
                if left.get(value) == 0:
                    known.pop(value, None)
        raise InterpreterError(f"@{function.name} has no return")

    def step(self, op: Op, env: Env, known: dict[Value, Any]) -> Sequence[Any]:
        with _naming(op):
            args = [None if v is None else self.look_up(known, v) for v in op.operand_slots()]
        results = evaluate(op, env, args)
        self.keep_states(op, results)
        if self.observer:
            self.observer(op, results)
        return results

    def look_up(self, known: dict[Value, Any], value: Value) -> Any:
        if isinstance(value, Weight):
            return value.load()
        if isinstance(value, State):
            if value.name not in self.states:
                raise InterpreterError(f"no cache was given for state @{value.name}")
            return self.states[value.name]
        return known[value]

    def keep_states(self, op: Op, results: Sequence[Any]) -> None:
        """A cache that an op makes from a state is the state's new content."""
        for result, value in zip(op.results, results):
            state = origin(self.module, result) if isinstance(result.type, KVType) else None
            if isinstance(state, State):
                self.states[state.name] = value
