"""Rows of the table of KV caches: pipelines between the fusions and the kernels, and how each is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

EVALUATION, SMALL, RECALL = "evaluation", "small", "recall"
WINDOW = 512
"""Positions that the models were trained for; most of their texts had half of them."""
Task = Literal["text", "stream", "recomputed", "sinks", "prompt"]


@dataclass(frozen=True)
class Model:
    """``prefix`` is what names of its rows begin with; ``begins``: each text that it sees begins with the end token."""

    about: str
    prefix: str = ""
    begins: bool = False


MODELS = {
    EVALUATION: Model("the evaluation model"),
    SMALL: Model("the small model", f"{SMALL}: "),
    RECALL: Model("the recall model", f"{RECALL}: ", begins=True),
}


@dataclass(frozen=True)
class CacheRow:
    """``passes`` make the cache, all in f32 arithmetic; ``model`` is one of MODELS.

    ``text``: windows, of ``window`` tokens if that is not 0, whose second half is decoded; ``stream``: one text of
    ``tokens``, decoded from its first token to its last; ``recomputed``: some tokens of the same text, each by a model that
    sees the last ``window`` alone, at once; ``sinks``: what attention the first token gets, without a cache; ``prompt``:
    windows that are fed as prompts, of whose second half some tokens are scored.
    """

    name: str
    passes: str
    task: Task = "text"
    model: str = EVALUATION
    tokens: int = 0
    window: int = 0

    @property
    def pipeline(self) -> str:
        """Up to the cutting of kernels."""
        return ",".join(filter(None, ["clean,fusions", self.passes, "canonicalize,cse,dce"]))


def of_each(*rows: CacheRow) -> tuple[CacheRow, ...]:
    """With each model."""
    return tuple(replace(r, name=model.prefix + r.name, model=name) for name, model in MODELS.items() for r in rows)


def layout(options: str) -> str:
    """The pass."""
    return f"kv-layout{{{options}}}"


def gear(dtype: str, recent: int, options: str) -> CacheRow:
    """Keys by channel, with some of the error of codes beside them."""
    name = f"{dtype}, keys by channel, recent {recent}, {options.replace(' ', ', ')}"
    return CacheRow(name, layout(f"dtype={dtype} keys=channel recent={recent} full=bf16 {options}"))


# ---- what slots hold -------------------------------------------------------------------------------------------------

FORMATS = of_each(
    CacheRow("f32", layout("dtype=f32")),
    CacheRow("bf16", layout("dtype=bf16")),
    CacheRow("bf16, pages", layout("dtype=bf16 kind=paged page=64")),
    CacheRow("i8", layout("dtype=i8")),
    CacheRow("i4", layout("dtype=i4")),
    CacheRow("i4, recent 64", layout("dtype=i4 recent=64 full=bf16")),
    CacheRow("i4, keys by channel", layout("dtype=i4 keys=channel full=bf16")),
    CacheRow("i2", layout("dtype=i2")),
    CacheRow("i2, recent 128", layout("dtype=i2 recent=128 full=bf16")),
    CacheRow("i2, keys by channel, recent 32", layout("dtype=i2 keys=channel recent=32 full=bf16")),
    CacheRow("i2, keys by channel, recent 128", layout("dtype=i2 keys=channel recent=128 full=bf16")),
    gear("i2", 32, "rank=2"),
    gear("i2", 32, "rank=4"),
    gear("i2", 32, "rank=2 outliers=1"),
    gear("i2", 32, "group=128"),
    gear("i2", 32, "group=128 rank=2"),
    gear("i2", 32, "group=128 rank=4"),
    gear("i2", 128, "rank=2"),
    gear("i4", 128, "rank=2"),
)

# ---- past the trained length -----------------------------------------------------------------------------------------

LONG, SEEN = 20_000, 256


def ring(window: int, sinks: int) -> str:
    """A cache of ``window`` tokens in all."""
    return layout(f"dtype=bf16 kind=ring window={window - sinks} chunk=64" + (f" sinks={sinks}" if sinks else ""))


SINKS = of_each(
    CacheRow("attention on the first token", "", "sinks"),
    CacheRow("attention on the first token, texts of 64", "", "sinks", window=64),
)
STREAMS = of_each(
    CacheRow("4 sinks + window 252", ring(SEEN, 4), "stream", tokens=LONG),
    CacheRow("window 256", ring(SEEN, 0), "stream", tokens=LONG),
    CacheRow("window 256, recomputed", "", "recomputed", tokens=LONG, window=SEEN),
    CacheRow("4 sinks + window 60", ring(64, 4), "stream", tokens=LONG),
    CacheRow("window 64", ring(64, 0), "stream", tokens=LONG),
    CacheRow("window 64, recomputed", "", "recomputed", tokens=LONG, window=64),
    CacheRow("all tokens", ring(LONG, 0), "stream", tokens=4_000),
)

# ---- less than all tokens --------------------------------------------------------------------------------------------

FIFTH, QUARTER = WINDOW // 5, WINDOW // 4
SELECTED = of_each(
    CacheRow("a quarter of pages of 16", layout("dtype=bf16 kind=paged page=16 select=0.25")),
    CacheRow("a quarter of pages of 16, i8", layout("dtype=i8 kind=paged page=16 select=0.25")),
    CacheRow("a quarter of pages of 32", layout("dtype=bf16 kind=paged page=32 select=0.25")),
    CacheRow("window 128", layout(f"dtype=bf16 kind=ring window={QUARTER} chunk=64")),
)


SHORT = WINDOW // 2
"""Most texts of training were no longer."""


def kept(policy: str, options: str = "", size: int = WINDOW) -> CacheRow:
    """A fifth of the tokens of a text stays."""
    count, end = size // 5, named(size)
    name = f"{count} by {policy}{', ' + options if options else ''}{end}"
    chosen = f"dtype=bf16 kind=kept budget={count} chunk=64 policy={policy}{' ' + options if options else ''}"
    return CacheRow(name, layout(chosen), window=size % WINDOW)


def last(size: int) -> CacheRow:
    """The last fifth of the tokens of a text."""
    passes = layout(f"dtype=bf16 kind=ring window={size // 5} chunk=64")
    return CacheRow(f"window {size // 5}{named(size)}", passes, window=size % WINDOW)


def named(size: int) -> str:
    return "" if size == WINDOW else f", texts of {size}"


POLICIES = ("h2o", "snapkv", "scissorhands", "keyformer")
LATELY, MOSTLY_LAST = "observe=64", f"recent={4 * FIFTH // 5}"
KEPT = of_each(
    *map(kept, POLICIES),
    kept("h2o", "recent=4"),
    kept("h2o", LATELY),
    kept("h2o", f"{LATELY} {MOSTLY_LAST}"),
    kept("snapkv", MOSTLY_LAST),
    kept("snapkv", "merge=true"),
    last(WINDOW),
    CacheRow(f"4 sinks + window {FIFTH - 4}", ring(FIFTH, 4)),
    CacheRow(f"bf16{named(SHORT)}", layout("dtype=bf16"), window=SHORT),
    *(kept(policy, size=SHORT) for policy in POLICIES[:2]),
    kept("h2o", LATELY, SHORT),
    last(SHORT),
)


def heads(share: float) -> str:
    """That share of the heads keeps all, the others 4 sinks and as many further tokens as make a quarter."""
    options = f"window={QUARTER - 4} share={share} text=repeated"
    return f"split-heads{{{options}}},canonicalize,cse,dce,{layout('dtype=bf16 kind=ring chunk=64')}"


MIXED = of_each(
    CacheRow("half of the heads stream", heads(0.5)),
    CacheRow("three quarters of the heads stream", heads(0.25)),
)


def pruned(share: float, options: str) -> str:
    """Without that share of the keys' channels."""
    return f"prune-keys{{share={share}}},canonicalize,cse,dce,{layout(options)}"


PRUNED = of_each(
    CacheRow("a quarter of the keys' channels gone", pruned(0.25, "dtype=bf16")),
    CacheRow("0.4 of the keys' channels gone", pruned(0.4, "dtype=bf16")),
)

# ---- prompts that attend to some blocks ------------------------------------------------------------------------------


def sparse(pattern: str, tokens: int, block: int, dtype: str = "bf16") -> CacheRow:
    """Lists of blocks that hold so many tokens; with 0 the pattern decides."""
    size, codes = (f", {tokens} tokens" if tokens else ""), ("" if dtype == "bf16" else f", {dtype}")
    chosen = f"pattern={pattern} block={block} queries={min(block, 64)} dense=0" + (f" tokens={tokens}" if tokens else "")
    name = f"{pattern}{size}, blocks of {block}{codes}"
    return CacheRow(name, f"{layout(f'dtype={dtype}')},sparse-prefill{{{chosen}}}", "prompt")


ALIKE = ("a-shape", "vertical-slash", "block-sparse", "auto")
PROMPTS = of_each(
    CacheRow("all blocks", layout("dtype=bf16"), "prompt"),
    *(sparse(pattern, QUARTER, 32) for pattern in ALIKE),
    sparse("flex", 0, 32),
    *(sparse(pattern, SHORT, 64) for pattern in ALIKE),
    sparse("a-shape", SHORT, 128),
    sparse("a-shape", SHORT, 128, "i8"),
)

CACHE_ROWS: tuple[CacheRow, ...] = (*FORMATS, *SINKS, *STREAMS, *KEPT, *SELECTED, *MIXED, *PRUNED, *PROMPTS)
