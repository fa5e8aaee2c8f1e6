"""The compile report: what was done, how long it took, what it cost, and what was not done."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tilewright.runtime.errors import DamagedArtifactError

FILE = "report.json"
WORST = 3
"""Layers that a summary names."""


@dataclass
class CompileReport:
    """One compilation. Times are in seconds, sizes in bytes.

    ``passes``: text, seconds, growth of peak memory, operations before and after, or why it was skipped.
    ``kernels``: name, operations, workload, backend, schedule and where it is from (``chosen``: tuned, cost model or rule),
    bytes of code, seconds to compile, calls; on a GPU ``resources`` of each function: registers a thread, bytes spilled,
    bytes of static shared memory.
    ``fallbacks``: what was done in a slower or plainer way than asked, with the reason.
    ``layers``: error of each layer against the reference, when asked for.
    ``sensitivity``: what compressing each layer alone changes, the most sensitive first, when asked for.
    """

    model: str
    target: str
    pipeline: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    weight_bytes: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0
    passes: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def read(folder: str | Path) -> CompileReport:
        """The report of an artifact; raises DamagedArtifactError when there is none that this version wrote."""
        try:
            data = json.loads((Path(folder) / FILE).read_text())
        except (OSError, ValueError) as error:
            raise DamagedArtifactError(f"{folder}/{FILE}: cannot be read ({error}); compile the artifact again") from None
        known = set(CompileReport.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != known:
            raise DamagedArtifactError(f"{folder}/{FILE}: is not a compile report of this version; compile it again")
        return CompileReport(**data)

    def summary(self) -> str:
        """A few lines for people."""
        stages = ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds.items())
        stored = ", ".join(f"{kind} {b / 2**20:.1f} MiB" for kind, b in self.weight_bytes.items())
        lines = [
            f"{self.model} for {self.target}",
            f"  pipeline   {self.pipeline}",
            f"  time       {self.total_seconds:.1f} s ({stages})",
            f"  memory     {self.peak_bytes / 2**20:.0f} MiB at the most while compiling",
            f"  weights    {stored or 'none'}",
            f"  kv cache   {self.cache_bytes / 2**20:.1f} MiB a sequence",
            f"  kernels    {len(self.kernels)} distinct, {sum(k['calls'] for k in self.kernels)} calls",
        ]
        origins = Counter(k["chosen"].partition(",")[0] for k in self.kernels)
        lines.append(f"  schedules  {', '.join(f'{count} by {name}' for name, count in origins.most_common()) or 'none'}")
        lines += [f"  fallback   {line}" for line in self.fallbacks] or ["  fallbacks  none"]
        return "\n".join([*lines, *self.offenders()])

    def offenders(self) -> list[str]:
        """The layers that were measured to be worst, the worst first."""
        lines = [f"  worst      {row['layer']}: error {row['error']:.2e}" for row in worst(self.layers)]
        for row in self.sensitivity[:WORST]:
            kl = f", KL {row['kl']:.2e}, perplexity {row['perplexity']:+.3%}" if "kl" in row else ""
            lines.append(f"  sensitive  {row['layer']}: error {row['error']:.2e}{kl}")
        return lines


def worst(rows: list[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """The rows whose error against the traced model is largest, the largest first; those without one are left out."""
    return sorted((row for row in rows if row["error"]), key=lambda row: -row["error"])[:count]
