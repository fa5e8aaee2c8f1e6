"""What a pass is, and what it may report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tilewright.ir import Module, Rewriter, Skip


@dataclass
class PassContext:
    """Collects what the passes of one run say; ``options`` holds what the user gave to the compilation as a whole."""

    options: Mapping[str, Any] = field(default_factory=dict)
    skips: dict[Skip, str] = field(default_factory=dict)
    """Why patterns did not apply -> the text of the pass that tried."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(text of the pass, line) rows for the report."""
    current: str = ""
    """The text of the pass that runs now."""

    def take(self, rewriter: Rewriter) -> bool:
        """Keep the reasons that ``rewriter`` gathered; gives whether it changed anything."""
        for skip in rewriter.skips:
            self.skips.setdefault(skip, self.current)
        return rewriter.changed > 0

    def note(self, line: str) -> None:
        """Add a line about the running pass to the report."""
        self.notes.append((self.current, line))


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a whole module. Subclasses are frozen dataclasses; their fields are the options of the text form."""

    name: ClassVar[str] = ""

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> bool:
        """Rewrite ``module`` in place; gives whether anything changed."""

    def inapplicable(self, module: Module) -> str | None:
        """Why this pass has nothing to do with ``module`` (the pipeline then skips it), or None to run it."""
        return None

    def __str__(self) -> str:
        """The text that parses back to this pass; options at their default are left out."""
        from tilewright.passes.text import print_pass

        return print_pass(self)
