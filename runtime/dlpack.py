"""Arrays in a GPU's memory, passed between libraries without a copy by the DLPack protocol (version 0.8 structures)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.runtime.errors import InputError
from tilewright.runtime.manifest import DTYPES

CUDA = 2  # kDLCUDA
_NAME = b"dltensor"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
_BFLOAT = 4
_CODES = {(_BFLOAT if name == "bf16" else _KINDS[dtype.kind], dtype.itemsize * 8): name for name, dtype in DTYPES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("ordinal", ctypes.c_int32),
                ("rank", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("offset", ctypes.c_uint64)]  # fmt: skip


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_Ask = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)  # of a capsule that ends
_pointer_of_ending = _Ask(("PyCapsule_GetPointer", ctypes.pythonapi))
_is_ending_unused = _Ask(("PyCapsule_IsValid", ctypes.pythonapi))
_given: dict[int, tuple[Any, ...]] = {}
"""What must stay while another library has an array of ours, by the address of its description."""


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A row-major array on a GPU; ``owner`` keeps its memory, ``copy`` brings it to the host.

    ``torch.from_dlpack(array)`` is a tensor on the same memory.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ordinal: int
    owner: Any
    copy: Callable[[DeviceArray], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        return self.copy(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.ordinal

    def __dlpack__(self, stream: int | None = None, **_: Any) -> Any:
        """A capsule. The array is complete on every stream: a session waits before it gives one out."""
        rank = len(self.shape)
        shape = (ctypes.c_int64 * max(rank, 1))(*self.shape)
        code = _BFLOAT if self.dtype == DTYPES["bf16"] else _KINDS[self.dtype.kind]
        tensor = _Tensor(self.address, CUDA, self.ordinal, rank, code, self.dtype.itemsize * 8, 1,
                         ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), None, 0)  # fmt: skip
        managed = _Managed(tensor, None, _deleter)
        key = ctypes.addressof(managed)
        _given[key] = (managed, shape, self.owner)
        return _new(key, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))


def _forget(managed: Any) -> None:
    """Another library is done with an array."""
    _given.pop(ctypes.addressof(managed.contents), None)


def _end(capsule: int) -> None:
    """A capsule ends, perhaps one that nobody took."""
    if _is_ending_unused(capsule, _NAME):
        _given.pop(_pointer_of_ending(capsule, _NAME), None)


def is_on_gpu(value: Any) -> bool:
    """Whether ``value`` is an array in a GPU's memory."""
    return hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == CUDA


def read(value: Any, where: str, stream: int) -> DeviceArray:
    """An array of another library on a GPU, ready for ``stream``. Raises InputError for one that is not row-major."""
    capsule = value.__dlpack__(stream=stream)
    tensor = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    name = _CODES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if name is None:
        raise InputError(where, f"an element type of {list(DTYPES)}", f"DLPack type {tensor.code} of {tensor.bits} bits")
    shape = tuple(tensor.shape[i] for i in range(tensor.rank))
    expected = 1
    for size, stride in zip(reversed(shape), reversed(tensor.strides[: tensor.rank]) if tensor.strides else ()):
        if size != 1 and stride != expected:
            strides = list(tensor.strides[: tensor.rank])
            raise InputError(where, "a row-major array", f"strides {strides}", "make it contiguous")
        expected *= size
    address = (tensor.data or 0) + tensor.offset
    return DeviceArray(address, shape, DTYPES[name], tensor.ordinal, (value, capsule), _unsupported)


def _unsupported(array: DeviceArray) -> np.ndarray[Any, Any]:
    raise TypeError("an array of another library: copy it to the host with that")


_deleter, _destructor = _Deleter(_forget), _Destructor(_end)
