"""Error of each layer against the reference: the interpreter on the model as it was traced.

Values are matched by source location, element type and shape, where a sequence of tokens may have become a part of it (a
prefill, a decode step); layers that a pass reshaped otherwise are compared only by their kernels. Runs the interpreter
on a sample: slow for large models, and only on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from tilewright.bisect import Inputs, compiled_kernels, difference, flat, kernel_runs, probe
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Module, Op, interpret

Row = dict[str, Any]
Array = np.ndarray[Any, Any]
_TOKENS = 32


def layer_errors(before: Module, after: Module, target: CpuTarget, inputs: Inputs) -> list[Row]:
    """One row a kernel call of the sample, in order.

    ``layer``: module path; ``operations``: of the kernel; ``error``: of the value that the passes made, relative to the
    largest magnitude of the traced model's (None when no value matches); ``kernel_error``: of the compiled kernel
    against the interpreter on the same operands. ``before`` is the traced module, ``after`` the one cut into kernels.
    """
    known: dict[str, list[Array]] = {}

    def remember(op: Op, results: Sequence[Any]) -> None:
        for value in results:
            if isinstance(value, np.ndarray):
                known.setdefault(op.loc.module, []).append(value)

    probe(before, inputs, partial(interpret, before, observer=remember))
    execute = compiled_kernels(target)
    rows = []
    for run in kernel_runs(after, inputs):
        results = flat(run.results)
        same = [part for old in known.get(run.op.loc.module, []) for part in parts(old, results[0])]
        rows.append({
            "layer": run.op.loc.module,
            "operations": " ".join(op.name for op in run.kernel.body[:-1]),
            "error": min((difference(old, results[0]) for old in same), default=None),
            "kernel_error": max(map(difference, results, flat(execute(run))), default=0.0),
        })  # fmt: skip
    return rows


def sample_of(batches: Sequence[Inputs] | None) -> Inputs | None:
    """The first two rows of calibration data, with as many tokens of them as stay quick to interpret."""
    if not batches:
        return None
    return {name: array[:2, :_TOKENS] if array.ndim > 1 and array.dtype.kind in "iub" else array[:2]
            for name, array in batches[0].items()}  # fmt: skip


def parts(old: Array, new: Array) -> list[Array]:
    """What of ``old`` may be the counterpart of ``new``: all of it, or as many neighbouring tokens (axis 1)."""
    if old.dtype != new.dtype or old.ndim != new.ndim:
        return []
    if old.shape == new.shape:
        return [old]
    if old.ndim < 2 or old.shape[:1] + old.shape[2:] != new.shape[:1] + new.shape[2:]:
        return []
    count = new.shape[1]
    return [old[:, i : i + count] for i in range(old.shape[1] - count + 1)]
