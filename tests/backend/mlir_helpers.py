"""Shared by the tests of the MLIR backend: targets this host can run, random arrays, comparisons."""

import functools
import re

import numpy as np
import pytest

from tilewright.codegen.mlir.native import aligned, numpy_dtype
from tilewright.codegen.target import CpuTarget, host_target, parse_target

TARGETS = ("x86-64-v3", "x86-64-v4", "x86-64-v4+bf16")

# Relative to the largest magnitude of the exact result. f32: accumulation order over a few thousand products. bf16 and
# f16: their last place (2**-8, 2**-11), since sums are kept in f32 and rounded once at the end.
TOLERANCE = {"f32": 1e-5, "bf16": 2.0**-8, "f16": 2.0**-11}


@functools.cache
def target(name: str) -> CpuTarget:
    """The named target, or a skip when this host cannot run its code."""
    text = "cpu{arch=x86-64-v4 features=+avx512bf16}" if name.endswith("+bf16") else name
    wanted = parse_target(text)
    missing = wanted.features - host_features()
    if missing:
        pytest.skip(f"host lacks {', '.join(sorted(missing))}")
    return wanted


@functools.cache
def host_features() -> frozenset[str]:
    return host_target().features


def random_array(rng: np.random.Generator, shape: tuple[int, ...] | int, dtype: str) -> np.ndarray:
    """Standard normal values of ``dtype``, cache-line aligned."""
    array = aligned(shape, dtype, fill=None)
    array[...] = rng.standard_normal(array.shape).astype(numpy_dtype(dtype))
    return array


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Within ``TOLERANCE`` of the largest expected magnitude, everywhere."""
    error = np.abs(actual.astype(np.float64) - expected)
    limit = TOLERANCE[dtype] * max(float(np.abs(expected).max()), 1e-3)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error.max() <= limit, f"{error.max()} > {limit} at {worst}: {actual[worst]} instead of {expected[worst]}"


def library_calls(assembly: str) -> set[str]:
    """Functions outside the kernel that its code calls."""
    called = set(re.findall(r"\b(?:callq|jmp)\s+([A-Za-z_]\w*)(?:@PLT)?\s*$", assembly, re.MULTILINE))
    return {name for name in called if not name.startswith("k.")}
