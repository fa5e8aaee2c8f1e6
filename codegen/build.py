"""Module -> files of an artifact: kernels compiled, weights packed, program written, everything linked.

    weights   file -> ``Weight.load`` -> ``pack`` -> weights.safetensors, one at a time
    kernels   kernel function -> emitter -> object; equal kernels were already made one by fusion
    program   ``Program.text`` -> program.c -> linked with the objects and the thread pool into kernels.so
    for a GPU  a cubin and its CUDA C for each kernel, and device.json, the list of their functions
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tilewright.codegen.cache import cache_layout
from tilewright.codegen.emitters import choose, pack, packed_spec
from tilewright.codegen.kernel import Emitter, KernelCode
from tilewright.codegen.link import link, native_objects
from tilewright.codegen.program import Program, behind, device_functions, entry_dims
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.store import KernelStore, kernel_key
from tilewright.codegen.target import Target
from tilewright.codegen.workers import Compilation, Job
from tilewright.ir import Dim, Function, Kept, Module, Ring, State, Value, Weight, canonical, dim_text, ops, print_module
from tilewright.runtime.artifact import (
    DEVICE,
    WEIGHTS,
    ArtifactWriter,
    DimSpec,
    EntrySpec,
    Extent,
    Manifest,
    StateSpec,
    TargetSpec,
    TensorSpec,
    WeightSpec,
    WeightsPlan,
    native_sources,
    plan_weights,
)

RULE = "rule"
Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel in the compile report."""

    name: str
    operations: str
    workload: str
    backend: str
    schedule: str
    code_bytes: int
    seconds: float
    calls: int
    stored: bool
    """Whether the code was found in the kernel store instead of being compiled."""
    chosen: str = RULE
    """Where the schedule is from."""
    resources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of each function on a GPU: registers a thread, bytes spilled, bytes of shared memory."""


@dataclass
class BuildReport:
    """What building did: a row a kernel, and bytes of weights by how they are stored."""

    kernels: list[KernelRow] = field(default_factory=list)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Build:
    """One build of ``module`` for ``target``.

    ``schedules`` overrides the default schedule of kernels by name, ``origins`` says where these are from; ``store`` keeps
    compiled kernels between builds. Without ``weights`` the artifact only says where they lie.
    """

    module: Module
    target: Target
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = lambda stage, done, total: None
    store: KernelStore | None = None
    weights: bool = True
    report: BuildReport = field(default_factory=BuildReport)

    def write(self, out: ArtifactWriter, meta: Mapping[str, str]) -> Manifest:
        """Put all files but the report into ``out``; gives the manifest to commit it with.

        Raises CodegenError when a kernel cannot be lowered or the tool chain fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            codes = self.timed("kernels", lambda: self.compile_kernels(Path(folder)))
            offsets = self.timed("weights", lambda: self.write_weights(out, codes))
            source = Program(self.module, codes, offsets).text()
            out.add("program.c", source)
            self.timed("link", lambda: self.link(Path(folder), codes, out))
        self.add_device_code(out, codes)
        out.add("ir.twir", print_module(self.module))
        return self.manifest(meta)

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.report.seconds[stage] = time.perf_counter() - start
        return result

    def compile_kernels(self, folder: Path) -> dict[str, KernelCode]:
        calls: dict[str, int] = {}
        for op in self.module.ops(ops.Call):
            assert isinstance(op, ops.Call)
            calls[op.callee] = calls.get(op.callee, 0) + 1
        jobs = {name: self.job(self.module.functions[name]) for name in calls}
        codes = {n: code for n, job in jobs.items() if self.store and (code := self.store.get(job.key))}
        work = Compilation([j for n, j in jobs.items() if n not in codes], self.target, self.module.dims)
        stored, seconds = len(codes), {}
        for i, code in enumerate(work.run(lambda done: self.progress("kernels", stored + done, len(calls)))):
            name = work.jobs[i].kernel.name
            codes[name], seconds[name] = code, work.seconds.get(i, 0.0)
            if self.store:
                self.store.put(work.jobs[i].key, code)
        self.progress("kernels", len(calls), len(calls))
        if self.store:
            self.store.prune()
        for name, count in calls.items():
            if codes[name].device is None:
                (folder / f"{name}.o").write_bytes(codes[name].object)
            made = row(jobs[name], codes[name], seconds.get(name), count)
            self.report.kernels.append(replace(made, chosen=self.origins.get(name, RULE)))
        return codes

    def job(self, kernel: Function) -> Job:
        """How ``kernel`` is compiled."""
        emitter: Emitter = choose(kernel, self.target)
        schedule = self.schedules.get(kernel.name) or emitter.default_schedule(kernel, self.target)
        return Job(kernel, emitter.name, schedule, kernel_key(kernel, emitter, schedule, self.target))

    def write_weights(self, out: ArtifactWriter, codes: Mapping[str, KernelCode]) -> dict[tuple[str, str], int]:
        """Pack and store every weight in each layout that a kernel wants; gives offsets by (weight, packing)."""
        wanted = self.wanted_weights(codes)
        keys = {(w.name, p): f"{w.name}|{p}" if p else w.name for w, p in wanted}
        specs = [WeightSpec(keys[w.name, p], *packed_spec(w.tensor, p)) for w, p in wanted]
        for (_, packing), spec in zip(wanted, specs):
            kind = packing.split("{")[0] or "plain"
            self.report.weight_bytes[kind] = self.report.weight_bytes.get(kind, 0) + spec.size
        plan = plan_weights(specs)
        if self.weights:
            self.write_numbers(out, plan, wanted)
        else:
            out.add(WEIGHTS, plan.header)
        return {key: plan.offsets[name] for key, name in keys.items()}

    def write_numbers(self, out: ArtifactWriter, plan: WeightsPlan, wanted: Sequence[tuple[Weight, str]]) -> None:
        with out.weights(plan) as stream:
            for i, ((weight, packing), spec) in enumerate(zip(wanted, plan.specs)):
                self.progress("weights", i, len(wanted))
                stream.write(spec.name, pack(weight.load(), packing, weight.dtype))
                weight.release()
        self.progress("weights", len(wanted), len(wanted))

    def wanted_weights(self, codes: Mapping[str, KernelCode]) -> list[tuple[Weight, str]]:
        found: dict[tuple[Weight, str], None] = {}
        for function in self.module.entries():
            for op in function.walk(ops.Call):
                assert isinstance(op, ops.Call)
                for i, value in enumerate(map(behind, op.args)):
                    if isinstance(value, Weight):
                        found[value, codes[op.callee].packing.get(i, "")] = None
            for value in map(behind, function.returns):
                if isinstance(value, Weight):
                    found[value, ""] = None
        return list(found)

    def link(self, folder: Path, codes: Mapping[str, KernelCode], out: ArtifactWriter) -> None:
        sources = native_sources()
        objects = [folder / f"{name}.o" for name, code in codes.items() if code.device is None]
        objects += native_objects(folder, sources, self.target)
        headers = sorted({p.parent for p in sources})
        link(folder, objects, [out.path("program.c")], headers, out.path("kernels.so"), self.target)

    def add_device_code(self, out: ArtifactWriter, codes: Mapping[str, KernelCode]) -> None:
        """What the runtime loads onto a GPU, and the sources, to be read."""
        functions = []
        for name, symbol in device_functions(codes):
            code = codes[name].device
            assert code is not None
            shared = max(launch.shared for launch in code.launches if launch.symbol == symbol)
            about = " ".join(op.name for op in self.module.functions[name].body[:-1])
            functions.append({"kernel": name, "symbol": symbol, "shared": shared, "operations": about})
        if not functions:
            return
        for name in dict.fromkeys(item["kernel"] for item in functions):
            code = codes[name].device
            assert code is not None
            out.add(f"{name}.cubin", codes[name].object)
            out.add(f"{name}.cu", code.source)
        out.add(DEVICE, json.dumps({"functions": functions}, indent=1) + "\n")

    def manifest(self, meta: Mapping[str, str]) -> Manifest:
        entries = {f.name: self.entry(f) for f in self.module.entries()}
        states = tuple(self.state(s) for s in self.module.states.values())
        target = TargetSpec(self.target.text, tuple(self.target.required_features))
        return Manifest(target, entries, states, dict(meta))

    def state(self, value: Value) -> StateSpec:
        kind, layout = value.cache, cache_layout(value.cache, self.target)
        assert value.name is not None
        sizes = layout.k_bytes, layout.v_bytes, kind.length
        chunk = kind.layout.chunk if isinstance(kind.layout, (Ring, Kept)) else 0
        own = [part.nbytes for part in layout.own(1)]
        return StateSpec(value.name, kind.dtype.value, *sizes, str(kind.layout), kind.page, chunk, kind.keeps_recent, *own)

    def entry(self, function: Function) -> EntrySpec:
        dims = tuple(DimSpec(n, *self.module.dims[n]) for n in entry_dims(self.module, function))
        names = output_names(self.module, function)
        inputs = tuple(self.tensor(a.name or "", a, bound=table_rows(self.module, a)) for a in function.args)
        outputs = tuple(self.tensor(n, v) for n, v in zip(names, function.returns))
        stateful = any(isinstance(v, State) for op in function.body for v in op.operands)
        return EntrySpec(dims, inputs, outputs, extent(function.args[0].shape[0]) if stateful else None)

    def tensor(self, name: str, value: Value, bound: int | None = None) -> TensorSpec:
        limits = () if bound is None else (0, bound - 1)
        return TensorSpec(name, value.dtype.value, tuple(map(extent, value.shape)), *limits)


def row(job: Job, code: KernelCode, seconds: float | None, calls: int) -> KernelRow:
    """The report's row of a kernel; without ``seconds`` it was found in the store."""
    names = " ".join(op.name for op in job.kernel.body[:-1])
    how = (job.family, str(job.schedule), len(code.object), seconds or 0.0)
    used = code.device.resources if code.device else {}
    return KernelRow(job.kernel.name, names, canonical(job.kernel), *how, calls, seconds is None, resources=used)


def extent(dim: Dim) -> Extent:
    """A dim as the manifest says it: expressions are left to the program."""
    if isinstance(dim, int):
        return dim
    return dim_text(dim) if dim.is_Symbol else None


def output_names(module: Module, function: Function) -> list[str]:
    """Names of the results: those that the frontend or a pass noted, else ``output0``, ``output1``, ..."""
    noted = module.meta.get(f"outputs.{function.name}") or module.meta.get("outputs", "[]")
    names: list[str] = json.loads(noted)
    count = len(function.returns)
    return identifiers(names) if len(names) == count else [f"output{i}" for i in range(count)]


def identifiers(names: Sequence[str]) -> list[str]:
    """The names as a manifest takes them: ``hidden_states.0`` is ``hidden_states_0``, and no two are equal."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = f"_{plain}" if not plain or plain[0].isdigit() else plain
        while plain in found:
            plain += "_"
        found.append(plain)
    return found


def table_rows(module: Module, value: Value) -> int | None:
    """Rows of the smallest embedding table that ``value`` indexes directly: its elements must stay below."""
    rows: list[int] = []
    for user in value.users:
        if isinstance(user, ops.Reshape):
            rows += [r for r in [table_rows(module, user.result)] if r is not None]
        if isinstance(user, ops.Call):
            args = module.functions[user.callee].args
            found = [table_rows(module, arg) for arg, given in zip(args, user.args) if given is value]
            rows += [r for r in found if r is not None]
        if isinstance(user, ops.Embedding) and user.indices is value and isinstance(user.table.shape[0], int):
            rows.append(user.table.shape[0])
    return min(rows, default=None)
