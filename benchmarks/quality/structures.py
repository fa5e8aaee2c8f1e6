"""Rows of structured pruning: a fifth of the bytes of channels, heads or layers gone, by methods side by side."""

from __future__ import annotations

from benchmarks.quality.goals import Goal, better
from benchmarks.quality.rows import Row

ABOUT = (
    "Ratios are parts of the bytes of what can be pruned: channels of feed-forward layers (66 % of the body), heads of "
    "queries too, or whole layers. What is left is dense. `flap` has biases for what goes and compares all layers, "
    "`magnitude` and `wanda` take the same part of each and nothing makes up for it, unless a row says otherwise."
)


def structured(options: str) -> str:
    """The pass."""
    return f"prune-structured{{{options}}}"


def channels() -> list[Row]:
    ways = {
        "magnitude": "method=magnitude",
        "magnitude, global": "method=magnitude budget=global",
        "wanda": "method=wanda",
        "flap": "method=flap",
        "flap without biases": "method=flap compensate=none",
        "flap, by layers": "method=flap budget=layers",
        "flap, by layers, corrected": "method=flap budget=layers compensate=weights",
        "ziplm": "method=ziplm",
    }
    return [Row(f"20 % of channels, {name}", structured(f"{way} ratio=0.2 units=channels")) for name, way in ways.items()]


def heads_too() -> list[Row]:
    ways = {
        "magnitude": "method=magnitude",
        "flap": "method=flap",
        "flap without biases": "method=flap compensate=none",
        "flap, corrected": "method=flap compensate=weights",
        "ziplm": "method=ziplm",
    }
    return [
        *(Row(f"20 % of channels and heads, {name}", structured(f"{way} ratio=0.2")) for name, way in ways.items()),
        Row("1.3 times fewer bytes, flap", structured("speedup=1.3")),
        Row("1.3 times fewer bytes, ziplm", structured("method=ziplm speedup=1.3")),
        Row("20 % of channels and heads, ziplm, w8a8", f"{structured('method=ziplm ratio=0.2')},quantize{{scheme=w8a8}}"),
    ]


def layers() -> list[Row]:
    blocks = ("layers", "attention", "feedforward")
    return [Row(f"20 % of {name}", f"prune-layers{{ratio=0.2 blocks={name}}}") for name in blocks]


STRUCTURE_ROWS: tuple[Row, ...] = (*channels(), *heads_too(), *layers())
STRUCTURE_GOALS: tuple[Goal, ...] = (
    better("FLAP better than magnitude at 20 % of channels", "20 % of channels, flap", "20 % of channels, magnitude"),
    better("FLAP better than magnitude at 20 % of channels and heads", "20 % of channels and heads, flap",
           "20 % of channels and heads, magnitude"),
    better("FLAP by layers better than by scores alone", "20 % of channels, flap, by layers", "20 % of channels, flap"),
    better("biases help", "20 % of channels and heads, flap", "20 % of channels and heads, flap without biases"),
    better("ZipLM better than FLAP at equal bytes", "1.3 times fewer bytes, ziplm", "1.3 times fewer bytes, flap"),
)  # fmt: skip
