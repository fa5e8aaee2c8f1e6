"""The files of one kernel in a bundle: inputs, what it should give, and its code under several schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import xxhash

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.emitters import pack
from tilewright.codegen.facts import code_bytes
from tilewright.codegen.kernel import KernelCode, Launch
from tilewright.codegen.schedule import Schedule, ScheduleError
from tilewright.codegen.store import KernelStore, kernel_key
from tilewright.codegen.workers import Job
from tilewright.costmodel.workload import Workload
from tilewright.ir import CodegenError, DType, KVType, Value, eval_dim, ops
from tilewright.measuring_inputs import CACHED, PERIOD, Array, Operand, Subject, make_inputs, roles
from tilewright.measuring_reference import expected
from tilewright.runtime.artifact import ArtifactWriter, WeightSpec, plan_weights
from tilewright.runtime.bundle.format import (
    ArraySpec,
    CandidateSpec,
    ExpectedSpec,
    LaunchSpec,
    ResultSpec,
    WorkloadSpec,
)
from tilewright.runtime.tolerance import Expected
from tilewright.workloads import KernelTask

_LONGEST = 2000  # characters of an error that are kept


@dataclass
class BundleFiles:
    """What is in a bundle under construction. ``store`` keeps compiled kernels, ``seed`` is that of inputs."""

    writer: ArtifactWriter
    target: CudaTarget
    store: KernelStore
    seed: int
    arrays: dict[str, ArraySpec] = field(default_factory=dict)
    workloads: list[WorkloadSpec] = field(default_factory=list)
    schedules: int = 0

    @property
    def refused(self) -> int:
        return sum(bool(c.refused) for w in self.workloads for c in w.candidates)

    def write_arrays(self, arrays: dict[str, Array], file: str) -> None:
        """A file of arrays, each by its name and as long as it does not repeat itself."""
        if not arrays:
            return
        plan = plan_weights(WeightSpec(name, DType.of(a.dtype).value, (a.size,)) for name, a in arrays.items())
        with self.writer.weights(plan, file) as stream:
            for name, array in arrays.items():
                stream.write(name, array)


@dataclass
class KernelFiles:
    """One kernel on its way into a bundle."""

    files: BundleFiles
    kernel: KernelTask
    new: dict[str, Array] = field(default_factory=dict)
    packed: dict[tuple[int, str], str] = field(default_factory=dict)

    @cached_property
    def workload(self) -> Workload:
        return self.kernel.workload(self.files.target, 1)

    @cached_property
    def subject(self) -> Subject:
        return Subject.parse(self.workload.kernel, dict(self.workload.sizes), self.files.target)

    @cached_property
    def inputs(self) -> list[Operand]:
        return make_inputs(self.subject, self.files.seed)

    @property
    def file(self) -> str:
        return f"arrays-{len(self.files.workloads)}.safetensors"

    def add(self, schedules: Sequence[Schedule], progress: Callable[[str], None]) -> None:
        """Compile the kernel under each of ``schedules`` and put all it needs into the bundle. Raises InterpreterError."""
        name = self.kernel.task(self.files.target, 1, self.workload).name
        candidates = []
        for schedule in schedules:
            progress(name)
            candidates.append(self.candidate(schedule))
        subject, moved = self.subject, float(traffic(self.subject, self.inputs))
        record = {"key": self.workload.key, **asdict(self.workload)}
        arguments = tuple(self.argument(i) for i in range(len(subject.kernel.args)))
        spec = WorkloadSpec(name, record, self.kernel.frequency, moved, float(subject.flops()), arguments,
                            tuple(self.results()), tuple(candidates))  # fmt: skip
        self.files.write_arrays(self.new, self.file)
        self.files.workloads.append(spec)

    def candidate(self, schedule: Schedule) -> CandidateSpec:
        """The kernel under ``schedule``, its cubin and source in the bundle; or why there is none."""
        self.files.schedules += 1
        emitter, target = self.kernel.emitter, self.files.target
        key = kernel_key(self.kernel.kernel, emitter, schedule, target)
        try:
            code = self.files.store.get(key)
            if code is None:
                code = Job(self.kernel.kernel, emitter.name, schedule.validate(target), key).compile(target)
                self.files.store.put(key, code)
        except (CodegenError, ScheduleError) as error:
            return CandidateSpec(schedule.text, refused=str(error)[:_LONGEST] or "refused")
        assert code.device is not None
        name = f"kernels/{code.symbol}"
        self.files.writer.add(f"{name}.cubin", code.object)
        self.files.writer.add(f"{name}.cu", code.device.source)
        dims = self.subject.dims
        launches = tuple(spec for x in code.device.launches if (spec := self.launch(x)) is not None)
        packed = {i: self.pack(i, packing) for i, packing in code.packing.items()}
        scratch = tuple(eval_dim(size, dims) for size in code.scratch)
        numbers = tuple(dims[d] for d in code.dims)
        used = metrics(code, launches)
        return CandidateSpec(schedule.text, "", f"{name}.cubin", numbers, launches, scratch, packed, used)

    def launch(self, launch: Launch) -> LaunchSpec | None:
        """A grid for the workload's sizes; None where it does not run."""
        dims = self.subject.dims
        x, y, z = (eval_dim(d, dims) for d in launch.grid)
        when = launch.when
        runs = when is None or when[1] <= eval_dim(when[0], dims) <= when[2]
        return LaunchSpec(launch.symbol, (x, y, z), launch.block, launch.shared) if runs and x * y * z else None

    def argument(self, index: int) -> tuple[str, ...]:
        """The names of its arrays."""
        arg = self.subject.kernel.args[index]
        if isinstance(arg.type, KVType):
            return tuple(map(self.keep, self.subject.cache_before(index, self.inputs)))
        return (self.keep(pack(self.inputs[index], "", arg.dtype)),)

    def pack(self, index: int, packing: str) -> str:
        if (index, packing) not in self.packed:
            dtype = self.subject.kernel.args[index].dtype
            self.packed[index, packing] = self.keep(pack(self.inputs[index], packing, dtype))
        return self.packed[index, packing]

    def results(self) -> list[ResultSpec]:
        changed, found = self.subject.changed(), expected(self.subject, self.inputs)
        return [ResultSpec(changed.get(i), tuple(map(self.expect, own))) for i, own in enumerate(found)]

    def expect(self, want: Expected) -> ExpectedSpec:
        features = None if want.features is None else self.keep(want.features)
        return ExpectedSpec(self.keep(want.array), want.shape, want.narrow, want.codes, features, want.coded)

    def keep(self, array: Array) -> str:
        """The name of an array, which is in the bundle from now on."""
        dtype = DType.of(array.dtype).value
        flat = np.ascontiguousarray(array).reshape(-1)
        digest = xxhash.xxh3_128(f"{dtype} {array.shape}".encode())
        digest.update(memoryview(flat.view(np.uint8)))
        name = str(digest.hexdigest())
        if name not in self.files.arrays:
            stored = self.new[name] = beginning(flat)
            self.files.arrays[name] = ArraySpec(self.file, dtype, tuple(array.shape), stored.size)
        return name


def beginning(flat: Array) -> Array:
    """As much of an array as it repeats: inputs are made that way."""
    raw = flat.view(f"u{flat.itemsize}")
    return flat[:PERIOD] if flat.size > PERIOD and np.array_equal(raw[PERIOD:], raw[:-PERIOD]) else flat


def metrics(code: KernelCode, launches: Sequence[LaunchSpec]) -> dict[str, float]:
    """Of the functions that run: most registers, bytes spilled, most shared memory; and bytes of code of all."""
    assert code.device is not None
    used = [(code.device.resources[x.symbol], x.shared) for x in launches]
    return {
        "registers": float(max((row["registers"] for row, _ in used), default=0)),
        "spills": float(sum(row["spills"] for row, _ in used)),
        "shared_bytes": float(max((row["shared"] + dynamic for row, dynamic in used), default=0)),
        "code_bytes": float(code_bytes(code.object)),
    }


def traffic(subject: Subject, inputs: Sequence[Operand]) -> int:
    """Bytes that a call must read and write: of a cache what is filled, of a table that rows are taken from only those."""
    total = 0
    for value in (*subject.kernel.args, *subject.kernel.returns):
        if isinstance(value.type, KVType):
            total += cache_traffic(subject, value, inputs) if value in subject.kernel.args else 0
        elif not any(isinstance(r.op, ops.Embedding) and r.field == "table" for r in roles(value)):
            total += eval_dim(value.type.bytes, subject.dims)
    return total


def cache_traffic(subject: Subject, cache: Value, inputs: Sequence[Operand]) -> int:
    """Bytes of the slots of a cache that are read, or else of those that are written."""
    args, layout, length = list(subject.kernel.args), subject.layout(cache), cache.cache.length
    users = [op for op in subject.kernel.body if isinstance(op, CACHED)]
    slots = 0
    for op in users:
        tokens = subject.shape(op.k if isinstance(op, ops.Append) else op.q)[1]
        filled = int(inputs[args.index(op.start)].max()) + tokens if op.start in args else length
        slots = max(slots, tokens if isinstance(op, ops.Append) else filled)
    return subject.batch(cache) * (layout.k_bytes + layout.v_bytes) * min(slots, length) // layout.held
