"""From a module after its passes to what can be tuned: each kernel at the sizes it will mostly run at."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.emitters import choose, emitter
from tilewright.codegen.features import describer
from tilewright.codegen.kernel import Emitter
from tilewright.codegen.program import behind
from tilewright.codegen.schedule import Schedule, Space
from tilewright.codegen.target import Target, parse_target
from tilewright.costmodel.workload import Task, Workload
from tilewright.ir import Function, Module, TilewrightError, Weight, ops, parse_module, print_module

BATCH, TOKENS = 1, 512
"""Sizes of the batch and of any other axis that has no fixed one, unless told otherwise."""
_LONGEST = 1 << 20
FREQUENCIES = {"decode": 128.0}
"""How often an entry point runs for each run of the others: 128 new tokens for each prompt."""


@dataclass(frozen=True)
class KernelTask:
    """A kernel of a module and how to tune it. ``frequency``: how often it is called for each prompt or forward pass."""

    kernel: Function
    emitter: Emitter
    sizes: Mapping[str, int]
    frequency: float
    group: str

    def space(self, target: Target) -> Space:
        return self.emitter.space(self.kernel, target, self.sizes)

    @property
    def text(self) -> str:
        return workload_text(self.kernel)

    def workload(self, target: Target, threads: int) -> Workload:
        where = (1, target.text) if isinstance(target, CudaTarget) else (threads, host_name())
        return Workload(self.emitter.name, self.text, tuple(sorted(self.sizes.items())), target.text, *where)

    def task(self, target: Target, threads: int, workload: Workload | None = None) -> Task:
        """The task of the tuner: see ``costmodel/workload.py``. ``workload`` when it is known already."""
        describe = describer(self.emitter, self.kernel, target, self.sizes, threads)
        workload, space = workload or self.workload(target, threads), self.space(target)
        names = "+".join(op.name.split(".")[-1] for op in self.kernel.body[:-1])
        layout = layout_of(self.kernel, self.emitter, target)
        return Task(workload, space, describe, self.frequency, f"{self.kernel.name} {names}", self.group, layout)  # type: ignore[arg-type]


def task_of(workload: Workload) -> Task:
    """The task of a workload that was kept as text. Raises TilewrightError when it is not from this version."""
    try:
        kernel = parse_module(workload.kernel).functions["k"]
        made = KernelTask(kernel, emitter(workload.family), dict(workload.sizes), 1.0, "")
        return made.task(parse_target(workload.target), workload.threads, workload)
    except (KeyError, ValueError) as error:
        raise TilewrightError(f"a workload of {workload.family} that this version cannot read: {error}") from None


def layout_of(kernel: Function, emitter: Emitter, target: Target) -> Callable[[Schedule], str]:
    """A function from a schedule to the text of how ``kernel``'s weights are stored under it."""
    layouts = emitter.layouts(kernel, target)
    return cache(lambda schedule: "; ".join(sorted(set(layouts(schedule).values()))))


def workload_text(kernel: Function) -> str:
    """The text of a module with nothing but ``kernel``: equal for kernels that only differ in names, locations, ranges."""
    alone = Module("workload", dims={name: (1, _LONGEST) for name in sorted(kernel.symbols())})
    alone.functions["k"] = kernel
    name, given = kernel.name, [arg.name for arg in kernel.args]
    try:
        kernel.name = "k"
        for i, arg in enumerate(kernel.args):
            arg.name = f"a{i}"
        return print_module(alone, locations=False)
    finally:
        kernel.name = name
        for arg, old in zip(kernel.args, given):
            arg.name = old


def kernel_tasks(module: Module, target: Target, sizes: Mapping[str, int] | None = None) -> list[KernelTask]:
    """Every kernel that an entry point calls, in the order of their first calls.

    ``sizes`` gives symbolic dims the values to tune for. Raises TilewrightError for a dim that is not the module's, or a
    value out of its range.
    """
    values = sizes_of(module, sizes or {})
    frequencies = call_frequencies(module)
    groups = shared_weights(module, target)
    found = []
    for name, frequency in frequencies.items():
        kernel = module.functions[name]
        own = {symbol: values[symbol] for symbol in kernel.symbols()}
        found.append(KernelTask(kernel, choose(kernel, target), own, frequency, groups.get(name, "")))
    return found


def sizes_of(module: Module, given: Mapping[str, int]) -> dict[str, int]:
    """A value for each symbolic dim of ``module``."""
    for name, value in given.items():
        if name not in module.dims:
            raise TilewrightError(f"sizes: the model has no dim {name!r}; it has {', '.join(module.dims) or 'none'}")
        low, high = module.dims[name]
        if not low <= value <= high:
            raise TilewrightError(f"sizes: {name}={value} is not in the model's range {low}..{high}")
    usual = {name: min(max(BATCH if name == "B" else TOKENS, low), high) for name, (low, high) in module.dims.items()}
    return usual | dict(given)


def call_frequencies(module: Module) -> dict[str, float]:
    """Calls of each kernel for one run of all entry points, decode steps counted as often as they run."""
    found: dict[str, float] = {}
    for entry, op in calls(module):
        found[op.callee] = found.get(op.callee, 0.0) + FREQUENCIES.get(entry.name, 1.0)
    return found


def calls(module: Module) -> Iterator[tuple[Function, ops.Call]]:
    """Every call of a kernel, with the entry point it is in."""
    for entry in module.entries():
        for op in entry.walk(ops.Call):
            assert isinstance(op, ops.Call)
            yield entry, op


def shared_weights(module: Module, target: Target) -> dict[str, str]:
    """For kernels that read a packed weight which another kernel reads, too: the name of their group."""
    group: dict[str, str] = {}
    owner: dict[Weight, str] = {}
    packed = {name: _packed(module.functions[name], target) for name in dict.fromkeys(op.callee for _, op in calls(module))}
    for _, op in calls(module):
        for i in packed[op.callee]:
            weight = behind(op.args[i])
            if isinstance(weight, Weight):
                first = owner.setdefault(weight, op.callee)
                _join(group, first, op.callee)
    members = {name: _root(group, name) for name in group}
    counts = list(members.values())
    return {name: root for name, root in members.items() if counts.count(root) > 1}


def _packed(kernel: Function, target: Target) -> list[int]:
    """The arguments of ``kernel`` that its family stores in a layout of its own."""
    emitter = choose(kernel, target)
    return list(emitter.layouts(kernel, target)(emitter.default_schedule(kernel, target)))


def _root(group: dict[str, str], name: str) -> str:
    while group.setdefault(name, name) != name:
        name = group[name]
    return name


def _join(group: dict[str, str], a: str, b: str) -> None:
    group[_root(group, a)] = _root(group, b)


@cache
def host_name() -> str:
    """The CPU that times are measured on, as it calls itself, and how many cores of it there are."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"
