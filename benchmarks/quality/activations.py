"""Rows of activation sparsity: methods side by side at several shares of zeros."""

from __future__ import annotations

from benchmarks.quality.goals import Goal, better
from benchmarks.quality.rows import Row

SHARES = (25, 40, 50, 65)
UNIFORM = ("plain", "teal", "wina", "cats", "chess", "r-sparse")
SEARCHED = (("teal", "greedy"), ("wina", "greedy"), ("wina", "global"))
ABOUT = (
    "Inputs of the body's layers become zero. `plain`, and rows with a search, have the share of all bytes of weights, "
    "the others that of each layer's inputs. It is all layers of the body but for `cats`, which has those behind gates "
    "(26 % of the body's bytes), and `chess`, which has queries and outputs of attention too (43 %). Bytes are those that "
    "are stored, not those that are read."
)


def sparse(share: int, method: str, options: str = "") -> str:
    """The pass."""
    return f"sparsify-activations{{method={method} sparsity={share / 100}{options}}}"


def methods(share: int) -> list[Row]:
    """Methods at one share; the part of low rank takes 5 % to 13 % of a layer's bytes, which zeros make up for."""
    ranks = {"r-sparse": " rank=8"}
    return [Row(f"{share} % zeros, {m}", sparse(share, m, ranks.get(m, ""))) for m in UNIFORM]


def searched(share: int) -> list[Row]:
    """Layers divide the zeros."""
    return [Row(f"{share} % zeros, {m}, {a}", sparse(share, m, f" allocation={a}")) for m, a in SEARCHED]


def on_eight_bits() -> list[Row]:
    quantize, ways = "quantize{scheme=w8a16}", ((25, "wina"), (50, "wina"), (50, "teal"))
    return [Row(f"{share} % zeros, {m}, w8a16", f"{sparse(share, m)},{quantize}") for share, m in ways]


ACTIVATION_ROWS = (
    *(row for share in SHARES for row in (*methods(share), *(searched(share) if share >= 50 else ()))),
    *on_eight_bits(),
)
ACTIVATION_GOALS: tuple[Goal, ...] = tuple(
    better(f"{new.upper()}, {way}, better than one limit for all layers at 50 %", f"50 % zeros, {new}, {way}",
           "50 % zeros, plain")
    for new, way in SEARCHED
)  # fmt: skip
