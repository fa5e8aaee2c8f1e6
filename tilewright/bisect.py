"""Which pass changed what a model computes, and at which operation.

The interpreter runs the module on the same inputs before the first pass and after each one; the first pass whose
results leave the tolerance is the culprit. Comparing the values before and after that pass, matched by source location
and type, names the operation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.ir import (
    Function,
    Loc,
    Module,
    Op,
    State,
    Value,
    Weight,
    empty_states,
    eval_dim,
    interpret,
    ops,
    parse_module,
    print_module,
)
from tilewright.ir.interpreter import bind_dims
from tilewright.passes.pipeline import Pipeline

if TYPE_CHECKING:
    from tilewright.codegen.target import CpuTarget

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]
Run = Callable[[str, Sequence[Array], dict[str, Any]], Sequence[Array]]
"""Calls an entry, by name, on arrays and caches."""

_STEPS = 3  # tokens of the sample that are decoded one at a time


@dataclass(frozen=True)
class Culprit:
    """What broke: a ``pass`` or a ``kernel``, by name; ``error`` is relative to the largest value of the result."""

    stage: str
    name: str
    before: tuple[str, ...]
    error: float
    tolerance: float
    op: str | None = None
    loc: Loc | None = None
    op_error: float = 0.0

    def __str__(self) -> str:
        after = f" (after {', '.join(self.before)})" if self.before else ""
        lines = [
            f"{self.stage} {self.name}{after}: the result differs by {self.error:.3g}, allowed {self.tolerance:.3g}"
        ]
        if self.op is not None and self.loc is not None:
            lines.append(f"  first at {self.op}, {self.loc.describe()}: differs by {self.op_error:.3g}")
        return "\n".join(lines)


def bisect(module: Module, pipeline: Pipeline | str, inputs: Inputs, tolerance: float = 1e-3) -> Culprit | None:
    """The first pass after which ``module`` computes something else, or None.

    ``inputs`` are those of ``@forward``, by name. ``module`` is left as it is. An error is the largest difference
    over the largest magnitude of a result.
    """
    pipeline = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    want = probe(module, inputs)
    changed = copy_of(module)
    for i, p in enumerate(pipeline.passes):
        Pipeline((p,)).run(changed)
        error = largest_error(want, probe(changed, inputs))
        if error > tolerance:
            before = copy_of(module)
            Pipeline(pipeline.passes[:i]).run(before)
            found = first_difference(before, changed, inputs, tolerance)
            names = tuple(map(str, pipeline.passes[:i]))
            return Culprit("pass", str(p), names, error, tolerance, *(found or ()))
    return None


def copy_of(module: Module) -> Module:
    """A copy that shares the numbers of the weights."""
    copy = parse_module(print_module(module))
    for name, weight in module.weights.items():
        copy.weights[name].source = weight.source
    return copy


def probe(module: Module, inputs: Inputs, run: Run | None = None) -> list[Array]:
    """Results of the module on the inputs of its ``@forward``, also when a pass made prefill and decode of that.

    A causal language model gives its last few logits, computed in one go or token by token. ``run`` calls an entry; the
    interpreter does by default.
    """
    run = run or partial(interpret, module)
    token_input = module.meta.get("token_input", "")
    if "forward" not in module.functions:
        ids = inputs[token_input] if token_input in inputs else next(iter(inputs.values()))
        return [_generate(run, ids, empty_states(module, len(ids)))]
    results = list(run("forward", [inputs[a.name or ""] for a in module.functions["forward"].args], {}))
    if module.meta.get("task") != "causal-lm" or len(inputs) != 1:
        return results
    names = json.loads(module.meta.get("outputs", "[]"))
    logits = results[names.index(module.meta["logits"]) if module.meta.get("logits") in names else 0]
    return [logits[:, -min(_STEPS + 1, logits.shape[1]) :]]


def _generate(run: Run, ids: Array, states: dict[str, Any]) -> Array:
    """Logits of the last tokens, all but the first of them from decode steps."""
    batch, length = ids.shape
    prompt = length - min(_STEPS, length - 1)
    ones = np.ones(batch, np.int64)
    steps = list(run("prefill", [ids[:, :prompt], 0 * ones, (prompt - 1) * ones], states))
    for at in range(prompt, length):
        steps += run("decode", [ids[:, at : at + 1], at * ones], states)
    return np.stack(steps, 1)


def largest_error(want: Sequence[Array], got: Sequence[Array]) -> float:
    """Largest difference of any result over its largest magnitude; infinite when shapes, types or NaNs differ."""
    if len(want) != len(got):
        return np.inf
    return max(map(difference, want, got), default=0.0)


def difference(want: Array, got: Array) -> float:
    """Largest difference of two arrays over the largest finite magnitude of the first."""
    if want.shape != got.shape:
        return np.inf
    a, b = (np.asarray(x, np.float64) for x in (want, got))
    known = np.isfinite(a)
    if not np.array_equal(a[~known], b[~known], equal_nan=True) or not np.isfinite(b[known]).all():
        return np.inf
    top = float(np.abs(a[known]).max(initial=0.0))
    return float(np.abs(a[known] - b[known]).max(initial=0.0)) / (top or 1.0)


def first_difference(before: Module, after: Module, inputs: Inputs, tolerance: float) -> tuple[str, Loc, float] | None:
    """The first operation of ``after`` that no longer gives a value of the same location and type in ``before``."""
    known: dict[tuple[Loc, str, tuple[int, ...]], list[Array]] = {}

    def key(op: Op, value: Array) -> tuple[Loc, str, tuple[int, ...]]:
        return op.loc, value.dtype.name, value.shape

    def remember(op: Op, results: Sequence[Any]) -> None:
        for value in results:
            if isinstance(value, np.ndarray):
                known.setdefault(key(op, value), []).append(value)

    found: list[tuple[str, Loc, float]] = []

    def compare(op: Op, results: Sequence[Any]) -> None:
        for value in results:
            same = known.get(key(op, value), []) if isinstance(value, np.ndarray) and not found else []
            error = min((difference(old, value) for old in same), default=0.0)
            if error > tolerance:
                found.append((op.name, op.loc, error))

    probe(before, inputs, partial(interpret, before, observer=remember))
    probe(after, inputs, partial(interpret, after, observer=compare))
    return found[0] if found else None


# ---- kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelRun:
    """One call of a kernel in the interpreter: what went in and what came out. A cache is a pair of arrays."""

    op: ops.Call
    kernel: Function
    dims: dict[str, int]
    operands: tuple[Any, ...]
    results: tuple[Any, ...]


Execute = Callable[[KernelRun], Sequence[Any]]
"""Runs the compiled kernel of a call on its operands and gives the results; it must not change the operands."""


def bisect_kernels(module: Module, inputs: Inputs, execute: Execute, tolerance: float = 1e-3) -> Culprit | None:
    """The first kernel whose compiled code gives something else than the interpreter on the same operands, or None.

    ``module`` has been cut into kernels; ``inputs`` are those of its former ``@forward``.
    """
    for run in kernel_runs(module, inputs):
        want, got = flat(run.results), flat(execute(run))
        error = largest_error(want, got)
        if error > tolerance:
            names = " ".join(op.name for op in run.kernel.body[:-1])
            return Culprit("kernel", run.kernel.name, (), error, tolerance, names, run.op.loc, error)
    return None


def flat(values: Sequence[Any]) -> list[Array]:
    """Arrays, with caches taken apart."""
    return [x for v in values for x in (v if isinstance(v, tuple) else (v,))]


def kernel_runs(module: Module, inputs: Inputs) -> list[KernelRun]:
    """Every kernel call on a sample, in order."""
    runs: list[KernelRun] = []

    def record(entry: str, args: Sequence[Array], states: dict[str, Any]) -> Sequence[Array]:
        function = module.functions[entry]
        known: dict[Value, Any] = dict(zip(function.args, args))
        dims, caches = bind_dims(function.args, args), dict(states)

        def operand(value: Value) -> Any:
            if isinstance(value, Weight):
                return value.load()
            return caches[value.name] if isinstance(value, State) else known[value]

        def observer(op: Op, results: Sequence[Any]) -> None:
            if op.parent is not function:
                return
            if isinstance(op, ops.Call):
                operands = tuple(map(operand, op.operands))
                runs.append(KernelRun(op, module.functions[op.callee], dims, operands, tuple(results)))
            known.update(zip(op.results, results))
            caches.update(states)

        return interpret(module, entry, args, states, observer)

    probe(module, inputs, record)
    return runs


# ---- the command line ----------------------------------------------------------------------------------------------


def bisect_folder(
    model: str | os.PathLike[str],
    passes: str = "O2",
    target: str = "native",
    dtype: str | None = None,
    tolerance: float = 1e-3,
    tokens: int = 16,
    seed: int = 0,
) -> Culprit | None:
    """The first pass, or else kernel, that breaks the model in a folder, on random inputs of ``tokens`` tokens."""
    from tilewright.compiler import trace

    module, _ = trace(model, (), None, None, dtype)
    return bisect_all(module, Pipeline.parse(passes), target, random_inputs(module, tokens, seed), tolerance)


def bisect_all(
    module: Module, pipeline: Pipeline, target: str, inputs: Inputs, tolerance: float = 1e-3
) -> Culprit | None:
    """:func:`bisect`, and when no pass is to blame, each compiled kernel against the interpreter."""
    from tilewright.codegen.target import parse_cpu

    found = bisect(module, pipeline, inputs, tolerance)
    if found is not None:
        return found
    lowered = copy_of(module)
    pipeline.run(lowered)
    return bisect_kernels(lowered, inputs, compiled_kernels(parse_cpu(target)), tolerance)


def compiled_kernels(target: CpuTarget) -> Execute:
    """Runs kernels compiled for ``target`` on this host, each compiled once."""
    from tilewright.codegen.standalone import StandaloneKernel

    known: dict[str, StandaloneKernel] = {}

    def execute(run: KernelRun) -> Sequence[Any]:
        kernel = known.get(run.kernel.name) or known.setdefault(run.kernel.name, StandaloneKernel(run.kernel, target))
        return kernel(run.operands, run.dims)

    return execute


def random_inputs(module: Module, tokens: int, seed: int = 0) -> dict[str, Array]:
    """Inputs for ``@forward``: tokens in the vocabulary, masks of ones, normal floats; a batch of two."""
    rng = np.random.default_rng(seed)
    vocabulary = int(module.meta.get("vocab_size", "2"))
    sizes = {name: min(max(2 if name == "B" else tokens, low), high) for name, (low, high) in module.dims.items()}
    found: dict[str, Array] = {}
    for arg in module.functions["forward"].args:
        shape = [eval_dim(d, sizes) for d in arg.shape]
        if arg.dtype.is_float:
            found[arg.name or ""] = rng.standard_normal(shape).astype(arg.dtype.np)
        elif "mask" in (arg.name or ""):
            found[arg.name or ""] = np.ones(shape, arg.dtype.np)
        else:
            found[arg.name or ""] = rng.integers(0, vocabulary, shape).astype(arg.dtype.np)
    return found
