"""What a kernel should give, by the IR interpreter on the same inputs; ``runtime/tolerance.py`` says whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.emitters import pack
from tilewright.codegen.target import CpuTarget
from tilewright.ir import DType, Function, KVType, interpret, ops
from tilewright.measuring_inputs import Operand, Subject
from tilewright.measuring_sampled import sample
from tilewright.runtime.tolerance import Expected

_WIDEST = (DType.bf16, DType.f16, DType.f32, DType.f64)  # the first that a kernel has is its narrowest


def narrowest(kernel: Function) -> DType:
    """The narrowest float that the kernel computes with; scales of codes are only read."""
    values = [*kernel.args, *(r for op in kernel.body for r in op.results)]
    scales = {op.scale for op in kernel.body if isinstance(op, (ops.Dequantize, ops.Lookup))}
    scales |= {op.table for op in kernel.body if isinstance(op, ops.Lookup)}
    found = {v.dtype for v in values if v not in scales}
    return next((d for d in _WIDEST if d in found), DType.f32)


def precision(subject: Subject) -> str:
    """What a result's allowance is that of: on CPUs queries meet codes of a cache, and weights values, as 8 bits."""
    attends = [op for op in subject.kernel.body if isinstance(op, ops.Attend)]
    rounds = isinstance(subject.target, CpuTarget) and any(op.cache.cache.is_coded for op in attends)
    return "i8" if rounds else narrowest(subject.kernel).value


def reference(subject: Subject, inputs: Sequence[Operand]) -> list[Operand]:
    """The kernel's results by the interpreter. Raises InterpreterError for inputs that an operation cannot take."""
    kernel = subject.kernel
    return list(interpret(subject.module, kernel.name, list(inputs), dims=subject.dims))


def expected(subject: Subject, inputs: Sequence[Operand]) -> list[tuple[Expected, ...]]:
    """The results ready to be compared with what kernels give: one for a tensor, those of K and V for a cache.

    Of a very large linear layer they are known in part: see ``measuring_sampled``. Raises InterpreterError.
    """
    if part := sample(subject):
        (result,) = reference(part.subject, part.inputs(inputs))
        known, shape = Expected.of(result, precision(subject)), subject.shape(subject.kernel.returns[0])
        return [(replace(known, shape=shape, features=part.features),)]
    return _all(subject, inputs, reference(subject, inputs))


def _all(subject: Subject, inputs: Sequence[Operand], results: Sequence[Any]) -> list[tuple[Expected, ...]]:
    kernel, narrow = subject.kernel, precision(subject)
    codes = any(isinstance(op, ops.Quantize) for op in kernel.body)
    found: list[tuple[Expected, ...]] = []
    changed = subject.changed()
    for i, (value, result) in enumerate(zip(kernel.returns, results)):
        if isinstance(value.type, KVType):
            layout, memory = subject.layout(value), subject.cache_after(changed[i], inputs, result)
            coded = layout.coded if isinstance(layout, CudaCacheLayout) else (None,) * len(memory)
            found.append(tuple(Expected.of(a, narrow, coded=rows) for a, rows in zip(memory, coded)))
        else:
            found.append((Expected.of(pack(result, "", value.dtype), narrow, codes and value.dtype is DType.i8),))
    return found
