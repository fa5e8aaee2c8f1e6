"""TVM kernels for GPUs: tensor expression -> each stage a grid, a thread an element -> CUDA C, compiled like our own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from tilewright.codegen.cuda.source import Source
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.schedule import Schedule, Space, knob
from tilewright.codegen.tvm.emitter import (
    TvmEmitter,
    blocks_of,
    buffer_bytes,
    expressed,
    from_tvm,
    is_reduction,
    with_pointers,
)
from tilewright.ir import CodegenError, Dim, Function, as_dim, eval_dim, product

_FUNCTION = re.compile(r'^extern "C" __global__ void [^;{]*?(\w+)\(([^)]*)\) \{$(.*?)^\}$', re.MULTILINE | re.DOTALL)
_WORDS = {"int64_t": "i64", "uint64_t": "unsigned long long", "int32_t": "i32", "uint32_t": "u32", "int8_t": "i8",
          "uint8_t": "u8", "uint": "u32", "uchar": "u8", "ushort": "unsigned short",
          "CUDART_INF_F": "TW_INF", "CUDART_INF": "(f64)TW_INF"}  # fmt: skip


@dataclass(frozen=True)
class CudaTvmSchedule(Schedule):
    """``threads`` a block, each of one element."""

    name: ClassVar[str] = "cuda_tvm"
    threads: int = knob(256, (32, 64, 128, 256, 512))


class CudaTvmEmitter:
    """The long tail on a GPU: convolution, pooling, resizing, sorting, scatter, experts, batched matmul."""

    name: ClassVar[str] = "cuda.tvm"

    def match(self, kernel: Function, target: CudaTarget) -> str | None:
        return TvmEmitter().match(kernel, target)

    def default_schedule(self, kernel: Function, target: CudaTarget) -> Schedule:
        return CudaTvmSchedule()

    def space(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]) -> Space:
        return CudaTvmSchedule.space(target)

    def layouts(self, kernel: Function, target: CudaTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        op = kernel.body[0]
        total = max(product([eval_dim(d, sizes) for d in op.results[0].shape]), 1)
        return lambda schedule: {f"op.{op.name}": 1.0, "elements": log2(total)}

    def emit(self, kernel: Function, schedule: Schedule, target: CudaTarget, symbol: str) -> KernelCode:
        if (reason := self.match(kernel, target)) or not isinstance(schedule, CudaTvmSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {reason}")
        function, outputs = expressed(kernel)
        scheduled, sizes = stages(function, outputs, schedule.threads)
        between = scheduled.body.block.alloc_buffers
        source = Source(kernel, symbol, target, tuple(map(buffer_bytes, between)))
        given = [p.rsplit("*__restrict__ ", 1)[1] for p in source.parameters if "*" in p]
        names = {f"{b.name}_ptr": name for b, name in zip([*scheduled.params, *between], given)}
        for text, count in zip(device_functions(with_pointers(scheduled, source.dims)), sizes):
            name, parameters, body = text
            source.parts.append(f"TW_FN void {name}({parameters}) {{{body}}}")
            call = ", ".join(argument(p, names) for p in parameters.split(", "))
            grid = as_dim((count + (schedule.threads - 1)) // schedule.threads)
            source.function([f"{name}({call});"], schedule.threads, (grid, 1, 1))
        return source.code()


def stages(function: Any, outputs: Sequence[str], threads: int) -> tuple[Any, list[Dim]]:
    """What can be taken in is, and every other stage becomes a grid; gives the elements of each, too."""
    from tvm import s_tir

    sch = s_tir.Schedule(function)
    for block in blocks_of(sch):
        if sch.get(block).name_hint not in outputs and not is_reduction(sch, block):
            with suppress(s_tir.ScheduleError):  # what a block cannot take in stays a stage of its own
                sch.compute_inline(block)
    counts = []
    for block in blocks_of(sch):
        loops, kinds = sch.get_loops(block), [v.iter_type for v in sch.get(block).iter_vars]
        spatial, reduced = loops[: kinds.count(0)], loops[kinds.count(0) :]
        counts.append(as_dim(product([from_tvm(sch.get(loop).extent) for loop in spatial])))
        whole = sch.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        outer, inner = sch.split(whole, [None, threads])
        sch.bind(outer, "blockIdx.x")
        sch.bind(inner, "threadIdx.x")
        if reduced:
            sch.decompose_reduction(block, reduced[0])
    return sch.mod["main"], counts


def device_functions(function: Any) -> list[tuple[str, str, str]]:
    """Name, parameters and body of each stage's CUDA C, in order."""
    import tvm

    host = tvm.target.Target("llvm")
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80", **limits}, host=host)
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        built = tvm.tirx.build(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    text = built.imports[0].inspect_source()
    for old, new in _WORDS.items():
        text = re.sub(rf"\b{old}\b", new, text)
    return [(m[1], m[2], m[3]) for m in _FUNCTION.finditer(text)]


def argument(parameter: str, names: Mapping[str, str]) -> str:
    """What a stage's parameter is given: a buffer by our name for it, or a dim."""
    kind, _, name = parameter.rpartition(" ")
    return f"({kind.replace('__restrict__', '').strip()}){names[name]}" if name in names else name


