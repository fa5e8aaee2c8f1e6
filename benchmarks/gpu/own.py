"""What tilewright does on the GPU, and the GPU's limits: one part in a process of its own, lines of JSON as results.

    python -m benchmarks.gpu.own        # reads a request from its input

It imports the runtime and nothing of the compiler.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.gpu.plan import PRODUCT, ROUNDS, TOOLS, Plan, attention_folder
from tilewright.runtime import load
from tilewright.runtime.cuda import Device, Memory, Modules, Parameters, Stream, Timer
from tilewright.runtime.dlpack import DeviceArray

Say = Callable[[dict[str, Any]], None]
_THREADS, _READERS, _BLOCKS = 256, 512, 16
_SPREAD = 0.02
"""Random weights are between minus and plus this."""
_FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_COPIES = 8  # in a row


class Tools:
    """The kernels of tools.cu on a GPU."""

    def __init__(self, folder: Path, device: Device) -> None:
        self.device, self.stream = device, Stream(device)
        self.image, self.modules = (folder / TOOLS).read_bytes(), Modules(device)

    def launch(self, name: str, threads: int, *values: int | float) -> None:
        function = self.modules.function(self.image, f"tools_{name}", 0)
        self.stream.launch(function, (_BLOCKS * self.device.sms, 1, 1), threads, 0, Parameters(values))

    def array(self, *shape: int) -> DeviceArray:
        """Random numbers in bf16."""
        memory = Memory(self.device, 2 * math.prod(shape), "inputs")
        found = DeviceArray(memory.address, shape, np.dtype(ml_dtypes.bfloat16), self.device.ordinal, memory, self.read)
        self.write({"": found})
        return found

    def read(self, array: DeviceArray) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        return self.device.read(array.address, np.empty(array.shape, array.dtype))

    def write(self, arrays: Mapping[str, DeviceArray]) -> None:
        """Random numbers into all arrays: small floats, and any integers."""
        for array in arrays.values():
            kind = _FLOATS.get(array.dtype.name, "bytes")
            count = array.nbytes if kind == "bytes" else math.prod(array.shape)
            self.launch(kind, _THREADS, array.address, count, _SPREAD)
        self.stream.wait()

    def bandwidths(self, size: int) -> dict[str, list[float]]:
        """Bytes a second that are copied (each is read and written) and read."""
        a, b = (Memory(self.device, size, "bandwidth") for _ in range(2))
        for memory in (a, b):
            self.stream.fill(memory.address, 1, size)
        word = Memory(self.device, 4, "bandwidth")

        def copy() -> None:
            self.device.driver("cuMemcpyDtoDAsync_v2", b.address, a.address, size, self.stream.handle)

        def read() -> None:
            self.launch("read", _READERS, a.address, size // 16, word.address)

        return {"copy": [2 * size / s for s in self.seconds(copy)], "read": [size / s for s in self.seconds(read)]}

    def seconds(self, run: Callable[[], None]) -> list[float]:
        """Of each of several calls, by the GPU's clock."""
        timer, found = Timer(self.stream), []
        for _ in range(ROUNDS + 1):
            timer.start()
            for _ in range(_COPIES):
                run()
            timer.stop()
            found.append(max(timer.seconds(), 1e-9) / _COPIES)
        return found[1:]


def rounds(run: Callable[[], object], calls: int = 1) -> list[float]:
    """Seconds of a call, round by round; two before them warm up and record the graph."""
    found = []
    for _ in range(2 + ROUNDS):
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) / calls)
    return found[2:]


def limits(folder: Path, plan: Plan, device: Device, say: Say) -> None:
    say({"device": device.name, "driver": device.version, "memory": device.free()[1]})
    say(Tools(folder, device).bandwidths(plan.sizes.bandwidth))


def model(folder: Path, plan: Plan, device: Device, say: Say, name: str) -> None:
    """Decoding and prefill of an artifact."""
    sizes, zero = plan.sizes, np.zeros(1, np.int64)
    program = load(folder / name, weights=Tools(folder, device).write, device=device.ordinal)
    ids = np.random.default_rng(0).integers(0, program.manifest.entries["prefill"].inputs[0].high or 1, (1, sizes.prompt))
    with program.session() as session:
        prefill = session.bind("prefill", ids=ids, start=zero, last=zero + sizes.prompt - 1)
        say({"prefill": rounds(prefill)})
        step = session.bind("decode", ids=ids[:, :1], start=zero)

        def decode() -> None:
            for i in range(sizes.steps):
                step.inputs["start"][...] = sizes.context + i
                step()

        say({"decode": rounds(decode, sizes.steps), "memory": session.memory})


def attention(folder: Path, plan: Plan, device: Device, say: Say, cache: str) -> None:
    """One token's attention to many keys: seconds for each of the caches that it visits in turn."""
    sizes, heads, tools = plan.sizes, plan.heads, Tools(folder, device)
    keys, start = tools.array(1, sizes.attention, heads.keys, heads.dim), np.zeros(1, np.int64)
    with load(folder / attention_folder(cache), device=device.ordinal).session() as session:
        pages = range(session.pages.end - session.pages.count, session.pages.end) if session.pages else ()
        given = {"table": np.array([pages], np.int32)} if pages else {}
        session("fill", k=keys, v=keys, start=start, **given)
        q = tools.array(1, 1, heads.queries, heads.dim)
        step = session.bind("step", q=q, start=start + sizes.attention - 1, **given)
        step.copies = False
        say({"attention": rounds(step, sizes.caches)})


def product(folder: Path, plan: Plan, device: Device, say: Say) -> None:
    """Operations a second of a large matrix product in bf16."""
    tools, size = Tools(folder, device), plan.sizes.product
    program = load(folder / PRODUCT, weights=tools.write, device=device.ordinal)
    with program.session() as session:
        call = session.bind("forward", x=tools.array(size, size))
        call.copies = False
        say({"product": [2 * size**3 / s for s in rounds(call)]})


PARTS: dict[str, Callable[..., None]] = {"limits": limits, "model": model, "attention": attention, "product": product}


def main() -> None:
    """Serves one request: ``{"part", "folder", "device", "driver", ...}``."""
    import tilewright.runtime.cuda as cuda

    request = json.loads(sys.stdin.readline())
    folder, part = Path(request.pop("folder")), PARTS[request.pop("part")]
    ordinal, driver = request.pop("device"), request.pop("driver")
    if driver:
        cuda.LIBRARY = driver

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)

    part(folder, Plan.read(folder), Device(ordinal), say, **request)


if __name__ == "__main__":
    main()
