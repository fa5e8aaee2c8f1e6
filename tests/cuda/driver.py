"""A CUDA driver for tests: the runtime talks to it as to NVIDIA's, and kernels run on the emulated device."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cuda.emulator import HERE, compile_cpp
from tilewright.codegen.cuda.compile import prelude


def fake_driver(artifact: Path, folder: Path) -> Path:
    """The driver's library for the kernels of an artifact, made in ``folder``."""
    functions = json.loads((artifact / "device.json").read_text())["functions"]
    kernels = dict.fromkeys(f["kernel"] for f in functions)
    text = [f'#include "{HERE}/emulator.h"', prelude(), f'#include "{HERE}/emulator_tail.h"']
    for name in kernels:  # helper functions of kernels may have equal names
        text += [f"namespace {name}_ {{", (artifact / f"{name}.cu").read_text(), "}"]
    rows = []
    for f in functions:
        entry = f"{f['kernel']}_::{f['symbol']}"
        rows.append(f'{{"{f["symbol"]}", [](void **p) {{ emu_call({entry}, p); }}, fake_pointers({entry}), 0}}')
    text += ["#include <vector>", "template <class... A> auto fake_pointers(void (*)(A...))",
             "{ return std::vector<bool>{std::is_pointer_v<A>...}; }"]  # fmt: skip
    text += [f"#define FAKE_KERNELS {', '.join(rows)}", f'#include "{HERE}/fake_driver.h"']
    source, out = folder / "driver.cpp", folder / "libcuda.so"
    source.write_text("\n".join(text))
    compile_cpp(source, out, "-fvisibility=hidden")
    return out
