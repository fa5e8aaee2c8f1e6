"""Texts that ``tilewright inspect`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tilewright.report import CompileReport
from tilewright.runtime.artifact import EntrySpec, Manifest, TensorSpec
from tilewright.runtime.caches import CacheSizes


def describe(manifest: Manifest, report: CompileReport) -> str:
    """The artifact in a screenful: report, entries, states, files."""
    lines = [report.summary(), "entries"]
    lines += [f"  {name}{signature(entry)}" for name, entry in manifest.entries.items()]
    lines += caches(manifest)
    lines += ["files", *(f"  {name:24} {f.bytes:>14,} bytes" for name, f in sorted(manifest.files.items()))]
    return "\n".join(lines)


def caches(manifest: Manifest) -> list[str]:
    """A line for each kind of KV cache: how many there are, layout, element type, bytes."""
    kinds = Counter((s.layout, s.dtype, s.k_bytes + s.v_bytes, s.page) for s in manifest.states)
    lines = [f"  {count} x {layout} of {dtype}: {size:,} bytes {'a page' if page else 'a sequence'}"
             for (layout, dtype, size, page), count in kinds.items()]  # fmt: skip
    return ["kv caches", *lines] if lines else []


def cache_need(manifest: Manifest, tokens: int, sequences: int) -> str:
    """How many bytes of KV caches sequences of so many tokens need. Raises InputError."""
    need = CacheSizes.of(manifest.states).bytes(tokens, sequences)
    return f"{tokens:,} tokens x {sequences:,} sequences need {need:,} bytes of KV caches"


def signature(entry: EntrySpec) -> str:
    """``(ids: i64[B, S]) -> logits: f32[B, 4096]``."""
    inputs = ", ".join(map(tensor, entry.inputs))
    return f"({inputs}) -> {', '.join(map(tensor, entry.outputs))}"


def tensor(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype}[{', '.join('?' if d is None else str(d) for d in spec.shape)}]"


def kernel_table(report: CompileReport) -> str:
    """One line a kernel: calls, backend, schedule, code, operations."""
    lines = [f"{'kernel':8} {'calls':>5} {'backend':15} {'code':>8} {'ms':>6}  operations; schedule"]
    for k in report.kernels:
        head = f"{k['name']:8} {k['calls']:>5} {k['backend']:15} {k['code_bytes']:>8} {k['seconds'] * 1e3:>6.0f}"
        lines.append(f"{head}  {k['operations']}; {k['schedule']} ({k['chosen']})")
        lines += [f"{'':8} {resources(name, row)}" for name, row in k["resources"].items()]
    return "\n".join(lines)


def resources(function: str, used: Mapping[str, int]) -> str:
    """What a function on a GPU takes."""
    return f"{function}: {used['registers']} registers, {used['spills']} bytes spilled, {used['shared']} bytes shared"


def pass_table(report: CompileReport) -> str:
    """One line a pass: time, growth of peak memory, operations before and after."""
    lines = [f"{'pass':44} {'ms':>8} {'MiB':>7} {'operations':>13}"]
    for p in report.passes:
        ops = p["skipped"] or f"{p['ops_before']} -> {p['ops_after']}"
        lines.append(f"{p['text']:44} {p['seconds'] * 1e3:>8.1f} {p['peak_bytes'] / 2**20:>7.1f} {ops:>13}")
    return "\n".join(lines)


def layer_table(report: CompileReport) -> str:
    """One line a kernel call of the sample: error of the passes, error of the compiled kernel."""
    if not report.layers:
        return "no errors were measured; compile with --errors"
    lines = [f"{'passes':>10} {'kernel':>10}  layer; operations"]
    for row in report.layers:
        error = "-" if row["error"] is None else f"{row['error']:.2e}"
        lines.append(f"{error:>10} {row['kernel_error']:>10.2e}  {row['layer']}; {row['operations']}")
    return "\n".join(lines)


def sensitivity_table(report: CompileReport) -> str:
    """One line a layer, the most sensitive first: what compressing it alone changes."""
    if not report.sensitivity:
        return "no sensitivity was measured; compile with --calibration FILE --sensitivity"
    lines = [f"{'error':>10} {'KL':>10} {'perplexity':>11}  layer compressed alone"]
    for row in report.sensitivity:
        kl = f"{row['kl']:10.2e} {row['perplexity']:+11.3%}" if "kl" in row else f"{'-':>10} {'-':>11}"
        lines.append(f"{row['error']:10.2e} {kl}  {row['layer']}")
    return "\n".join(lines)
