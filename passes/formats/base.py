"""What a format of weights is: what it stores, how numbers become codes, and the IR that means them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from tilewright.ir import DType, Op, PassError, TensorType, Value, Weight

Array: TypeAlias = "np.ndarray[Any, Any]"
Params: TypeAlias = "dict[str, Array]"
"""What a format knows of groups besides their codes (``scale``, ``zero``, ``table``): arrays ``[R, G, ...]``."""

_ROWS_AT_ONCE = 1 << 22  # elements that are widened to f32 at a time
_EXPONENTS = {DType.f32: np.uint32(0x7F800000), DType.bf16: np.uint16(0x7F80), DType.f16: np.uint16(0x7C00)}


@dataclass(frozen=True)
class Size:
    """Bits that are stored for each element, each group, each row, and once a weight."""

    element: int
    group: int = 0
    row: int = 0
    once: int = 0

    def bytes(self, n: int, k: int, groups: int) -> int:
        """Of a weight ``[n, k]`` with ``groups`` groups a row. Codes that end inside a byte fill it up."""
        return -(-self.element * n * k // 8) + (self.group * n * groups + self.row * n + self.once) // 8


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a weight ``[N, K]`` as codes ``[N, K]`` and a few numbers a group of neighbours along K.

    Subclasses are frozen dataclasses. Their fields that ``options`` lists may be set from the text of the pass.
    Arrays of R rows with G groups of g elements are ``[R, G, g]``; a method may fit and encode any part of a weight,
    down to one group, or one element of a group that was fitted.
    """

    options: ClassVar[Mapping[str, str]] = {}
    """Field -> the values that it takes, for the documentation."""

    @property
    @abstractmethod
    def group(self) -> int:
        """Neighbours along K that share a scale; 0 is all of a row."""

    @property
    @abstractmethod
    def size(self) -> Size:
        """The arithmetic of what is stored."""

    def groups(self, k: int) -> int:
        """Groups in a row of ``k`` elements."""
        return k // self.group if self.group else 1

    def unfit(self, n: int, k: int) -> str | None:
        """Why a weight ``[n, k]`` cannot have this format."""
        return f"groups of {self.group} do not divide its rows of {k}" if self.group and k % self.group else None

    @abstractmethod
    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        """Names and types of what stands for the weight ``name`` ``[n, k]``, codes first."""

    def shared(self, w: Array, importance: Array | None = None) -> Params:
        """What all groups of a row share, from whole rows f32 ``[R, G, g]``: arrays ``[R, 1, ...]``."""
        return {}

    @abstractmethod
    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        """Scales, zero points or tables for f32 ``w`` ``[R, G, g]``.

        ``shrink`` (a number, or ``[R, G]``) narrows the range that codes reach, ``importance`` f32 ``[G, g]`` says how much
        each element of a row matters. ``shared`` is what :meth:`shared` gave for these rows, needed when ``w`` is not all
        of their groups.
        """

    @abstractmethod
    def encode(self, w: Array, params: Params) -> Array:
        """The nearest codes for f32 ``w`` ``[R, G, g]``, a byte each."""

    @abstractmethod
    def decode(self, codes: Array, params: Params) -> Array:
        """f32 ``[R, G, g]``, bit by bit what the operations of :meth:`value` give."""

    @abstractmethod
    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        """The arrays that ``parts`` lists, from codes ``[N, K]`` and the params of all groups."""

    @abstractmethod
    def value(self, add: Callable[[Op], Value], parts: Sequence[Weight], dtype: DType) -> Value:
        """The operations that mean the weight; ``add`` puts one into the function."""


def round_to_nearest(
    format: Format, weight: Array, importance: Array | None = None, name: str = "weight"
) -> tuple[Array, ...]:
    """The arrays of ``format.parts`` for ``weight`` ``[N, K]``, a block of rows at a time.

    ``importance`` ``[K]`` says how much each column matters. Raises PassError that names the weight ``name`` when it has
    numbers that are not finite, or too large for the format.
    """
    n, k = weight.shape
    groups = format.groups(k)
    matters = None if importance is None else importance.astype(np.float32).reshape(groups, -1)
    step = max(1, _ROWS_AT_ONCE // k)
    codes: Array | None = None
    found: list[Params] = []
    for start in range(0, n, step):
        block = weight[start : start + step].astype(np.float32).reshape(-1, groups, k // groups)
        check_finite(block, name, start)
        params = format.fit(block, importance=matters)
        check_params(params, block, name)
        rows = format.encode(block, params)
        codes = np.empty((n, k), rows.dtype) if codes is None else codes
        codes[start : start + step] = rows.reshape(-1, k)
        found.append(params)
    assert codes is not None, "a weight has rows"
    return format.store(codes, {key: np.concatenate([p[key] for p in found]) for key in found[0]})


def check_finite(array: Array, name: str, first: int = 0) -> None:
    """Raise PassError when rows of the weight ``name``, from row ``first`` on, have NaN or infinity among them."""
    step = max(1, _ROWS_AT_ONCE // max(array[:1].size, 1))
    for start in range(0, len(array), step):
        rows = array[start : start + step]
        if not is_finite(rows):
            row = first + start + int(np.argmin(np.isfinite(rows).reshape(len(rows), -1).all(1)))
            raise PassError(
                f"@{name} has numbers that are NaN or infinite, first in row {row}; such a weight cannot be quantized: "
                f"repair the checkpoint, or skip={name}"
            )


def is_finite(array: Array) -> bool:
    """Whether no number is NaN or infinite: whether no exponent has all its bits, which is faster asked of the bits."""
    mask = _EXPONENTS.get(DType.of(array.dtype))
    if mask is None:
        return bool(np.isfinite(array).all())
    bits = np.ascontiguousarray(array).view(f"u{array.itemsize}")
    return not (bits & mask == mask).any()


def check_params(params: Params, w: Array, name: str) -> None:
    """Raise PassError when a scale of the weight ``name`` went beyond its type."""
    if not all(np.isfinite(array.astype(np.float32)).all() for array in params.values()):
        kinds = ", ".join(f"{key} {DType.of(array.dtype).value}" for key, array in params.items())
        raise PassError(
            f"@{name} has numbers up to {np.abs(w).max():g}, too large for its format ({kinds}); "
            f"choose one with f32 scales, such as w8a16, or skip={name}"
        )


def check_group(group: int) -> None:
    """Raise PassError for a number of neighbours that makes no sense."""
    if group < 0:
        raise PassError(f"a group has 1 or more elements, or is 0 for all of a row; got {group}")


def inverse(scale: Array) -> Array:
    """1 / scale for each element of a group, f32 ``[R, G, 1]``; 0 where the scale was too small to be stored."""
    wide = scale.astype(np.float32)[..., None]
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
