"""All of the ATen table: importing this fills it."""

from __future__ import annotations

from typing import Any

from torch import fx

from tilewright.frontend import (  # noqa: F401  (they enter their functions)
    aten_core,
    aten_hooks,
    aten_index,
    aten_make,
    aten_move,
    aten_nn,
    aten_reduce,
)
from tilewright.frontend.aten_complex import COMPLEX_TABLE, is_complex
from tilewright.frontend.table import TABLE, Lower

KNOWN = {*TABLE, *COMPLEX_TABLE}  # everything else is left to torch to take apart


def entry(node: fx.Node) -> Lower | None:
    """What lowers ``node``, if something does."""
    found: dict[Any, Lower] = COMPLEX_TABLE if involves_complex(node) else TABLE
    return found.get(node.target)


def involves_complex(node: fx.Node) -> bool:
    """Whether an operand or the result is complex."""
    return any(map(is_complex, (node, *node.args)))
