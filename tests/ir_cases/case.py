"""One row of the table, and how it is run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tilewright.ir import DType, Function, Module, Op, Return, TensorType, interpret, parse_module, print_module, verify

FLOATS = (DType.f32, DType.bf16)
INTS = (DType.i64, DType.i32)
Make = Callable[[np.random.Generator, DType], np.ndarray]


@dataclass(frozen=True)
class Case:
    """``kind`` on random ``inputs`` with ``attrs`` gives what ``expected`` gives on the same data as torch tensors.

    An input is made by a function of a random generator and the element type; None is an absent operand and a list a
    variadic one. Narrow floats reach ``expected`` as f32, and its results are rounded back.
    """

    kind: Any
    inputs: Sequence[Any]
    expected: Callable[..., Any]
    attrs: dict[str, Any] = field(default_factory=dict)
    dtypes: Sequence[DType] = FLOATS
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.kind.name}{'-' + self.note if self.note else ''}"


def normal(*shape: int, scale: float = 1.0) -> Make:
    return lambda rng, dtype: (rng.standard_normal(shape) * scale).astype(dtype.np)


def positive(*shape: int) -> Make:
    return lambda rng, dtype: rng.uniform(0.1, 3.0, shape).astype(dtype.np)


def integers(*shape: int, low: int = -9, high: int = 10, dtype: DType | None = None) -> Make:
    """Integers in ``[low, high)``, of the case's element type unless ``dtype`` says otherwise."""
    return lambda rng, own: rng.integers(low, high, shape).astype((dtype or own).np)


def flags(*shape: int) -> Make:
    return lambda rng, dtype: rng.integers(0, 2, shape).astype(bool)


def distinct(*shape: int) -> Make:
    """A permutation, small enough to be exact in bf16: ordering it has one answer."""
    return lambda rng, dtype: (rng.permutation(int(np.prod(shape))) - 9).reshape(shape).astype(dtype.np)


def fixed(values: Any, dtype: DType | None = None) -> Make:
    return lambda rng, own: np.asarray(values).astype((dtype or own).np)


def f32(make: Make) -> Make:
    """The same data as f32 whatever the case's element type is."""
    return lambda rng, dtype: make(rng, DType.f32)


def evaluate(kind: type[Op], *operands: Any, **attrs: Any) -> list[np.ndarray]:
    """Interpret one operation, as a module that went through its text form."""
    f = Function("f")

    def value(x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, (list, tuple)):
            return tuple(map(value, x))
        return f.arg(f"x{len(f.args)}", TensorType(x.shape, DType.of(x.dtype)))

    op = f.append(kind(*map(value, operands), **attrs))
    f.append(Return(op.results))
    module = Module("m")
    module.add(f)
    verify(module)
    flat = [x for o in operands if o is not None for x in (o if isinstance(o, (list, tuple)) else [o])]
    return interpret(parse_module(print_module(module)), "f", flat)


def to_torch(x: Any) -> Any:
    """The array as a tensor, narrow floats as f32 and integers of fewer than 8 bits as ones of 8."""
    if x is None:
        return None
    if isinstance(x, list):
        return [to_torch(v) for v in x]
    kind = DType.of(x.dtype)
    if kind in (DType.bf16, DType.f16) or kind.is_narrow_float:
        return torch.from_numpy(x.astype(np.float32))
    if kind.bits < 8:
        return torch.from_numpy(x.astype(np.int8 if kind in (DType.i4, DType.i2) else np.uint8))
    return torch.from_numpy(x)


def check(case: Case, dtype: DType) -> None:
    """Compare the interpreter's results with those of torch."""
    rng = np.random.default_rng(7)
    arrays = [[m(rng, dtype) for m in i] if isinstance(i, list) else i and i(rng, dtype) for i in case.inputs]
    got = evaluate(case.kind, *arrays, **case.attrs)
    want = case.expected(*map(to_torch, arrays))
    want = list(want) if isinstance(want, (tuple, list)) else [want]
    assert len(got) == len(want)
    for a, b in zip(got, want):
        b = np.asarray(b)
        narrow = a.dtype == DType.bf16.np
        if narrow:
            a, b = a.astype(np.float32), b.astype(DType.bf16.np).astype(np.float32)
        assert a.dtype == b.dtype
        rtol = 2**-7 if narrow else 2e-6
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=rtol * max(1, np.abs(b).max(initial=0)) if a.dtype != bool else 0
        )
