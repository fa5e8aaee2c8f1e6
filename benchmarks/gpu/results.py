"""From samples to ratios, and to a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.gpu.plan import CACHES, GOALS, Plan, attention_bytes, decode_bytes, prefill_flops

Samples = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One figure over the rounds: the median, the least and the greatest. ``unit`` is empty for a ratio."""

    unit: str
    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float], unit: str = "") -> Row:
        return cls(unit, median(values), min(values), max(values))

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3g}{f' {self.unit}' if self.unit else ''} | {self.least:.3g} .. {self.greatest:.3g}"


def rows_of(plan: Plan, found: Samples) -> dict[str, Row]:
    """All figures that can be had from the samples so far, by name, in order."""
    return {name: row for part in (limit_rows, model_rows, attention_rows) for name, row in part(plan, found)}


def limit_rows(plan: Plan, found: Samples) -> Iterator[tuple[str, Row]]:
    for key, label in (("copy", "copied"), ("read", "read")):
        if values := found.get("limits", {}).get(key):
            yield f"memory, {label}", Row.of([v / 1e9 for v in values], "GB/s")
    for at, label in (("product", "tilewright"), ("torch products", "PyTorch")):
        if values := found.get(at, {}).get("product"):
            yield f"bf16 product of {plan.sizes.product}, {label}", Row.of([v / 1e12 for v in values], "TFLOP/s")


def model_rows(plan: Plan, found: Samples) -> Iterator[tuple[str, Row]]:
    """Speeds of each model and format, then ratios."""
    read = typical(found, "limits", "read")
    for model in plan.models:
        labels = [*model.formats, "torch eager", "torch.compile"]
        for label in labels:
            got = found.get(f"{model.name} {label}", {})
            for what, tokens in (("decode", 1), ("prefill", plan.sizes.prompt)):
                if what in got:
                    yield f"{model.name} {label} {what}", Row.of([tokens / s for s in got[what]], "tokens/s")
        for format in model.formats:
            got = found.get(f"{model.name} {format}", {})
            if "decode" in got and read:
                size = decode_bytes(model, format, plan.sizes)
                yield f"{model.name} {format} decode, of the bandwidth", Row.of([size / s / read for s in got["decode"]])
            bound = by_cublas(plan, found, model.name)
            if "prefill" in got and bound:
                yield f"{model.name} {format} prefill, of the time by cuBLAS", Row.of([bound / s for s in got["prefill"]])
            for peer in ("torch eager", "torch.compile"):
                for what in ("decode", "prefill"):
                    other = typical(found, f"{model.name} {peer}", what)
                    if what in got and other:
                        yield f"{model.name} {format} {what}, times {peer}", Row.of([other / s for s in got[what]])


def by_cublas(plan: Plan, found: Samples, name: str) -> float | None:
    """Seconds of a prompt's products alone: as PyTorch does them, else at the peak that was measured."""
    if seconds := typical(found, "torch products", f"{name} products"):
        return seconds
    peak = typical(found, "product", "product")
    (model,) = (m for m in plan.models if m.name == name)
    return prefill_flops(model, plan.sizes.prompt) / peak if peak else None


def attention_rows(plan: Plan, found: Samples) -> Iterator[tuple[str, Row]]:
    ours, read = found.get("attention", {}).get("attention"), typical(found, "limits", "read")
    if not ours:
        return
    size = attention_bytes(plan.heads, plan.sizes.attention)
    yield "attention", Row.of([1e6 * s for s in ours], "us")
    if read:
        yield "attention, of the bandwidth", Row.of([size / s / read for s in ours])
    if peer := typical(found, "torch attention", "attention"):
        yield "attention, times PyTorch", Row.of([peer / s for s in ours])
    for cache in filter(None, CACHES):
        if other := found.get(f"attention{cache}", {}).get("attention"):
            yield f"attention{cache}", Row.of([1e6 * s for s in other], "us")
            yield f"attention{cache}, times that of contiguous bf16", Row.of([median(ours) / s for s in other])


def typical(found: Samples, at: str, key: str) -> float | None:
    """The median of samples, None when there are none."""
    values = found.get(at, {}).get(key)
    return float(median(values)) if values else None


def page(about: Mapping[str, Any], plan: Plan, rows: Mapping[str, Row], notes: Sequence[str]) -> str:
    """In Markdown."""
    sizes, shapes = plan.sizes, ", ".join(f"{m.name}: {m.like}" for m in plan.models)
    lines = ["# Llama shapes on a GPU", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [f"Random weights ({shapes}). Decoding of batch 1 after {sizes.context} tokens; prefill of {sizes.prompt} "
              f"tokens; attention of one token to {sizes.attention} keys. Medians of rounds, and their range.", ""]
    lines += ["| goal | at least | measured |  |", "|---|---|---|---|", *map("| {} |".format, goals(rows)), ""]
    lines += ["| figure | median | range |", "|---|---|---|", *(f"| {name} | {row} |" for name, row in rows.items())]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""]).rstrip() + "\n"


def goals(rows: Mapping[str, Row]) -> Iterator[str]:
    """A line for each goal that was measured, or could have been."""
    for goal in GOALS:
        row = rows.get(goal.what)
        verdict = "not measured" if row is None else "met" if row.median >= goal.least else "missed"
        yield f"{goal.what} | {goal.least:g} | {'' if row is None else f'{row.median:.3g}'} | {verdict}"
