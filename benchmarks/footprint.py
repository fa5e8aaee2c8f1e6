"""What a compiled model costs besides its speed: compile time, load, first token, memory. One process a measurement.

    python -m benchmarks.footprint S M L --recipes O2 w4a8 --work out/bench --out benchmarks/results/footprint.json

Goals: compile the 1.1B shape under 45 s without stored kernels; load under 0.5 s; a peak resident size while running of at
most the packed weights, the KV caches and 150 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, PROMPT, DECODED = 2048, 512, 16
ALLOWED = 150e6


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def compile_here(folder: str, out: str, recipe: str) -> dict[str, Any]:
    import tilewright

    start = time.perf_counter()
    report = tilewright.compile(folder, out=out, max_length=LENGTH, passes=recipe).report
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "stages": report.seconds, "kernels": len(report.kernels), "peak_bytes": peak_bytes()}


def run_here(artifact: str, threads: int) -> dict[str, Any]:
    """Load, first tokens, and the peak once a long prompt and some decoding are done."""
    import numpy as np

    from tilewright.runtime import generate, load

    imported, start = peak_bytes(), time.perf_counter()
    program = load(artifact)
    out: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    high = program.manifest.entries["prefill"].inputs[0].high or 0
    random = np.random.default_rng(0)
    with program.session(threads) as session:
        for name, tokens in (("first_call", 1), ("prompt_1", 1), ("first_128", 128), ("prompt_128", 128)):
            prompt = [random.integers(0, high + 1, tokens)]
            start = time.perf_counter()
            generate(session, prompt, 1)
            out[f"{name}_seconds"] = time.perf_counter() - start
        times: list[float] = []
        prompt = [random.integers(0, high + 1, PROMPT)]
        generate(session, prompt, 1 + DECODED, callback=lambda step, tokens: times.append(time.perf_counter()))
        out["token_seconds"] = (times[-1] - times[0]) / DECODED
        generate(session, [random.integers(0, high + 1, LENGTH - DECODED)], DECODED)
        held = session.memory
    weights = program.manifest.files["weights.safetensors"].bytes
    allowed = weights + held["states"] + ALLOWED
    return out | {"imported_bytes": imported, "weight_bytes": weights, **{f"{k}_bytes": v for k, v in held.items()},
                  "peak_bytes": peak_bytes(), "peak_over_allowed": peak_bytes() / allowed,
                  "beyond_weights_and_states": peak_bytes() - weights - held["states"]}  # fmt: skip


def apart(*arguments: str, **environment: str) -> Any:
    """This file's hidden command in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.footprint", "--here", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, recipe: str, work: Path, threads: int, reuse: bool) -> dict[str, Any]:
    from benchmarks.peers import checkpoints
    from benchmarks.peers.shapes import SHAPES

    folder, artifact = work / f"checkpoint-{name}", work / f"{name}-{recipe}.tw"
    if not (folder / "config.json").is_file():
        checkpoints.make(SHAPES[name], folder)
    row: dict[str, Any] = {"model": name, "recipe": recipe}
    if not (reuse and artifact.is_dir()):
        with tempfile.TemporaryDirectory() as empty:  # no kernels kept from before
            row["compile"] = apart("compile", str(folder), str(artifact), recipe, XDG_CACHE_HOME=empty)
    return row | {"run": apart("run", str(artifact), str(threads))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["S", "M", "L"])
    parser.add_argument("--recipes", nargs="+", default=["O2"])
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse", action="store_true", help="run artifacts of an earlier run without compiling them")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        what, path, *rest = options.models
        print(json.dumps(compile_here(path, *rest) if what == "compile" else run_here(path, int(rest[0]))))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    cases = [(m, r) for m in options.models for r in options.recipes]
    rows = [measure(m, r, options.work, options.threads, options.reuse) for m, r in cases]
    text = json.dumps(rows, indent=1) + "\n"
    print(text, end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
