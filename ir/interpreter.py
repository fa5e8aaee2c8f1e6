"""Runs a module in NumPy. This is the definition of what the IR means; every pass and backend is checked against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.ir.core import Env, Function, Module, Op, Return, State, Value, Weight
from tilewright.ir.errors import InterpreterError, TilewrightError
from tilewright.ir.types import Dim, KVType, TensorType

Array = np.ndarray[Any, Any]
Cache = tuple[Array, Array]
Observer = Callable[[Op, Sequence[Any]], None]


def empty_states(module: Module, batch: int) -> dict[str, Cache]:
    """Zeroed KV caches for ``batch`` sequences: name -> (K, V)."""
    return {name: _empty(s.cache, batch) for name, s in module.states.items()}


def _empty(t: KVType, batch: int) -> Cache:
    shape = (batch, t.length, t.heads)
    return np.zeros((*shape, t.dim), t.dtype.np), np.zeros((*shape, t.vdim), t.dtype.np)


def interpret(
    module: Module,
    function: str,
    inputs: Mapping[str, Array] | Sequence[Array],
    states: dict[str, Cache] | None = None,
    observer: Observer | None = None,
) -> list[Array]:
    """Run ``function`` on ``inputs`` (by name or in order) and give its results.

    ``states`` is updated in place with the caches the function leaves. ``observer`` sees every operation with its
    results. Raises InterpreterError for inputs that do not fit and for an operation that fails, naming it.
    """
    if function not in module.functions:
        raise InterpreterError(f"there is no function @{function}; there are {', '.join(module.functions)}")
    target = module.functions[function]
    values = _ordered(target, inputs)
    run = _Run(module, states if states is not None else {}, observer)
    return run.function(target, values)


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
    """The sizes of the symbolic dims that ``values`` give; raises InterpreterError when a value does not fit its type."""
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
        symbols = set() if isinstance(dim, int) else {str(s) for s in dim.free_symbols}
        if symbols <= set(env) and Env(env).dim(dim) != size:
            raise InterpreterError(f"input {name}: expected size {dim}={Env(env).dim(dim)}, got {size}")
    return env


class _Run:
    def __init__(self, module: Module, states: dict[str, Cache], observer: Observer | None) -> None:
        self.module, self.states, self.observer = module, states, observer

    def function(self, function: Function, values: Sequence[Any], outer: Mapping[str, int] | None = None) -> list[Any]:
        env = Env({**(outer or {}), **bind_dims(function.args, values)}, None)
        env.call = lambda name, args: self.function(self.module.functions[name], args, env.dims)
        known: dict[Value, Any] = dict(zip(function.args, values))
        left = {v: len(v.users) for op in function.body for v in op.results}
        for op in function.body:
            if isinstance(op, Return):
                return [self.look_up(known, v) for v in op.values]
            results = self.step(op, env, known)
            known.update(zip(op.results, results))
            for value in set(op.operands) & left.keys():
                left[value] -= 1
                if not left[value]:
                    known.pop(value, None)
        raise InterpreterError(f"@{function.name} has no return")

    def step(self, op: Op, env: Env, known: dict[Value, Any]) -> Sequence[Any]:
        try:
            args = [None if v is None else self.look_up(known, v) for v in op.slots()]
            out = op.evaluate(env, *args)
        except TilewrightError:
            raise
        except Exception as error:
            raise InterpreterError(f"{op.name}: {type(error).__name__}: {error}", op.loc) from error
        results = out if len(op.results) != 1 or op.name == "kernel.call" else (out,)
        self.keep_states(op, results)
        if self.observer:
            self.observer(op, results)
        return list(results)

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
        sources = [v for v in op.operands if isinstance(v.type, KVType)]
        for source, (result, value) in zip(sources, [p for p in zip(op.results, results) if isinstance(p[0].type, KVType)]):
            state = self.origin(source)
            if state is not None and isinstance(result.type, KVType):
                self.states[state.name] = value

    def origin(self, value: Value) -> State | None:
        """The state that a cache value started as."""
        while not isinstance(value, State):
            if value.owner is None:
                return None
            value = next(v for v in value.owner.operands if isinstance(v.type, KVType))
        return value
