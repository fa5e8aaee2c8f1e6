"""What ran, and on what."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.systems import PEERS
from benchmarks.peers.workplace import ROOT, Workplace


def describe_machine(place: Workplace) -> dict[str, Any]:
    """CPU, memory, software."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "target": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": {name: list(peer.requirements) for name, peer in PEERS.items() if peer.requirements},
        "steps": step_seconds(place),
    }


def cpu_model() -> str:
    """The CPU as it calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_name() -> str:
    """The CPU's name in the compiler, for file names: ``znver4``."""
    from llvmlite import binding

    return str(binding.get_host_cpu_name())


def commit() -> str:
    """The commit of the checkout, with ``+`` when it has changes; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def step_seconds(place: Workplace) -> dict[str, float]:
    """Seconds that the steps of setup and models took."""
    stamps = sorted(place.folder("stamps").glob("*.json"))
    return {stamp.stem: json.loads(stamp.read_text())["seconds"] for stamp in stamps}
