"""What a cache of codes may have beside the codes of a group of tokens: part of their error (GEAR, arXiv:2403.05527)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.ir.dtypes import DType

if TYPE_CHECKING:
    from tilewright.ir.kv_type import KVType

RANKS = range(9)
OUTLIERS = range(5)
_PLACES = 256
"""A place among numbers that share a scale is a byte."""


def check_residual(kind: KVType) -> None:
    """Raises ValueError for what no residual goes with."""
    for name, number, known in (("rank", kind.rank, RANKS), ("outliers", kind.outliers, OUTLIERS)):
        if number not in known:
            raise ValueError(f"{name} is from 0 to {known[-1]}, got {number}")
    if not kind.has_residual:
        return
    if kind.dtype is DType.i8:
        raise ValueError("rank and outliers make up for few bits, i8 has an error of a rounding; give dtype=i4 or i2")
    if not kind.keeps_recent:
        raise ValueError("rank and outliers are of whole groups of tokens; give recent, or keys=channel")
    if kind.rank > min(kind.group, kind.dim, kind.vdim):
        raise ValueError(f"rank {kind.rank} of {kind.group} tokens of {kind.dim} and {kind.vdim} components")
    along = (kind.group if kind.keys == "channel" else kind.dim), kind.vdim
    if 2 * kind.outliers >= min(along):
        raise ValueError(f"{kind.outliers} outliers at either end of {min(along)} numbers that share a scale leave none")
    if kind.outliers and max(along) > _PLACES:
        raise ValueError(f"outliers are of at most {_PLACES} numbers that share a scale, got {max(along)}")


def residual_bytes(kind: KVType, tokens: int) -> int:
    """Bytes of the factors and outliers of so many tokens."""
    groups, size = -(-tokens // kind.group), kind.scales.size
    factors = groups * kind.rank * (2 * kind.group + kind.dim + kind.vdim) * size
    vectors = tokens + (groups * kind.dim if kind.keys == "channel" else tokens)
    return kind.heads * (factors + vectors * 2 * kind.outliers * (1 + size))
