"""What the figures are to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.rows import BASE

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """``needs``: rows without which nothing can be said; ``holds`` is asked with all rows."""

    text: str
    needs: tuple[str, ...]
    holds: Callable[[Rows], bool]
    shows: Callable[[Rows], str]

    def verdict(self, rows: Rows) -> str:
        """``hit``, ``missed`` or what is missing, with the figures."""
        missing = [name for name in self.needs if "error" in rows.get(name, {"error": ""})]
        if missing:
            return f"not measured ({', '.join(missing)})"
        return f"**{'hit' if self.holds(rows) else 'missed'}**: {self.shows(rows)}"


def better(text: str, new: str, old: str) -> Goal:
    """``new`` has both the lower perplexity and the lower divergence."""

    def shows(rows: Rows) -> str:
        return "; ".join(f"{n} perplexity {rows[n]['perplexity']:.3f}, KL {rows[n]['kl_mean']:.5f}" for n in (new, old))

    return Goal(text, (new, old), lambda r: all(r[new][k] < r[old][k] for k in ("perplexity", "kl_mean")), shows)


def within(text: str, name: str, share: float, base: str = BASE) -> Goal:
    """The perplexity of ``name`` is at most ``share`` above that of ``base``."""

    def growth(rows: Rows) -> float:
        return float(rows[name]["perplexity"] / rows[base]["perplexity"] - 1)

    return Goal(text, (name, base), lambda r: growth(r) <= share, lambda r: f"{growth(r):+.2%}")


def cosine(text: str, name: str, least: float) -> Goal:
    return Goal(text, (name,), lambda r: r[name]["cosine_mean"] >= least, lambda r: f"{r[name]['cosine_mean']:.5f}")


GOALS = (
    within("w8a8 within 0.5 % of bf16", "w8a8", 0.005),
    within("w4a8 g128 GPTQ within 3 % of bf16", "w4a8 g128 gptq", 0.03),
    *(
        better(f"{method.upper()} better than RTN at {scheme[:2]}", f"{scheme} g128 {method}", f"{scheme} g128 rtn")
        for scheme in ("w4a16", "w3a16")
        for method in ("gptq", "awq")
    ),
    better("SmoothQuant better than RTN with outlier channels", "outliers: w8a8 smooth", "outliers: w8a8 rtn"),
    *(
        better(f"outlier {kind} better than plain at 3 bits, {method.upper()}",
               f"w3a16 g128 outlier {kind} {method}", f"w3a16 g128 {method}")
        for kind in ("columns", "weights")
        for method in ("rtn", "gptq")
    ),
    better("mixed precision better than uniform at equal bytes", "mixed 3.125 bits greedy rtn", "w3a16 g128 rtn"),
    better("mixed precision better than uniform at equal bytes, evolved", "mixed 3.125 bits evolve rtn", "w3a16 g128 rtn"),
    better("mixed precision better than uniform at equal bytes, GPTQ", "mixed 3.125 bits greedy gptq", "w3a16 g128 gptq"),
    better("codebook better than plain at 3 bits", "codebook3", "w3a16 g128 rtn"),
)
ENCODER_GOALS = (
    cosine("w8a8: mean cosine at least 0.999", "w8a8", 0.999),
    cosine("w8a8 with outlier columns: at least 0.999", "w8a8 outlier columns", 0.999),
    cosine("w4: mean cosine at least 0.99", "w4a16 g32", 0.99),
    cosine("w4 with GPTQ: at least 0.99", "w4a16 g32 gptq", 0.99),
    cosine("w4 and eight-bit activations, smoothed, GPTQ: at least 0.99", "w4a8 g32 smooth, gptq", 0.99),
)
