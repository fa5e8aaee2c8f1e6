"""The table of schemes: a format for weights, and whether activations are rounded too. One more scheme is one row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from tilewright.ir import DType, PassError
from tilewright.passes.formats.base import Format
from tilewright.passes.formats.codebook import Codebook, NormalFloat
from tilewright.passes.formats.floats import Floats, Microscaling
from tilewright.passes.formats.integers import Integers
from tilewright.passes.formats.ternary import Ternary
from tilewright.passes.formats.two_level import TwoLevel


@dataclass(frozen=True)
class Scheme:
    """``bits`` a weight takes as the format stands here, but for what is stored once a row.

    ``activations`` are the bits of a linear layer's inputs, rounded at run time with a scale a token; None leaves them.
    """

    format: Format
    activations: int | None
    bits: float
    summary: str
    paper: str = ""

    def with_options(self, name: str, **given: Any) -> Format:
        """The format with the options that are not None; raises PassError for one that the scheme ``name`` lacks."""
        known = self.format.options
        for option in [o for o, value in given.items() if value is not None and o not in known]:
            has = ", ".join(known) or "none"
            raise PassError(f"the scheme {name} has no option {option!r}; of group and zero it has {has}")
        return replace(self.format, **{o: value for o, value in given.items() if value is not None})


_W8 = "eight bits, a scale an output channel"
_W4 = "four bits; groups keep more of the quality than a scale an output channel"

SCHEMES: dict[str, Scheme] = {
    "w8a16": Scheme(Integers(8), None, 8, f"{_W8}; products in floats"),
    "w8a8": Scheme(Integers(8), 8, 8, f"{_W8}; products of integers", "arXiv:2206.01861"),
    "w4a16": Scheme(Integers(4), None, 4, _W4, "arXiv:2210.17323"),
    "w4a8": Scheme(Integers(4), 8, 4, f"{_W4}; products of integers", "arXiv:2303.08302"),
    "w3a16": Scheme(Integers(3, group=128), None, 3.125, "three bits in groups of 128", "arXiv:2210.17323"),
    "w3a8": Scheme(Integers(3, group=128), 8, 3.125, "three bits in groups of 128; products of integers"),
    "w2a16": Scheme(Integers(2, group=64), None, 2.25, "two bits in groups of 64", "arXiv:2407.00088"),
    "w2a8": Scheme(Integers(2, group=64), 8, 2.25, "two bits in groups of 64; products of integers", "arXiv:2407.00088"),
    "ternary": Scheme(Ternary(), 8, 2, "-1, 0 and 1, for models trained so; products of integers", "arXiv:2402.17764"),
    "ternary-a16": Scheme(Ternary(), None, 2, "-1, 0 and 1, for models trained so", "arXiv:2402.17764"),
    "fp8": Scheme(Floats(), None, 8, "floats of eight bits, four of them exponents", "arXiv:2209.05433"),
    "fp8-e5m2": Scheme(Floats(DType.f8e5m2), None, 8, "floats of eight bits, five of them exponents", "arXiv:2209.05433"),
    "mxfp4": Scheme(Microscaling(), None, 4.25, "floats of four bits, powers of two for 32 each", "OCP Microscaling 1.0"),
    "nf4": Scheme(NormalFloat(), None, 4.25, "quantiles of the normal distribution", "arXiv:2305.14314"),
    "codebook4": Scheme(Codebook(4), None, 4, "sixteen numbers a row, fitted by k-means", "arXiv:2306.07629"),
    "codebook3": Scheme(Codebook(3), None, 3, "eight numbers a row, fitted by k-means", "arXiv:2306.07629"),
    "two-level": Scheme(TwoLevel(), 8, 4.125, "four bits that expand to eight; products of integers", "arXiv:2405.04532"),
}
"""What the option ``scheme`` of the pass ``quantize`` may be."""


def find_scheme(name: str) -> Scheme:
    """The scheme ``name``; raises PassError with those that exist."""
    if name not in SCHEMES:
        close = get_close_matches(name, SCHEMES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise PassError(f"there is no scheme {name!r}{hint}; there are {', '.join(SCHEMES)}")
    return SCHEMES[name]
