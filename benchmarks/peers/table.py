"""Tables of results: the goals, then everything that was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.figures import DISTURBED, ENOUGH, SAME, Chosen, Series, best, series
from benchmarks.peers.peer import Variant
from benchmarks.peers.plan import jobs
from benchmarks.peers.results import Results, Sample
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import OWN, PEERS
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.works import WORKS, Work

UNITS = {"read": "GB/s", "f32": "GFLOP/s", "bf16": "GFLOP/s", "int8": "GOP/s"}


@dataclass(frozen=True)
class Row:
    """A work on a model: own figure beside that of the fastest peer. ``share``: of the limit that the goal names."""

    work: Work
    model: str
    task: str
    own: Series
    peer: Series | None
    ratio: Chosen | None
    share: Chosen | None

    @property
    def verdict(self) -> str:
        """``hit``, ``miss`` or empty where there is no goal or no peer to compare with."""
        checks = []
        if self.work.goal is not None and self.ratio is not None:
            median = self.ratio.spread.median
            checks.append(median <= self.work.goal if self.work.below else median >= self.work.goal)
        if self.share is not None and self.work.share is not None:
            checks.append(self.share.spread.median >= self.work.share)
        return "" if not checks else "hit" if all(checks) else "miss"

    @property
    def goal(self) -> str:
        parts = []
        if self.work.goal is not None:
            parts.append(f"{'<=' if self.work.below else '>='} {self.work.goal:g}x")
        if self.share is not None and self.work.share is not None:
            parts.append(f">= {self.work.share:.0%} of {self.work.of}")
        return ", ".join(parts)

    def cells(self) -> list[str]:
        """The texts of a row."""
        other = f"{name(self.peer)} {figure(self.peer)}" if self.peer else ""
        ours = f"{self.own.variant} {figure(self.own)}"
        ratio = ranged(self.ratio, ".2f") if self.ratio else ""
        share = ranged(self.share, ".0%", UNITS[self.work.of]) if self.share else ""
        return [self.work.name, self.model, self.task, ours, other, ratio, share, self.goal, self.verdict]


def ranged(chosen: Chosen, form: str, unit: str = "GB/s") -> str:
    """Median, range and rounds; where the limit, in ``unit``, had several values, the median at each."""
    spread, states = chosen.spread, chosen.states()
    text = f"{spread.median:{form}} ({spread.low:{form}}-{spread.high:{form}}), {chosen.rounds}"
    if len(states) < 2:
        return text
    return "; ".join([text, *(f"{some.median:{form}} at {limit:.0f} {unit}" for limit, some in states)])


HEAD = ("work", "model", "task", "tilewright", "fastest peer", "ratio", "of limit", "goal", "")
DETAILS = ("model", "system", "variant", "task", "median", "min", "max", "IQR", "unit", "rounds", "load s", "peak MB")


def name(one: Series) -> str:
    return f"{PEERS[one.system].title} {one.variant}" if one.system in PEERS else one.system


def figure(one: Series) -> str:
    return f"{one.spread.median:.4g} {TASKS[one.task].unit}"


def variant_of(one: Series) -> Variant | None:
    """The declaration of what was measured; None when it is gone."""
    peer = PEERS.get(one.system)
    return next((variant for variant in peer.variants if variant.name == one.variant), None) if peer else None


def goal_rows(samples: Sequence[Sample], works: Iterable[Work] = WORKS) -> list[Row]:
    """A row for each work, model and task with an own figure."""
    known = [(one, variant) for one in series(samples) if (variant := variant_of(one)) is not None]
    found = []
    for work in works:
        for model in work.models:
            for task in work.tasks:
                here = [(one, variant) for one, variant in known if (one.model, one.task) == (model, task)]
                own = best([one for one, variant in here if one.system == OWN and work.own(variant)])
                peer = best([one for one, variant in here if one.system != OWN and work.peers(variant)
                             and (not work.systems or one.system in work.systems)])  # fmt: skip
                if own is not None:
                    ratio = own.ratios(peer) if peer else None
                    found.append(Row(work, model, task, own, peer, ratio, share_of_limit(work, own)))
    return found


def share_of_limit(work: Work, own: Series) -> Chosen | None:
    """How much of the limit that the goal names own runs reached; None where it names none for this model."""
    if work.share is None or own.model != "L":
        return None
    used = demand(own)
    return own.shares(work.of, used) if used else None


def demand(own: Series) -> float | None:
    """Bytes that a task must read, or operations that it must do."""
    facts, shape = next(iter(own.by_round.values()))["facts"], SHAPES[own.model]
    if own.task == "decode":
        context, tokens = TASKS["decode"].arguments
        cache = facts["cache_bytes"] / facts["capacity"] * (context + tokens / 2)
        return float(tokens * (facts["step_bytes"] + cache))
    if own.task == "attention":
        near, far = TASKS["attention"].arguments
        return float(facts["cache_bytes"] / facts["capacity"] * (far - near))
    if own.task == "prefill":
        return float(2 * TASKS["prefill"].work * shape.layer_parameters)
    return None


def not_measured(samples: Sequence[Sample]) -> list[str]:
    """Of the models that were measured: what the works ask for, and has no figure."""
    models = [model for model in SHAPES if any(s["model"] == model for s in samples)]
    known = {(one.model, one.system, one.variant) for one in series(samples)}
    return [str(job) for job in jobs(WORKS, models, PEERS, OWN) if (job.model, job.system, job.variant.name) not in known]


def detail_rows(samples: Sequence[Sample]) -> list[list[str]]:
    """A row for each system, model, variant and task."""
    found = []
    models, tasks = list(SHAPES), list(TASKS)
    order = sorted(series(samples), key=lambda s: (models.index(s.model), tasks.index(s.task), s.system, s.variant))
    for one in order:
        spread, unit = one.spread, TASKS[one.task].unit
        mine = list(one.by_round.values())
        load = statistics.median(s["load_seconds"] for s in mine)
        peak = max(s["peak_bytes"] for s in mine) / 1e6
        numbers = [f"{value:.4g}" for value in (spread.median, spread.low, spread.high, spread.iqr)]
        found.append([one.model, one.system, one.variant, one.task, *numbers, unit, str(len(spread.values)), f"{load:.2f}",
                      f"{peak:.0f}"])  # fmt: skip
    return found


def limit_lines(samples: Sequence[Sample]) -> list[str]:
    """The limits of the machine over the run."""
    lines = []
    for kind, unit in UNITS.items():
        values = [value for s in samples if "limits" in s for value in s["limits"][kind]]
        if values:
            lines.append(f"{kind} {statistics.median(values):.0f} {unit} ({min(values):.0f}-{max(values):.0f})")
    return lines


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def markdown(results: Results) -> str:
    """The whole page."""
    env, settings = results.environment, results.settings
    versions = "; ".join(f"{system}: {', '.join(pins)}" for system, pins in env.get("versions", {}).items())
    failures = [f"- {s['model']} {s['system']} {s['variant']} {s['task']}: {s['error'].splitlines()[-1]}"
                for s in results.samples if "error" in s]  # fmt: skip
    absent = not_measured(results.samples)
    parts = [
        f"# tilewright beside its peers on {env.get('cpu', '')} ({env.get('target', '')})",
        f"{settings.get('threads')} threads of {env.get('cores')} cores, {env.get('memory_gib')} GiB, Linux "
        f"{env.get('kernel')}, {env.get('date')}, commit {env.get('commit')}"
        + (f", each command under `{settings['prefix']}`" if settings.get("prefix") else "") + ".",
        f"Limits, measured before and after each sample (median, range): {'; '.join(limit_lines(results.samples))}.",
        "Systems that are compared stay loaded and take turns; a sample is what one reached in one turn, within seconds "
        "of those of the others. A ratio is the median over rounds of own figure / peer's figure of the same round "
        "(range in brackets). As the speed of memory changes with time, decoding is compared in rounds in which it was "
        f"the same before and after both samples, within {SAME - 1:.0%}; a share of a limit is taken within a sample, "
        "where the limit was the same before and after. `5/7`: so many of all rounds are such, and used; `all 7`: fewer "
        f"than {ENOUGH} are, all are used, and the figure is uncertain. `1.2 at 35 GB/s`: the median of rounds in which "
        f"memory had that speed. Samples during which other processes took more than {DISTURBED:.0%} of the machine are "
        "left out where there are others. A peer is not measured again when the first round showed another one, with "
        "weights as wide, to be twice as fast.",
        "## Goals", text_table(HEAD, [row.cells() for row in goal_rows(results.samples)]),
        "## All measurements", text_table(DETAILS, detail_rows(results.samples)),
        *(["## Not measured", ", ".join(absent)] if absent else []),
        *(["## Failures", "\n".join(failures)] if failures else []),
        "## Versions", versions,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def console_table(results: Results) -> None:
    """The goals on the terminal."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEAD, title="; ".join(limit_lines(results.samples)))
    for row in goal_rows(results.samples):
        shown.add_row(*row.cells(), style={"hit": "green", "miss": "red"}.get(row.verdict))
    Console().print(shown)
