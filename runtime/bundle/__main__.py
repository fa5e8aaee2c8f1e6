"""``python -m tilewright.runtime.bundle run FOLDER --out results.jsonl``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tilewright.runtime.bundle.run import Options, Run
from tilewright.runtime.errors import ArtifactError, DeviceError
from tilewright.runtime.measuring import duration

_INTERRUPTED = 130
_WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tilewright.runtime.bundle", description="Measure kernels on this GPU.")
    run = top.add_subparsers(required=True, metavar="run").add_parser("run", help="check and time all kernels of a bundle")
    run.add_argument("folder", type=Path, help="what `tilewright tune MODEL --emit-bundle` wrote")
    run.add_argument("--out", type=Path, default=Path("results.jsonl"), help="file for `tilewright tune db import`")
    run.add_argument("--budget", default="5m", help="about how long to take: 90s, 20m (default: 5m)")
    run.add_argument("--check-only", action="store_true", help="compare results with the reference, time nothing")
    run.add_argument("--device", type=int, default=0, help="which GPU")
    run.add_argument("--timeout", default="30s", help="for one candidate (default: 30s)")
    run.add_argument("--driver", help="the driver's library, where it is not found as libcuda.so.1")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all kernels are right, else 1."""
    top = parser()
    given = top.parse_args(arguments)
    if given.out.suffix != ".jsonl":
        top.error(f"--out {given.out}: a file of measurements is called NAME.jsonl")
    try:
        budget = None if given.check_only else duration(given.budget)
        options = Options(given.device, given.driver, budget, duration(given.timeout))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        return measure(Run(given.folder, options, show, lambda results: results.write(given.out)), given.out)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (ArtifactError, DeviceError, OSError, ValueError) as error:
        show("")
        print(f"error: {error}", file=sys.stderr)
        return 1


def measure(run: Run, out: Path) -> int:
    """Run a bundle, write what came of it and print it; what was measured before Ctrl-C counts."""
    results, code = run.open(), 0
    try:
        run.measure(results)
    except KeyboardInterrupt:
        code = _INTERRUPTED
        results.about["interrupted"] = "what was not tried is missing"
    show("")
    results.write(out)
    print(results.page())
    print(f"wrote {out} and {out.with_suffix('.md')}; `tilewright tune db import {out}` takes the measurements")
    return code or (0 if results.all_right else 1)


def show(text: str) -> None:
    """How far it is, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:_WIDTH]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
