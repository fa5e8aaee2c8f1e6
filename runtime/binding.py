"""From the arguments of a call to the buffers and dims of a program, with every check before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.runtime.dlpack import DeviceArray
from tilewright.runtime.errors import InputError
from tilewright.runtime.manifest import DTYPES, DimSpec, EntrySpec, TensorSpec
from tilewright.runtime.memory import as_aligned

Array = np.ndarray[Any, Any]


def bind(entry: EntrySpec, inputs: Mapping[str, Any], where: str) -> tuple[list[Any], dict[str, int]]:
    """The input arrays in manifest order, aligned and row-major, and the size of every dim. Raises InputError.

    A `DeviceArray` stays what it is. The values are left to ``check_values`` and ``check_positions``.
    """
    _check_names(entry, inputs, where)
    arrays = [_to_array(spec, inputs[spec.name], f"{where}({spec.name})") for spec in entry.inputs]
    dims = _bind_dims(entry, arrays, where)
    return [array if isinstance(array, DeviceArray) else as_aligned(array) for array in arrays], dims


def _check_names(entry: EntrySpec, inputs: Mapping[str, Any], where: str) -> None:
    known = [spec.name for spec in entry.inputs]
    unknown = [name for name in inputs if name not in known]
    missing = [name for name in known if name not in inputs]
    if unknown:
        raise InputError(f"{where}({unknown[0]})", f"one of the inputs {known}", "an unknown input")
    if missing:
        raise InputError(f"{where}({missing[0]})", f"all of the inputs {known}", "nothing for it")


def _to_array(spec: TensorSpec, value: Any, where: str) -> Any:
    expected = DTYPES[spec.dtype]
    array: Any
    if isinstance(value, DeviceArray):
        array = value
    elif hasattr(value, "dtype"):
        array = np.asarray(value)
    else:
        array = _from_python(value, spec, where)
    if array.dtype != expected:
        raise InputError(where, f"dtype {expected}", f"dtype {array.dtype}", "convert it with .astype")
    if len(array.shape) != len(spec.shape):
        raise InputError(where, f"shape {_shape_text(spec.shape)}", f"shape {_shape_text(array.shape)}")
    return array


def _from_python(value: Any, spec: TensorSpec, where: str) -> Array:
    """Lists and numbers, where no kind changes: truth values, integers that fit, any number for a float input."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(where, "an array or nested lists of equal lengths", f"unequal lengths ({error})") from error
    dtype = DTYPES[spec.dtype]
    kinds = "b" if spec.dtype == "bool" else "iu" if spec.dtype[0] in "iu" else "iuf"
    if array.size and array.dtype.kind not in kinds:
        raise InputError(where, f"values of dtype {dtype}", f"values of dtype {array.dtype}")
    if array.size and kinds == "iu":
        info = np.iinfo(dtype)
        if array.min() < info.min or array.max() > info.max:
            raise InputError(where, f"values from {info.min} to {info.max}", f"{array.min()} to {array.max()}")
    return array.astype(dtype)


def _bind_dims(entry: EntrySpec, arrays: Sequence[Any], where: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec, array in zip(entry.inputs, arrays):
        for extent, size in zip(spec.shape, array.shape):
            want = sizes.setdefault(extent, size) if isinstance(extent, str) else extent
            if size != want:
                known = f" with {extent}={want}, as in the inputs before" if isinstance(extent, str) else ""
                raise InputError(f"{where}({spec.name})", f"shape {_shape_text(spec.shape)}{known}",
                                 f"shape {_shape_text(array.shape)}")
    for dim in entry.dims:
        _check_range(dim, sizes[dim.name], where)
    return sizes


def _check_range(dim: DimSpec, size: int, where: str) -> None:
    if not dim.min <= size <= dim.max:
        raise InputError(f"{where}, dim {dim.name}", f"a size from {dim.min} to {dim.max}", str(size),
                         "compile with another range of the dim to allow it" if size > 0 else "")


def check_values(entry: EntrySpec, inputs: Mapping[str, Array], where: str) -> None:
    """Keeps integer inputs, those that are given, within the limits that the manifest gives. Raises InputError."""
    for spec in (spec for spec in entry.inputs if spec.name in inputs):
        array = inputs[spec.name]
        if array.size == 0 or (spec.low is None and spec.high is None):
            continue
        low, high = _extremes(array)
        if (spec.low is not None and low < spec.low) or (spec.high is not None and high > spec.high):
            limits = f"{'' if spec.low is None else spec.low}..{'' if spec.high is None else spec.high}"
            raise InputError(f"{where}({spec.name})", f"values in {limits}", f"values in {low}..{high}")


def _extremes(array: Array) -> tuple[Any, Any]:
    """Smallest and largest value; small arrays (those of a decode step) through Python, which is faster there."""
    if array.size > 16:
        return array.min(), array.max()
    values = array.ravel().tolist()
    return min(values), max(values)


def _shape_text(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def resolve(extent: int | str | None, dims: Mapping[str, int]) -> int | None:
    """The number that an extent stands for; None for an expression."""
    return dims[extent] if isinstance(extent, str) else extent


def check_batch(entry: EntrySpec, dims: Mapping[str, int], batch: int, where: str) -> None:
    """Keeps the sequences of a call within the session's batch. Raises InputError."""
    count = resolve(entry.batch, dims)
    if count is not None and count > batch:
        raise InputError(f"{where}, batch", f"at most {batch} sequences, the session's batch", str(count),
                         f"make the session with batch={count}")


def check_positions(inputs: Mapping[str, Array], capacity: int, where: str) -> None:
    """Keeps the tokens of a call within the capacity of the states. Raises InputError.

    For entries of the generation convention (``ids`` [B, S] written from ``start`` [B], ``last`` [B] within S, ``count``
    [B] up to S).
    """
    ids, start, last = inputs.get("ids"), inputs.get("start"), inputs.get("last")
    if ids is None or ids.ndim != 2:
        return
    if start is not None and start.size:
        first, latest = _extremes(start)
        end = int(latest) + ids.shape[1]
        if first < 0 or end > capacity:
            raise InputError(f"{where}(start)", f"positions in 0..{capacity - 1}, the capacity of the KV states",
                             f"positions in {first}..{end - 1}", "shorten the text or compile with a larger capacity")
    count = inputs.get("count")
    if count is not None and count.size:
        low, high = _extremes(count)
        if low < 0 or high > ids.shape[1]:
            raise InputError(f"{where}(count)", f"values in 0..{ids.shape[1]}", f"values in {low}..{high}")
    if last is not None and last.size:
        low, high = _extremes(last)
        if low < 0 or high >= ids.shape[1]:
            raise InputError(f"{where}(last)", f"values in 0..{ids.shape[1] - 1}", f"values in {low}..{high}")


def check_table(inputs: Mapping[str, Array], page: int, end: int, where: str) -> None:
    """Keeps the pages of a call (``table`` [B, T], of ``page`` tokens) below ``end``, and its tokens within them.

    Raises InputError.
    """
    table, ids, start = inputs.get("table"), inputs.get("ids"), inputs.get("start")
    if table is None or not table.size:
        return
    low, high = _extremes(table)
    if low < 0 or high >= end:
        raise InputError(f"{where}(table)", f"pages in 0..{end - 1}, those of the session", f"pages in {low}..{high}")
    if ids is None or start is None or not start.size:
        return
    latest = int(_extremes(start)[1]) + ids.shape[1]
    if latest > table.shape[1] * page:
        raise InputError(f"{where}(table)", f"tables for {latest} tokens, {-(-latest // page)} pages of {page}",
                         f"{table.shape[1]} pages")
