"""The options of kv-layout: how much of the text a cache holds, in which slots, and as what numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from tilewright.ir import DType, Kept, KVType, Layout, Paged, Ring
from tilewright.ir.kv_layouts import CONTIGUOUS
from tilewright.ir.kv_type import CODES
from tilewright.ir.ops.kv_policies import POLICIES
from tilewright.passes.base import Pass
from tilewright.passes.kv_mask import Sight

ENDLESS = 1 << 24
"""Positions of a sequence whose cache is a ring or kept: beyond, models' f32 angles do not tell them apart."""
_OF_KIND = {
    "page": ("paged", "ring"), "select": ("paged", "ring"),
    "window": ("ring",), "sinks": ("ring", "kept"), "chunk": ("ring", "kept"),
    **dict.fromkeys(("budget", "policy", "observe", "pool", "temperature", "merge"), ("kept",)),
}  # fmt: skip
_OF_CODES = ("keys", "group", "recent", "scales", "full", "rank", "outliers")
_RECENT = 128
_PAGE, _CHOSEN_PAGE = 64, 32  # large ones suit memory, those that are chosen one by one say more when they are small


@dataclass(frozen=True)
class KvOptions(Pass):
    """``length``: positions of a sequence; none is what the model was traced for, at most 4096, or a ring's 16,777,216.

    ``kind``: ``contiguous`` slots for each sequence; ``paged``, pages of ``page`` tokens from a pool that sequences share;
    ``ring``, the last ``window`` tokens and the first ``sinks``, for calls of at most ``chunk`` tokens. A ring without a
    ``window`` is for attention that is windowed in the model, and changes nothing; others are contiguous, or in pages where
    ``page`` is given. ``kept``: the ``budget`` tokens of each head that are worth most by ``policy``, the first ``sinks``
    and the last ``recent`` among them (none given: half of the budget, snapkv's ``observe`` at most); where attention has a
    window, a ring; ``observe``, ``pool``, ``temperature`` and ``merge`` as ``kv.retain`` takes them, none given as the
    policy's paper has them.

    ``dtype``: what is stored, auto for the keys' own floats; i8, i4, i2 are codes, whose ``keys`` have scales for each
    ``token`` or for each ``channel`` of ``group`` tokens; ``recent`` tokens stay in ``full``. ``scales`` are f16 or f32.
    Groups of tokens keep ``rank`` columns of the error of their codes, and ``outliers`` at either end of those that share a
    scale.

    ``select``: the share of a sequence's pages that decoding reads, but at least ``least`` of them (none is 4), in layers
    that see all of them; the first ``whole`` of these (none is 1) read all, as prefill does.
    """

    kind: Literal["contiguous", "paged", "ring", "kept"] = "contiguous"
    length: int | None = None
    dtype: Literal["auto", "f32", "f16", "bf16", "i8", "i4", "i2"] = "auto"
    page: int | None = None
    window: int | None = None
    sinks: int | None = None
    chunk: int | None = None
    keys: Literal["token", "channel"] = "token"
    group: int | None = None
    recent: int | None = None
    scales: Literal["f16", "f32"] = "f16"
    full: Literal["auto", "bf16", "f32"] = "auto"
    rank: int = 0
    outliers: int = 0
    select: float | None = None
    least: int | None = None
    whole: int | None = None
    budget: int | None = None
    policy: Literal["h2o", "snapkv", "scissorhands", "keyformer"] | None = None
    observe: int | None = None
    pool: int | None = None
    temperature: float | None = None
    merge: bool | None = None

    def __post_init__(self) -> None:
        for name in ("length", "page", "window", "chunk", "group", "least", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.length is not None and self.is_endless and self.length > ENDLESS:
            raise ValueError(f"length={self.length} is more than the {ENDLESS} positions that models tell apart")
        self._check_kind()
        self._check_select()
        sight = Sight() if self.kind == "kept" else Sight(window=self.window or 1)
        self.type(KVType(1, 8, 8, self.length or ENDLESS, DType.bf16), sight)

    def _check_kind(self) -> None:
        for name, kinds in _OF_KIND.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name}: only of kind={' and kind='.join(kinds)}, not of kind={self.kind}")
        if self.is_endless and self.page is not None:
            raise ValueError("with a window every cache is a ring, none has pages: leave out page or window")
        if self.kind == "kept":
            self._check_kept()
        elif self.sinks and self.window is None:
            raise ValueError("sinks stay where a window moves on: give window, how many of the last tokens are seen")
        defaults = {f.name: f.default for f in fields(self)}
        given = [name for name in _OF_CODES if getattr(self, name) != defaults[name]]
        given = [name for name in given if name != "recent" or self.kind != "kept"]
        if given and not self.is_coded:
            raise ValueError(f"{', '.join(given)}: only of codes; give dtype=i8, i4 or i2")
        in_full = self.full != "auto" and self.select is None
        if self.keys == "token" and not self.recent and (self.group is not None or in_full):
            raise ValueError("group and full are for keys=channel, or for recent tokens: give recent")

    def _check_select(self) -> None:
        if self.select is None:
            if self.least is not None or self.whole is not None:
                raise ValueError("least and whole are for pages that are selected: give select, their share")
            return
        if self.pages is None:
            raise ValueError("select is of pages: give page, or kind=paged")
        if self.whole is not None and self.whole < 0:
            raise ValueError(f"whole is not negative, got {self.whole}")
        if not 0 < self.select <= 1:
            raise ValueError(f"select is a share, above 0 and at most 1, got {self.select}")
        if self.keys == "channel" or self.recent:
            raise ValueError("select needs tokens that are codes as soon as they come: give keys=token, no recent tokens")
    def _check_kept(self) -> None:
        if self.budget is None:
            raise ValueError("kind=kept has a budget of tokens: give budget, how many of a sequence stay")
        if self.is_coded:
            raise ValueError(f"kept tokens are floats, not {self.dtype}: they move between slots one by one")
        always = self.retention["recent"] + self.retention["first"]
        if always > self.budget:
            raise ValueError(f"{always} tokens always stay (recent and sinks), the budget is {self.budget}")

    @property
    def retention(self) -> dict[str, Any]:
        """The attributes of ``kv.retain``."""
        assert self.budget is not None
        name = self.policy or "h2o"
        policy = POLICIES[name]
        observe = policy.observe if self.observe is None else self.observe
        half = min(self.budget // 2, observe) if name == "snapkv" and observe else self.budget // 2
        return {
            "policy": name,
            "recent": half if self.recent is None else self.recent,
            "first": self.sinks or 0,
            "observe": observe,
            "pool": policy.pool if self.pool is None else self.pool,
            "temperature": policy.temperature if self.temperature is None else self.temperature,
            "merge": bool(self.merge),
        }

    @property
    def whole_layers(self) -> int:
        """Layers that read all pages though others choose."""
        return 1 if self.whole is None else self.whole

    @property
    def is_coded(self) -> bool:
        return self.dtype in [d.value for d in CODES]

    @property
    def is_endless(self) -> bool:
        """Whether every cache is a ring or kept, so that memory does not bound the positions."""
        return self.kind == "kept" or self.window is not None

    @property
    def pages(self) -> Paged | None:
        """The pages of attention that sees all of the text, if it has any."""
        given = self.kind == "paged" or (self.kind == "ring" and self.page is not None)
        usual = _PAGE if self.select is None else _CHOSEN_PAGE
        return Paged(self.page or usual) if given else None

    def sight(self, sight: Sight) -> Sight:
        """What an attention of the model sees of the cache."""
        if self.window is None:
            return sight
        seen = min(self.window, sight.window) if sight.window > 0 else self.window
        return Sight(seen, sight.chunk, max(self.sinks or 0, sight.first))

    def type(self, plain: KVType, sight: Sight) -> KVType:
        """How the cache ``plain`` is stored for an attention that sees ``sight`` of it."""
        sizes = plain.heads, plain.dim, plain.vdim, plain.length
        dtype = plain.dtype if self.dtype == "auto" else DType(self.dtype)
        chosen = self.select is not None and sight.window <= 0 and sight.chunk <= 0
        codes = self._codes(plain.dtype) if self.is_coded else {}
        return KVType(*sizes, dtype, self.layout(sight), **codes, summary="minmax" if chosen else "none")

    def layout(self, sight: Sight) -> Layout:
        """Which slots the positions have for an attention that sees ``sight``."""
        seen = min((n for n in (sight.window, sight.chunk) if n > 0), default=0)
        chunk = 512 if self.chunk is None else self.chunk
        if self.kind == "ring" and seen:
            return Ring(seen, chunk, sight.first)
        if self.kind == "kept" and self.budget is not None:
            return Ring(seen, chunk, sight.first) if seen else Kept(self.budget, chunk)
        return self.pages or CONTIGUOUS

    def _codes(self, own: DType) -> dict[str, Any]:
        group = min(self.pages.page if self.pages else 32, 32) if self.group is None else self.group
        recent = _RECENT * (self.keys == "channel") if self.recent is None else self.recent
        full = (DType.f32 if own is DType.f32 else DType.bf16) if self.full == "auto" else DType(self.full)
        unused = not recent and self.keys == "token" and self.select is None
        kept = {} if unused else {"group": group, "full": full}
        beside = {"rank": self.rank, "outliers": self.outliers}
        return {"keys": self.keys, "recent": recent, "scales": DType(self.scales), **beside, **kept}


def describe(types: list[KVType]) -> str:
    """What the caches of a model take, before anything runs."""
    page = max((t.page for t in types), default=0)
    total = sum(t.sequence_bytes for t in types)
    parts = [f"{sum(t.bytes_of(64) for t in types if not isinstance(t.layout, (Ring, Kept))) / 64:g} bytes a token"]
    parts += [f"{sum(t.page_bytes for t in types)} a page of {page} tokens"] if page else []
    return ", ".join([*parts, f"{total} a sequence of {min((t.length for t in types), default=0)} tokens"])
