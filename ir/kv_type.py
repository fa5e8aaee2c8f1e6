"""The type of a KV cache: which slot a position has, and how a slot is stored.

A sequence has *positions*, where a token stands in the text, and *slots*, where its key and value lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tilewright.ir.dtypes import DType
from tilewright.ir.kv_kept import NOTES, Kept
from tilewright.ir.kv_layouts import CONTIGUOUS, Layout, Paged, Ring, expect, parse_layout
from tilewright.ir.kv_residual import check_residual, residual_bytes

GROUPS = (16, 32, 64, 128)
"""Tokens that share the scales of channels."""
FLOATS = (DType.f32, DType.f16, DType.bf16)
CODES = (DType.i8, DType.i4, DType.i2)


@dataclass(frozen=True)
class KVType:
    """The cache of one attention layer: keys of ``heads`` heads of size ``dim``, values of size ``vdim``.

    ``length`` is how many positions a sequence may have; the batch is that of the session that runs it. ``dtype`` is a
    float or, for codes, i8, i4 or i2. Codes have ``scales`` (and zeros, but for i8) of f16 or f32: a pair for the values of
    a token and head, and for its key (``keys=token``) or for a channel of ``group`` tokens (``keys=channel``, KIVI,
    arXiv:2402.02750). The last ``recent`` tokens, and those in no whole group yet, stay in ``full`` beside the codes; a
    call appends only tokens of the text to such a cache, no padding. Without ``recent``, ``keys=token`` has none of these.
    A group has beside its codes factors of ``rank`` columns of their error, and ``outliers`` at either end of the numbers
    that share a scale (GEAR, arXiv:2403.05527; see `ir.ops.kv_codes`).

    With ``summary=minmax`` each full page has, for each head, the least and the greatest of every component of its keys
    (Quest, arXiv:2406.10774), in the cache's floats, or in ``full``: what ``kv.select`` chooses pages by.

    With ``values=keys`` values are the first ``vdim`` components of keys, and not stored a second time: the latent of
    multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).
    """

    heads: int
    dim: int
    vdim: int
    length: int
    dtype: DType
    layout: Layout = CONTIGUOUS
    keys: str = "token"
    group: int = 32
    recent: int = 0
    scales: DType = DType.f16
    full: DType = DType.bf16
    rank: int = 0
    outliers: int = 0
    summary: str = "none"
    values: str = "own"
    _always: ClassVar[int] = 6  # fields that are printed whatever they are

    def __post_init__(self) -> None:
        if isinstance(self.layout, str):
            object.__setattr__(self, "layout", parse_layout(self.layout))
        sizes = self.heads, self.dim, self.vdim, self.length
        expect(min(sizes) >= 1, f"sizes of a cache are positive, got {self}")
        known = ", ".join(d.value for d in FLOATS + CODES)
        expect(self.dtype in FLOATS + CODES, f"no cache of {self.dtype.value}; there are {known}")
        self._check_codes()
        self._check_summary()
        self._check_values()
        if isinstance(self.layout, Kept):
            self.layout.check(self.dtype, self.length)

    def _check_codes(self) -> None:
        of_codes = [f for f in fields(self)[self._always :] if f.name not in ("summary", "values")]
        given = [f.name for f in of_codes if getattr(self, f.name) != f.default]
        expect(self.is_coded or not given, f"{', '.join(given)}: only of codes, not of {self.dtype.value}")
        expect(self.keys in ("token", "channel"), f"keys are token or channel, got {self.keys}")
        fits = self.keys == "token" or self.dtype is not DType.i8
        expect(fits, "i8 has a scale for each token; give keys=token, or i4 or i2")
        expect(self.group in GROUPS, f"groups have {', '.join(map(str, GROUPS))} tokens, got {self.group}")
        expect(self.recent >= 0, f"recent is not negative, got {self.recent}")
        expect(self.scales in (DType.f16, DType.f32), f"scales are f16 or f32, got {self.scales.value}")
        expect(self.full in (DType.bf16, DType.f32), f"full is bf16 or f32, got {self.full.value}")
        check_residual(self)
        if not self.keeps_recent:
            return
        ring = isinstance(self.layout, Ring)
        expect(not ring, "a ring overwrites tokens one by one: give keys=token and no recent tokens, or another layout")
        split = self.page % self.group != 0
        expect(not split, f"a group of {self.group} tokens lies in several pages of {self.page}; give group={self.page}")

    def _check_summary(self) -> None:
        expect(self.summary in ("none", "minmax"), f"summary is none or minmax, got {self.summary}")
        paged = not self.has_summary or self.page > 0
        expect(paged, f"a summary is of pages, {self.layout} has none; give layout=paged<32>")
        late = self.has_summary and self.keeps_recent
        expect(not late, "no summary of pages whose tokens become codes late: give keys=token and no recent tokens")

    def _check_values(self) -> None:
        expect(self.values in ("own", "keys"), f"values are own or keys, got {self.values}")
        if self.values == "own":
            return
        expect(self.vdim <= self.dim, f"values of {self.vdim} are not among keys of {self.dim}; give values=own")
        expect(not self.is_coded, f"values among keys are floats, not {self.dtype.value}; give values=own")

    def __str__(self) -> str:
        shown = [f for i, f in enumerate(fields(self)) if i < self._always or getattr(self, f.name) != f.default]
        return f"kv<{', '.join(f'{f.name}={_text(getattr(self, f.name))}' for f in shown)}>"

    @property
    def is_coded(self) -> bool:
        return self.dtype in CODES

    @property
    def has_zeros(self) -> bool:
        """Whether codes have a zero beside each scale."""
        return self.dtype in (DType.i4, DType.i2)

    @property
    def keeps_recent(self) -> bool:
        """Whether some tokens are not codes yet."""
        return self.is_coded and (self.recent > 0 or self.keys == "channel")

    @property
    def has_residual(self) -> bool:
        """Whether some of the error of codes lies beside them."""
        return self.rank > 0 or self.outliers > 0

    @property
    def beside_pages(self) -> bool:
        """Whether a sequence has memory of its own beside its pages: for the tokens that are no codes yet."""
        return self.keeps_recent and self.page > 0

    @property
    def has_summary(self) -> bool:
        """Whether pages say between what their keys lie."""
        return self.summary != "none"

    @property
    def own_vdim(self) -> int:
        """Numbers of a value that are stored beside its key."""
        return self.vdim if self.values == "own" else 0

    @property
    def summaries(self) -> DType:
        """Element type of a page's summary."""
        return self.full if self.is_coded else self.dtype

    @property
    def held(self) -> DType:
        """Element type of what slots decode to."""
        return DType.f32 if self.is_coded else self.dtype

    @property
    def page(self) -> int:
        """Tokens of a page, 0 when there are no pages."""
        return self.layout.page if isinstance(self.layout, Paged) else 0

    @property
    def sinks(self) -> int:
        """Positions that a ring keeps for good."""
        return self.layout.sinks if isinstance(self.layout, Ring) else 0

    @property
    def pages(self) -> int:
        """The most pages of a sequence."""
        return -(-self.length // self.page) if self.page else 0

    @property
    def slots(self) -> int:
        """The most slots of a sequence."""
        if isinstance(self.layout, Ring):
            return self.layout.sinks + self.layout.size
        if isinstance(self.layout, Kept):
            return self.layout.size
        return self.pages * self.page or self.length

    @property
    def budget(self) -> int:
        """Tokens that stay from call to call, 0 when all do."""
        return self.layout.budget if isinstance(self.layout, Kept) else 0

    def coded(self, tokens: int) -> int:
        """How many of the first ``tokens`` tokens are stored as codes."""
        if not self.keeps_recent:
            return tokens if self.is_coded else 0
        return max(tokens - self.recent, 0) // self.group * self.group

    @property
    def recent_slots(self) -> int:
        """The most tokens that are stored in ``full`` beside codes."""
        return self.recent + self.group - 1 if self.keeps_recent else 0

    def bytes_of(self, tokens: int) -> int:
        """Bytes of so many tokens, as ``dtype`` says: all that lies beside keys and values, and what pages say of them."""
        numbers = -(-tokens * self.heads * (self.dim + self.own_vdim) * self.dtype.bits // 8)
        if self.has_summary:
            numbers += -(-tokens // self.page) * self.heads * 2 * self.dim * self.summaries.size
        if not self.is_coded:
            return numbers
        of_keys = -(-tokens // self.group) * self.dim if self.keys == "channel" else tokens
        numbers += (of_keys + tokens) * self.heads * self.scales.size * (1 + self.has_zeros)
        return numbers + residual_bytes(self, tokens)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of this layer; 0 when there are no pages."""
        return self.bytes_of(self.page)

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence at its longest, ``full`` tokens and notes on kept ones included."""
        beside = self.recent_slots * self.heads * (self.dim + self.vdim) * self.full.size
        beside += self.slots * self.heads * NOTES * 4 if self.budget else 0
        return self.bytes_of(self.slots) + beside


def _text(value: object) -> str:
    return value.value if isinstance(value, DType) else str(value)


def _integer(text: str) -> int:
    expect(re.fullmatch(r"\d{1,12}", text, re.ASCII) is not None, f"not a size: {text!r}")
    return int(text)


def parse_kv_type(text: str) -> KVType:
    """Read ``kv<heads=2, dim=64, vdim=64, length=2048, dtype=i8, layout=paged<32>>``; raises ValueError."""
    names = {f.name: f for f in fields(KVType)}
    given: dict[str, str] = {}
    for item in re.split(r",(?![^<]*>)", text[len("kv<") : -1]):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in names or key in given:
            raise ValueError(f"a cache has no {key!r} here; it has {', '.join(names)}, each once")
        given[key] = value
    missing = [name for name in list(names)[: KVType._always] if name not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)} of a cache missing in {text}")
    read: dict[str, Callable[[str], Any]] = {"DType": DType, "int": _integer, "str": str, "Layout": parse_layout}
    return KVType(**{key: read[str(names[key].type)](value) for key, value in given.items()})
