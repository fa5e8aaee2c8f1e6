"""A CUDA driver for tests: the runtime talks to it as to NVIDIA's, and kernels run on the emulated device."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cuda.emulator import compile_cpp
from tilewright.codegen.cuda.compile import prelude
from tilewright.runtime.bundle.format import Bundle


def fake_driver(artifact: Path, folder: Path) -> Path:
    """The driver's library for the kernels of an artifact, made in ``folder``."""
    functions = json.loads((artifact / "device.json").read_text())["functions"]
    sources = {f["kernel"]: (artifact / f"{f['kernel']}.cu").read_text() for f in functions}
    return library(sources, [(f["kernel"], f["symbol"]) for f in functions], folder)


def bundle_driver(bundle: Path, folder: Path, plants: Mapping[str, str] | None = None) -> Path:
    """The same for the candidates of a bundle; ``plants`` has C for the beginning of some of its kernels' functions."""
    found = Bundle.from_text((bundle / "manifest.json").read_text(), str(bundle))
    sources, functions = {}, []
    for candidate in (c for workload in found.workloads for c in workload.candidates if not c.refused):
        path = Path(candidate.cubin)
        text = (bundle / path.with_suffix(".cu")).read_text()
        if plant := (plants or {}).get(path.stem):
            text = re.sub(r"(__global__[^{]*\{)", rf"\1 {plant}", text)
        sources[path.stem] = text
        functions += [(path.stem, symbol) for symbol in dict.fromkeys(x.symbol for x in candidate.launches)]
    return library(sources, functions, folder)


def library(sources: Mapping[str, str], functions: Sequence[tuple[str, str]], folder: Path) -> Path:
    """A driver with the functions (source, symbol) of ``sources``."""
    text = ['#include "emulator.h"', prelude(), '#include "emulator_tail.h"']
    for name, source in sources.items():  # helper functions of kernels may have equal names
        text += [f"namespace {name}_ {{", source, "}"]
    rows = []
    for name, symbol in functions:
        entry = f"{name}_::{symbol}"
        rows.append(f'{{"{symbol}", [](void **p) {{ emu_call({entry}, p); }}, fake_pointers({entry}), 0}}')
    text += ["#include <vector>", "template <class... A> auto fake_pointers(void (*)(A...))",
             "{ return std::vector<bool>{std::is_pointer_v<A>...}; }"]  # fmt: skip
    text += [f"#define FAKE_KERNELS {', '.join(rows)}", '#include "fake_driver.h"']
    path, out = folder / "driver.cpp", folder / "libcuda.so"
    path.write_text("\n".join(text))
    compile_cpp(path, out, "-fvisibility=hidden")
    return out
