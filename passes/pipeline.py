"""Running passes in order, with verification, timing and printing between them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from tilewright.ir import Module, ParseError, PassError, TilewrightError, VerifyError, print_module, verify
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.named import NAMED
from tilewright.passes.text import Item, make_pass, parse_items

OnPass = Callable[[Pass, Module], None]


@dataclass(frozen=True)
class PassReport:
    """What one pass did: wall time, growth of the process's peak memory, number of operations."""

    text: str
    seconds: float
    peak_bytes: int
    ops_before: int
    ops_after: int
    changed: bool
    skipped: str | None = None
    """Why the pass did not run, if it did not."""


@dataclass
class PipelineReport:
    """What a pipeline did, a row a pass; ``ctx`` holds skips and notes."""

    ctx: PassContext
    rows: list[PassReport] = field(default_factory=list)

    def table(self) -> str:
        """The rows as text."""
        lines = [f"{'pass':40} {'ms':>8} {'MiB':>7} {'ops':>13}"]
        for r in self.rows:
            ops = r.skipped or f"{r.ops_before} -> {r.ops_after}"
            lines.append(f"{r.text:40} {r.seconds * 1e3:8.1f} {r.peak_bytes / 2**20:7.1f} {ops:>13}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes. ``str(pipeline)`` parses back to it."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read a comma list of passes and of names from ``NAMED``; raises ParseError or PassError with the column."""
        return cls(tuple(_expand(text, ())))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(
        self,
        module: Module,
        verify: bool = True,
        on_pass: OnPass | None = None,
        print_before: Collection[str] = (),
        print_after: Collection[str] = (),
        stop_after: str | None = None,
        ctx: PassContext | None = None,
        out: TextIO | None = None,
    ) -> PipelineReport:
        """Rewrite ``module`` in place.

        ``print_before`` and ``print_after`` hold names of passes (or ``all``) around which the IR goes to ``out``
        (stderr by default); ``stop_after`` names the pass after whose first run to stop. Raises PassError, naming the
        pass and those before it, when a pass fails or breaks the module, which is then left as the pass left it.
        """
        self._check_names({*print_before, *print_after, *([stop_after] if stop_after else [])} - {"all"})
        report = PipelineReport(ctx or PassContext())
        out = out or sys.stderr
        for i, p in enumerate(self.passes):
            _show(module, p, "before", print_before, out)
            report.rows.append(self._step(module, i, report.ctx, verify))
            _show(module, p, "after", print_after, out)
            if on_pass:
                on_pass(p, module)
            if p.name == stop_after:
                break
        return report

    def _check_names(self, wanted: set[str]) -> None:
        unknown = wanted - {p.name for p in self.passes}
        if unknown:
            raise PassError(f"the pipeline has no pass {', '.join(sorted(unknown))}; it is {self}")

    def _step(self, module: Module, index: int, ctx: PassContext, check: bool) -> PassReport:
        p = self.passes[index]
        before, text = _count(module), str(p)
        reason = p.inapplicable(module)
        if reason is not None:
            ctx.notes.append((text, f"skipped: {reason}"))
            return PassReport(text, 0.0, 0, before, before, False, reason)
        ctx.current, start, peak = text, time.perf_counter(), _peak()
        where = f"pass {text} (number {index + 1}, after {', '.join(map(str, self.passes[:index])) or 'none'})"
        try:
            changed = p.run(module, ctx)
            if check:
                verify(module)
        except VerifyError as error:
            raise PassError(f"{where} broke the module: {error.message}", error.loc) from error
        except TilewrightError as error:
            error.add_note(f"raised by {where}")
            raise
        except Exception as error:
            raise PassError(f"{where} failed: {type(error).__name__}: {error}") from error
        return PassReport(text, time.perf_counter() - start, _peak() - peak, before, _count(module), changed)


def _expand(text: str, inside: tuple[str, ...]) -> Iterator[Pass]:
    for item in parse_items(text):
        if item.name not in NAMED:
            yield make_pass(item, text)
            continue
        _check_named(item, text, inside)
        yield from _expand(NAMED[item.name], (*inside, item.name))


def _check_named(item: Item, text: str, inside: tuple[str, ...]) -> None:
    if item.options:
        raise ParseError(f"the named pipeline {item.name} takes no options", 1, item.column + 1, text)
    if item.name in inside:
        raise PassError(f"the named pipelines {' -> '.join((*inside, item.name))} contain each other")


def _show(module: Module, p: Pass, when: str, wanted: Collection[str], out: TextIO) -> None:
    if p.name in wanted or "all" in wanted:
        out.write(f"// {when} {p}\n{print_module(module)}")


def _count(module: Module) -> int:
    return sum(len(f.body) for f in module.functions.values())


def _peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
