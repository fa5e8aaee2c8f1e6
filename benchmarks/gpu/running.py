"""Measures what was prepared: each part in a process of its own, ours first, peers as far as the time allows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import CACHES, Plan
from benchmarks.gpu.results import page, rows_of

ROOT = Path(__file__).parents[2]
_OWN_SECONDS = 150.0
"""That one part of ours may take at most."""
_TOLD = 600  # characters of what a process that failed printed


@dataclass(frozen=True)
class Part:
    """``module`` is run with ``request``; its results get the name ``at``, those of equal names are put together."""

    at: str
    module: str
    request: dict[str, Any]


def parts(plan: Plan) -> Iterator[Part]:
    """In order of importance; the limits are measured before and after our own."""
    own, peer = "benchmarks.gpu.own", "benchmarks.gpu.torch_peer"
    names = [m.name for m in reversed(plan.models)]
    yield Part("limits", own, {"part": "limits"})
    for model in reversed(plan.models):
        for format in model.formats:
            yield Part(f"{model.name} {format}", own, {"part": "model", "name": model.folder(format)})
    for cache in CACHES:
        yield Part(f"attention{cache}", own, {"part": "attention", "cache": cache})
    yield Part("product", own, {"part": "product"})
    yield Part("limits", own, {"part": "limits"})
    yield Part("torch products", peer, {"part": "products"})
    yield Part("torch attention", peer, {"part": "attention"})
    for compiled, what in ((False, "decode"), (False, "prefill"), (True, "decode"), (True, "prefill")):
        for name in names:
            label = "torch.compile" if compiled else "torch eager"
            yield Part(f"{name} {label}", peer, {"part": "model", "name": name, "what": what, "compiled": compiled})


@dataclass
class Run:
    """Results by the name of the part; what failed or was left out is in ``notes``."""

    folder: Path
    deadline: float
    device: int
    driver: str | None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def part(self, part: Part) -> None:
        """Run one part and keep what it says, as far as it comes."""
        is_own = part.module.endswith("own")
        left = self.deadline - time.monotonic()
        name = " ".join([part.at, part.request.get("what", "")]).strip()
        if left <= 0:
            self.notes.append(f"{name}: left out, the time was over")
            return
        request = {**part.request, "folder": str(self.folder.resolve()), "device": self.device}
        request |= {"driver": self.driver} if is_own else {}
        said, failed = ended(part.module, request, min(left, _OWN_SECONDS) if is_own else left)
        for line in said.splitlines():
            if line.startswith("{"):
                self.keep(part.at, json.loads(line))
        if failed:
            self.notes.append(f"{name}: {failed}")

    def keep(self, at: str, said: dict[str, Any]) -> None:
        """Samples of a part that is run twice are put together."""
        held = self.results.setdefault(at, {})
        for key, value in said.items():
            held[key] = [*held.get(key, []), *value] if isinstance(value, list) else value


def ended(module: str, request: dict[str, Any], seconds: float) -> tuple[str, str]:
    """The whole lines that a process prints, and what went wrong; it and its own processes have ended afterwards."""
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                               stderr=subprocess.PIPE, start_new_session=True, text=True)  # fmt: skip
    failed = ""
    try:
        said, errors = process.communicate(json.dumps(request) + "\n", timeout=seconds)
        if process.returncode:
            failed = errors.strip()[-_TOLD:] or f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        failed = f"not through after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if failed.startswith("not through"):
        said, _ = process.communicate()
    return said.rpartition("\n")[0], failed


def run(folder: Path, out: Path, seconds: float, device: int = 0, driver: str | None = None) -> str:
    """Measure everything, write ``out`` and a page beside it after each part, and give the page."""
    plan, started = Plan.read(folder), time.monotonic()
    work = Run(folder, started + seconds, device, driver)
    peers = has_torch()
    if not peers:
        work.notes.append("PyTorch with CUDA is not installed here: no peers")
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = ""
    for part in parts(plan):
        if peers or part.module.endswith("own"):
            work.part(part)
            shown = written(plan, work, out, time.monotonic() - started)
            progress(part.at, time.monotonic() - started)
    return shown


def written(plan: Plan, work: Run, out: Path, seconds: float) -> str:
    """Write the results; gives the page."""
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "target": plan.target, "commit": plan.commit,
        "seconds": round(seconds),
        **{key: work.results.get("limits", {}).get(key, "?") for key in ("device", "driver")},
        "torch": next((r["torch"] for r in work.results.values() if "torch" in r), "none"),
    }  # fmt: skip
    rows = rows_of(plan, work.results)
    shown = page(about, plan, rows, work.notes)
    data = {"about": about, "rows": {name: row.json() for name, row in rows.items()}, "samples": work.results,
            "notes": work.notes}  # fmt: skip
    for path, content in ((out, json.dumps(data, indent=1) + "\n"), (out.with_suffix(".md"), shown)):
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(content)
        os.replace(beside, path)
    return shown


def has_torch() -> bool:
    """Whether PyTorch is installed and has a GPU; looked at in another process, which gives all memory back."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def progress(at: str, seconds: float) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{seconds:.0f} s: {at}", end="", file=sys.stderr, flush=True)
