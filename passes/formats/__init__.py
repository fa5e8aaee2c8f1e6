"""How weights are stored in few bits: one file a family of formats, and the table of schemes that name them."""

from tilewright.passes.formats.base import Format, Params, Size, check_finite, round_to_nearest
from tilewright.passes.formats.schemes import SCHEMES, Scheme, find_scheme

__all__ = ["SCHEMES", "Format", "Params", "Scheme", "Size", "check_finite", "find_scheme", "round_to_nearest"]
