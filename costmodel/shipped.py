"""The cost model that comes with the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tilewright.costmodel.model import CostModel

SHIPPED = Path(__file__).with_name("shipped.model")


@cache
def load_model(path: str | Path | None = None) -> CostModel:
    """The model in ``path``, or the shipped one; kept. Raises ModelError and SealedFileError."""
    return CostModel.load(path or SHIPPED)
