"""The program: C code that calls an entry's kernels in order over one arena, or launches them on a GPU.

For each entry it has ``tw_<entry>`` and ``tw_<entry>_sizes``, as runtime/loader.py calls them. The text is kept in the
artifact as program.c: it is the place to see what runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tilewright.codegen.cexpr import PRELUDE, c_dim
from tilewright.codegen.kernel import DeviceCode, KernelCode
from tilewright.ir import CodegenError, Dim, Function, KVType, Module, Op, Return, State, TensorType, Value, Weight, ops

_ALIGN = 64
@dataclass
class Program:
    """Writes the program of a module whose functions are fused and planned.

    ``codes`` has the code of every kernel by name, ``offsets`` the place of every stored weight by (name, packing).
    """

    module: Module
    codes: Mapping[str, KernelCode]
    offsets: Mapping[tuple[str, str], int]
    lines: list[str] = field(default_factory=list)
    functions: dict[tuple[str, str], int] = field(default_factory=dict)

    def text(self) -> str:
        """The C source."""
        self.lines = ["#include <stdint.h>", "#include <string.h>", '#include "pool.h"', '#include "launch.h"', "", PRELUDE]
        self.functions = {f: i for i, f in enumerate(device_functions(self.codes))}
        used = dict.fromkeys(op.callee for f in self.module.entries() for op in f.body if isinstance(op, ops.Call))
        for name in used:
            if self.codes[name].device is None:
                self.trampoline(self.module.functions[name], self.codes[name])
        for function in self.module.entries():
            self.entry(function)
        return "\n".join(self.lines) + "\n"

    def trampoline(self, kernel: Function, code: KernelCode) -> None:
        """The kernel's prototype, its argument block and the task function of the pool."""
        count = sum(len(pointers(v)) for v in kernel.args) + sum(isinstance(v.type, TensorType) for v in kernel.returns)
        count += len(code.scratch)
        numbers = "".join(f", int64_t {d}" for d in code.dims)
        self.lines += [
            f"void {code.symbol}(int64_t begin, int64_t end{numbers}{', void *' * count});",
            f"struct {kernel.name}_args {{ int64_t first; {''.join(f'int64_t {d}; ' for d in code.dims)}"
            f"void *p[{max(count, 1)}]; }};",
            f"static void {kernel.name}_task(int64_t begin, int64_t end, void *arg) {{",
            f"  const struct {kernel.name}_args *a = arg;",
            f"  {code.symbol}(a->first + begin, a->first + end{''.join(f', a->{d}' for d in code.dims)}"
            f"{''.join(f', a->p[{i}]' for i in range(count))});",
            "}",
            "",
        ]

    def entry(self, function: Function) -> None:
        writer = _Entry(self, function)
        self.lines += [*writer.sizes(), *writer.body(), ""]


def device_functions(codes: Mapping[str, KernelCode]) -> list[tuple[str, str]]:
    """The functions of CUDA kernels as (kernel, symbol), in the order in which a program numbers them."""
    found = [(name, launch.symbol) for name, code in codes.items() if code.device for launch in code.device.launches]
    return list(dict.fromkeys(found))


def pointers(value: Value) -> tuple[str, ...]:
    """What a kernel is passed for a value: one pointer, or K and V of a cache, and their windows beside pages."""
    if not isinstance(value.type, KVType):
        return ("",)
    return ("k", "v", "kw", "vw") if value.cache.beside_pages else ("k", "v")


def entry_dims(module: Module, function: Function) -> list[str]:
    """The symbols that the entry's inputs bind, in the order in which the program takes them: as the module lists them."""
    bound = {str(d) for a in function.args for d in a.shape if not isinstance(d, int) and d.is_Symbol}
    return [name for name in module.dims if name in bound]


class _Entry:
    """One entry: where each value lives, and the calls."""

    def __init__(self, program: Program, function: Function) -> None:
        self.program, self.function = program, function
        self.dims = entry_dims(program.module, function)
        self.states = [s for s in program.module.states.values() for _ in pointers(s)]
        self.slots: dict[int, list[Dim]] = {}
        for op in function.body:
            if isinstance(op, ops.Call):
                self.count_slots(op)

    def count_slots(self, op: ops.Call) -> None:
        if len(op.slots) != len(op.results):
            raise CodegenError(f"call of @{op.callee} has no memory plan; run plan-memory", op.loc)
        for slot, result in zip(op.slots, op.results):
            if slot >= 0 and isinstance(result.type, TensorType):
                sizes = self.slots.setdefault(slot, [])
                if result.type.bytes not in sizes:
                    sizes.append(result.type.bytes)

    @property
    def on_device(self) -> bool:
        """Whether pointers are those of a GPU, and `pool` is how to reach it."""
        return bool(self.program.functions)

    def codes(self) -> list[KernelCode]:
        return [self.program.codes[op.callee] for op in self.function.body if isinstance(op, ops.Call)]

    def unpack(self) -> list[str]:
        return [f"  const int64_t {d} = dims[{i}]; (void){d};" for i, d in enumerate(self.dims)]

    def sizes(self) -> list[str]:
        """The function that gives arena bytes and output shapes, and the one that lays out the arena."""
        name = self.function.name
        lines = [f"static int64_t {name}_arena(const int64_t *dims, int64_t *at) {{", *self.unpack(), "  int64_t end = 0;"]
        for slot in sorted(self.slots):
            size = "INT64_C(0)"
            for need in self.slots[slot]:
                size = f"tw_max({size}, {c_dim(need)})"
            lines.append(f"  at[{slot}] = end; end += {rounded(size)};")
        lines += [f"  at[{len(self.slots)}] = end;", "  int64_t scratch = 0;"]
        for total in dict.fromkeys(" + ".join(rounded(c_dim(s)) for s in c.scratch) for c in self.codes() if c.scratch):
            lines.append(f"  scratch = tw_max(scratch, {total});")
        lines += ["  return end + scratch;", "}", f"TW_EXPORT void tw_{name}_sizes(const int64_t *dims, int64_t *out) {{"]
        lines += [*self.unpack(), f"  int64_t at[{len(self.slots) + 1}];", f"  out[0] = {name}_arena(dims, at);"]
        shapes = [d for v in self.function.returns for d in v.shape]
        lines += [f"  out[{i}] = {c_dim(d)};" for i, d in enumerate(shapes, 1)]
        return [*lines, "}"]

    def body(self) -> list[str]:
        name = self.function.name
        lines = [
            f"TW_EXPORT int32_t tw_{name}(tw_pool *pool, const int64_t *dims, void *const *inputs, void *const *outputs,",
            "    void *const *states, const uint8_t *weights, uint8_t *arena) {",
            *self.unpack(),
            f"  int64_t at[{len(self.slots) + 1}];",
            f"  {name}_arena(dims, at);",
            "  (void)pool; (void)inputs; (void)outputs; (void)states; (void)weights; (void)arena;",
            *(["  tw_device *device = (tw_device *)pool;"] if self.on_device else []),
        ]
        for op in self.function.body:
            lines += self.call(op) if isinstance(op, ops.Call) else self.other(op)
        return [*lines, "  return TW_OK;", "}"]

    def other(self, op: Op) -> list[str]:
        if isinstance(op, Return):
            return self.copies()
        if isinstance(op, ops.Reshape):
            return []
        raise CodegenError(f"{op.name} is in no kernel; run fuse", op.loc)

    def call(self, op: ops.Call) -> list[str]:
        """Fill the argument block and run the kernel's tasks on the pool."""
        code, name = self.program.codes[op.callee], op.callee
        places = [p for i, v in enumerate(op.args) for p in self.places(v, code.packing.get(i, ""))]
        places += [self.place(r) for r in op.results if isinstance(r.type, TensorType)]
        places += self.scratch(code)
        if code.device is not None:
            return self.launches(op, code, code.device, places)
        block = ", ".join(["0", *code.dims, "{" + ", ".join(f"(void *)({p})" for p in places) + "}"])
        run = f"tw_pool_run(pool, {name}_task, &a, {c_dim(code.tasks)}, {c_dim(code.grain)})"
        if code.last != 0:
            run += f"; a.first = {c_dim(code.tasks)}; tw_pool_run(pool, {name}_task, &a, {c_dim(code.last)}, 1)"
        return [f"  {{ struct {name}_args a = {{{block}}}; {run}; }}  // {op.loc.module}"]

    def launches(self, op: ops.Call, code: KernelCode, device: DeviceCode, places: Sequence[str]) -> list[str]:
        """Launch the grids of a CUDA kernel, which takes the addresses of its parameters."""
        lines = [f"  {{ void *p[] = {{{', '.join(f'(void *)({p})' for p in places)}}};  // {op.loc.module}"]
        params = [*(f"(void *)&{d}" for d in code.dims), *(f"&p[{i}]" for i in range(len(places)))]
        lines.append(f"    void *a[] = {{{', '.join(params)}}};")
        for launch in device.launches:
            number = self.program.functions[op.callee, launch.symbol]
            grid = ", ".join(map(c_dim, launch.grid))
            run = f"if (tw_launch(device, {number}, {grid}, {launch.block}, {launch.shared}, a)) return TW_LAUNCH_FAILED;"
            if launch.when is not None:
                dim, low, high = launch.when
                run = f"if ({c_dim(dim)} >= {low} && {c_dim(dim)} <= INT64_C({high})) {{ {run} }}"
            lines.append(f"    {run}")
        return [*lines, "  }"]

    def scratch(self, code: KernelCode) -> list[str]:
        """Temporaries lie behind the slots; kernels run one after the other, so they share that place."""
        out, end = [], f"at[{len(self.slots)}]"
        for size in code.scratch:
            out.append(f"arena + {end}")
            end += f" + {rounded(c_dim(size))}"
        return out

    def places(self, value: Value, packing: str) -> list[str]:
        """C expressions for the pointers of an operand."""
        if isinstance(value.type, KVType):
            state = self.state(value)
            return [f"states[{i}]" for i, owner in enumerate(self.states) if owner is state]
        return [self.place(value, packing)]

    def place(self, value: Value, packing: str = "") -> str:
        """The C expression for the memory of a tensor."""
        value = behind(value)
        if isinstance(value, Weight):
            return f"weights + {self.program.offsets[value.name, packing]}"
        if packing:
            raise CodegenError(f"@{self.function.name}: a kernel needs {value!r} packed, but it is no weight")
        if value in self.function.args:
            return f"inputs[{self.function.args.index(value)}]"  # type: ignore[arg-type]
        op = value.owner
        assert isinstance(op, ops.Call)
        slot = op.slots[value.index]  # type: ignore[attr-defined]
        return f"arena + at[{slot}]" if slot >= 0 else f"outputs[{-1 - slot}]"

    def state(self, value: Value) -> State:
        """The state that a cache value is a version of."""
        while not isinstance(value, State):
            op = value.owner
            if op is None:
                raise CodegenError(f"@{self.function.name}: cache {value!r} comes from no state")
            value = next(v for v in op.operands if isinstance(v.type, KVType))
        return value

    def copies(self) -> list[str]:
        """Outputs that no kernel writes in place: inputs, weights, and values returned twice."""
        lines = []
        for i, value in enumerate(self.function.returns):
            place = self.place(value)
            if place == f"outputs[{i}]":
                continue
            to, size = f"outputs[{i}]", c_dim(value.tensor.bytes)
            if self.on_device:
                copy = f"device->copy((uint64_t){to}, (uint64_t)({place}), {size}, device->stream)"
                lines.append(f"  if ((device->error = {copy})) return TW_LAUNCH_FAILED;")
            else:
                lines.append(f"  memcpy({to}, {place}, {size});")
        return lines


def rounded(size: str) -> str:
    """The C expression ``size`` rounded up to the alignment of buffers."""
    return f"({size} + {_ALIGN - 1}) / {_ALIGN} * {_ALIGN}"


def behind(value: Value) -> Value:
    """The value whose memory ``value`` shares: a reshape moves nothing."""
    while isinstance(value.owner, ops.Reshape):
        value = value.owner.x
    return value
