"""Programs on a GPU: the same entries and sessions, with weights, states and intermediate results in the GPU's memory.

The program is native code on the host that launches kernels (launch.h). The second time that a `Call` runs, its launches
are recorded as a graph, and from then on it is one launch: a decode step.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.brought import BroughtWeights
from tilewright.runtime.cuda import Device, Graph, Memory, Modules, Stream, pinned, pointers
from tilewright.runtime.dlpack import DeviceArray, is_on_gpu, read
from tilewright.runtime.errors import DeviceError, ProgramError, SessionError
from tilewright.runtime.jsonread import Node, parse
from tilewright.runtime.loader import Program, Weights
from tilewright.runtime.manifest import DTYPES, EntrySpec, Manifest, StateSpec
from tilewright.runtime.native import Library
from tilewright.runtime.session import Call, Session
from tilewright.runtime.states import States

SYNCHRONOUS = "TILEWRIGHT_CUDA_SYNC"
"""Set to 1, each kernel is waited for, so that an error names the one that failed."""
_LAUNCH_FAILED = 100
_INT = ctypes.c_int32


class _Launcher(ctypes.Structure):
    """``tw_device`` of launch.h."""

    _fields_ = [("launch", ctypes.c_void_p), ("copy", ctypes.c_void_p), ("wait", ctypes.c_void_p),
                ("stream", ctypes.c_void_p), ("functions", ctypes.c_void_p), ("failed", _INT), ("error", _INT)]  # fmt: skip


@dataclass(frozen=True)
class FunctionSpec:
    """A function that a program launches: the kernel it belongs to, its name in the cubin, and what it may use."""

    kernel: str
    symbol: str
    shared: int
    operations: str

    @staticmethod
    def read(node: Node) -> FunctionSpec:
        node.fields("kernel", "symbol", "shared", "operations")
        return FunctionSpec(node["kernel"].string(), node["symbol"].string(), node["shared"].integer(0, 1 << 20),
                            node["operations"].string())  # fmt: skip


def read_functions(text: str | bytes, where: str) -> list[FunctionSpec]:
    """What device.json lists. Raises a subclass of ArtifactError."""
    node = Node(parse(text, where), where)
    node.fields("functions")
    return [FunctionSpec.read(item) for item in node["functions"].items()]


class DeviceProgram(Program):
    """A loaded artifact whose weights and kernels are on a GPU."""

    def __init__(self, path: Path, manifest: Manifest, library: Library, weights: Weights | BroughtWeights, device: Device,
                 functions: Sequence[FunctionSpec], cubins: Mapping[str, bytes]) -> None:  # fmt: skip
        super().__init__(path, manifest, library, weights)
        self.device, self.functions = device, functions
        self.modules = Modules(device)
        found = [self.modules.function(cubins[f.kernel], f.symbol, f.shared) for f in functions]
        self.function_addresses = pointers(found)
        self.on_device = Memory(device, weights.size, f"the weights of {path}")
        if isinstance(weights, BroughtWeights):
            weights.on_device(self.on_device, device)
        else:
            self.on_device.fill(weights.address, weights.size)

    def session(self, threads: int | None = None, batch: int = 1, pages: int | None = None, memory: int | None = None
                ) -> Session:  # fmt: skip
        """Memory on the GPU to run the entries with; see ``Program.session``."""
        return DeviceSession(self, threads, batch, pages, memory)


class DeviceStates(States):
    """KV states in the GPU's memory."""

    def __init__(self, specs: Sequence[StateSpec], sequences: int, pages: int, stream: Stream) -> None:
        super().__init__(specs, sequences, pages)
        self.stream = stream

    def _allocate(self) -> list[Any]:
        found = []
        for part in self.parts:
            regions = "pages" if part.paged else "sequences"
            found.append(Memory(self.stream.device, part.bytes, f"{part.count} {regions} of cache {part.name}"))
            found[-1].zero()
        return found

    def _address(self, memory: Any) -> int:
        return int(memory.address)

    def _copy(self, memory: Any, begin: int, to: int, count: int) -> None:
        self.stream.device.use()
        self.stream.copy(memory.address + to, memory.address + begin, count)


class DeviceSession(Session):
    """A session on a GPU. Inputs and outputs are arrays of the host, copied on the way in and out.

    An input may also be an array on the GPU of any library that speaks DLPack; it is read where it is, and what it holds is
    not checked. With `on_device` outputs stay on the GPU.
    """

    program: DeviceProgram

    def on_device(self, entry: str, /, **inputs: Any) -> dict[str, DeviceArray]:
        """Runs ``entry``; the outputs, by name, are arrays on the GPU. Raises what calling the session raises."""
        call = self._bind(entry, inputs)
        assert isinstance(call, DeviceCall)
        call.copies = False
        call()
        return call.arrays()

    def _bind(self, entry: str, inputs: Mapping[str, Any]) -> Call:
        self.device.use()
        stream = self.work.handle if self.work else 0
        given = {name: read(v, f"{entry}({name})", stream) if is_on_gpu(v) else v for name, v in inputs.items()}
        return super()._bind(entry, given)

    def bind(self, entry: str, /, **inputs: Any) -> Call:
        """``entry`` with copies of its inputs (those on the GPU are not copied), to be run as often as wanted."""
        return self._bind(entry, {name: v if is_on_gpu(v) else copy.copy(v) for name, v in inputs.items()})

    def _open(self) -> None:
        self.device = self.program.device
        self.work: Stream | None = Stream(self.device)
        self._block: Memory | None = None
        address = self.device.driver.address
        wait = address("cuStreamSynchronize") if os.environ.get(SYNCHRONOUS) == "1" else None
        functions = ctypes.addressof(self.program.function_addresses)
        launch, copy = address("cuLaunchKernel"), address("cuMemcpyDtoDAsync_v2")
        self.launcher = _Launcher(launch, copy, wait, self.work.handle, functions, -1, 0)

    def _make_states(self, pages: int) -> States:
        assert self.work is not None
        return DeviceStates(self.program.manifest.states, self.batch, pages, self.work)

    def _call(self, entry: str, spec: EntrySpec, arrays: Sequence[Any], sizes: tuple[int, ...]) -> Call:
        return DeviceCall(self, entry, spec, arrays, sizes)

    def _run(self, call: Call) -> None:
        assert isinstance(call, DeviceCall)
        with self._lock:
            if self.work is None:
                raise SessionError("the session is closed; make another one from its program")
            self.device.use()
            for name, array in call.readable.items():
                self.work.to_device(call.input_memory[name].address, array)
            call.launch(self.work, self._arena_address(call.plan[1]))
            for name, array in call.outputs.items() if call.copies else ():
                self.work.to_host(array, call.output_memory[name].address)
            self._wait(call)

    def state_pointers(self, first: int) -> Any:
        """The KV states as the program takes them; the same object as long as they are where they are."""
        return self._states.pointers(first)

    def to_host(self, array: DeviceArray) -> np.ndarray[Any, Any]:
        """A copy of an array on the GPU."""
        with self._lock:
            if self.work is None:
                raise SessionError("the session is closed")
            self.device.use()
            out = np.empty(array.shape, array.dtype)
            self.work.to_host(out, array.address)
            self.work.wait()
            return out

    def _wait(self, call: Call) -> None:
        assert self.work is not None
        try:
            self.work.wait()
        except DeviceError as error:
            raise DeviceError(f"entry {call.entry!r} failed on {self.device.name}: {error}; with {SYNCHRONOUS}=1 the "
                              "kernel is named") from error  # fmt: skip

    def start(self, call: Call, arena: int) -> None:
        """Put the entry's launches on the stream. Raises DeviceError with the kernel that cannot be launched."""
        dims, states = call.plan[0], self._states.pointers(call.first) if call.spec.batch is not None else None
        code = self._library.run[call.entry](
            ctypes.addressof(self.launcher), dims, call.input_addresses, call.output_addresses, states,
            self.program.on_device.address, arena,
        )  # fmt: skip
        if code == _LAUNCH_FAILED:
            found = self.program.functions[self.launcher.failed]
            raise DeviceError(f"entry {call.entry!r}, kernel {found.kernel} ({found.operations}), function {found.symbol}: "
                              f"{self.device.driver.text(self.launcher.error)}")  # fmt: skip
        if code:
            raise ProgramError(f"entry {call.entry!r} failed with code {code}", code)

    def _arena_address(self, count: int) -> int:
        if self._block is None or self._block.bytes < count:
            self._block = None
            self._block = Memory(self.device, count, "intermediate results")
        return self._block.address

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held on the GPU: ``arena``, and ``states``; the weights are the program's."""
        return {"arena": self._block.bytes if self._block else 0, "states": self._states.bytes}

    def reset(self) -> None:
        """Forgets the states and gives all memory back; the next call starts from zeros."""
        with self._lock:
            self._block = None
            self._states.release()
            self.pages = self._page_pool(self.pages.count) if self.pages else None

    def close(self) -> None:
        """Gives the memory back. Waits for a running call; safe to repeat."""
        with self._lock:
            self._block = None
            self._states.release()
            if self.work is not None:
                self.work.close()
            self.work = None


class DeviceCall(Call):
    """A call with memory on the GPU for its inputs and outputs; ``inputs`` and ``outputs`` are the host's copies."""

    session: DeviceSession

    def __init__(self, session: DeviceSession, entry: str, spec: EntrySpec, arrays: Sequence[Any],
                 sizes: tuple[int, ...]) -> None:  # fmt: skip
        self.graph: Graph | None = None
        self._recorded: tuple[int, Any] = (0, None)
        self.runs = 0
        self.input_memory: dict[str, Memory] = {}
        self.output_memory: dict[str, Memory] = {}
        self.copies = True
        """Whether outputs are copied to the host."""
        super().__init__(session, entry, spec, arrays, sizes)

    def _place(self, arrays: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.readable = {name: array for name, array in self.inputs.items() if not isinstance(array, DeviceArray)}
        self.input_memory = self._memories(self.readable)
        self.output_memory = self._memories(self.outputs)
        given: dict[str, Any] = {**self.inputs, **self.input_memory}
        self.input_addresses = pointers([given[t.name].address for t in self.spec.inputs])
        self.output_addresses = pointers([self.output_memory[t.name].address for t in self.spec.outputs])

    def _memories(self, arrays: Mapping[str, Any]) -> dict[str, Memory]:
        device = self.session.device
        return {name: Memory(device, a.nbytes, f"{self.entry}({name})") for name, a in arrays.items()}

    def _array(self, shape: tuple[int, ...], dtype: str) -> Any:
        return pinned(self.session.device, shape, DTYPES[dtype])

    def arrays(self) -> dict[str, DeviceArray]:
        """The outputs where they are on the GPU."""
        ordinal, to_host = self.session.device.ordinal, self.session.to_host
        return {
            name: DeviceArray(memory.address, self.outputs[name].shape, self.outputs[name].dtype, ordinal, memory, to_host)
            for name, memory in self.output_memory.items()
        }

    def launch(self, stream: Stream, arena: int) -> None:
        """Put the kernels on the stream: one by one the first time, as a graph from the second on."""
        self.runs += 1
        if self.runs == 1:
            self.session.start(self, arena)
            return
        # made here, since nothing may be allocated while recording
        states = self.session.state_pointers(self.first) if self.spec.batch is not None else None
        if self.graph is None or self._recorded[0] != arena or self._recorded[1] is not states:
            self.graph = stream.record(lambda: self.session.start(self, arena))
            self._recorded = arena, states
        self.graph.run(stream)
