"""The calibration data that a compilation was given, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tilewright.ir import Function, InterpreterError, Module, PassError, State, ops
from tilewright.ir.interpreter import bind_dims
from tilewright.passes.base import PassContext

Array: TypeAlias = "np.ndarray[Any, Any]"
Batch: TypeAlias = Mapping[str, Array]
OPTION, FUNCTION = "calibration", "forward"
FEWEST = 128  # tokens below which statistics of channels say more about the sample than about the model
REMEDY = "compile(calibration=[{...}]) with the inputs of @forward by name, or --calibration FILE on the command line"


def calibration(module: Module, ctx: PassContext, why: str) -> tuple[Function, list[Batch]]:
    """The function that calibration runs and its inputs, a mapping a micro-batch.

    ``why`` says what asks for them. Raises PassError when there are none, when they do not fit the function, or when they
    are fewer than 128 tokens.
    """
    batches = listed(ctx, why)
    function = runnable(module, why)
    check(function, module, batches, why)
    return function, batches


def check(function: Function, module: Module, batches: Sequence[Batch], why: str) -> None:
    """Raise PassError when ``batches`` are not what ``function`` takes, or fewer than 128 tokens."""
    for i, batch in enumerate(batches):
        _check(function, module, batch, f"calibration data, entry {i}")
    tokens = sum(map(rows, batches))
    if tokens < FEWEST:
        raise PassError(f"the calibration data are {tokens} tokens; {why} needs {FEWEST} or more, better thousands")


def listed(ctx: PassContext, why: str) -> list[Batch]:
    """What was given, not checked yet."""
    given = ctx.options.get(OPTION)
    if given is None:
        raise PassError(f"{why} needs calibration data; give them with {REMEDY}")
    if isinstance(given, Mapping) or not isinstance(given, Sequence) or not all(isinstance(b, Mapping) for b in given):
        raise PassError(f"calibration data are a list of mappings from names to arrays, got {type(given).__name__}")
    if not given:
        raise PassError(f"the calibration data are empty; give them with {REMEDY}")
    return list(given)


def runnable(module: Module, why: str) -> Function:
    """The function that calibration runs; raises PassError when it has caches, or is cut into kernels."""
    function = module.functions.get(FUNCTION)
    states = function is not None and any(isinstance(v, State) for op in function.body for v in op.operands)
    if function is None or states or any(function.walk(ops.Call)):
        raise PassError(f"{why} runs the stateless @{FUNCTION}: it must stand before kv-layout and fuse in the pipeline")
    return function


def _check(function: Function, module: Module, batch: Batch, where: str) -> None:
    """Raise PassError when ``batch`` is not what ``function`` takes."""
    names = [a.name or "" for a in function.args]
    if set(batch) != set(names):
        raise PassError(f"{where} has {sorted(batch)}; @{function.name} takes {sorted(names)}")
    values = [batch[n] for n in names]
    try:
        sizes = bind_dims(function.args, values)
    except InterpreterError as error:
        raise PassError(f"{where}: {error.message}") from error
    if not all(v.size for v in values):
        raise PassError(f"{where} is empty: {', '.join(f'{n}{list(v.shape)}' for n, v in zip(names, values))}")
    for dim, size in sizes.items():
        low, high = module.dims.get(dim, (size, size))
        if not low <= size <= high:
            raise PassError(f"{where}: {dim} is {size}; the model was traced for {low} to {high}")
    for name, value in zip(names, values):
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise PassError(f"{where}: {name} has numbers that are NaN or infinite")


def rows(batch: Batch) -> int:
    """Tokens of a micro-batch: ids, or rows of the largest input when none is of integers."""
    ids = [v.size for v in batch.values() if np.issubdtype(v.dtype, np.integer)]
    return max(ids or [v.size // v.shape[-1] if v.ndim else 1 for v in batch.values()])
