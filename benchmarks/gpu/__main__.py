"""The command line: see ``benchmarks/README.md``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import FORMATS, Sizes
from benchmarks.peers.shapes import GPU_SHAPES


def parser() -> argparse.ArgumentParser:
    """``prepare`` and ``run``."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Llama shapes on a GPU.")
    commands = top.add_subparsers(required=True, dest="command", metavar="prepare | run")
    prepare = commands.add_parser("prepare", help="compile everything into a folder; needs no GPU")
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("--target", default="cuda{arch=sm_90a}")
    prepare.add_argument("--shapes", default=",".join(GPU_SHAPES), help="some of %(default)s")
    prepare.add_argument("--formats", default=",".join(FORMATS), help="some of %(default)s")
    prepare.add_argument("--db", type=Path, help="a tuning database whose schedules to use")
    run = commands.add_parser("run", help="measure what prepare made")
    run.add_argument("folder", type=Path)
    run.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    run.add_argument("--minutes", type=float, default=8.0, help="peers that do not fit are left out (default: 8)")
    run.add_argument("--device", type=int, default=0)
    run.add_argument("--driver", help="the driver's library, where it is not found as libcuda.so.1")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.command == "prepare":
        from benchmarks.gpu.prepare import prepare

        shapes = [GPU_SHAPES[name] for name in given.shapes.split(",")]
        size = prepare(given.folder, shapes, given.formats.split(","), given.target, Sizes(), given.db)
        print(f"wrote {given.folder}: {size / 1e6:.1f} MB")
        return 0
    from benchmarks.gpu.running import run

    print(run(given.folder, given.out, given.minutes * 60, given.device, given.driver))
    return 0


if __name__ == "__main__":
    sys.exit(main())
