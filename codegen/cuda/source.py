"""The CUDA C of a kernel function: its parameters, and the pieces that all CUDA families put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tilewright.codegen.cuda.compile import compile_source
from tilewright.codegen.cuda.evaluate import stored_dtype
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.kernel import DeviceCode, KernelCode, Launch
from tilewright.ir import Dim, Function, KVType, Value


@dataclass
class Source:
    """A kernel's functions under construction. ``names`` are the C parameters of each argument and result.

    A cache has two, K and V; a result that is a cache has none, since it is changed in place.
    """

    kernel: Function
    symbol: str
    target: CudaTarget
    scratch: tuple[Dim, ...] = ()
    launches: list[Launch] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    written: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.kernel.symbols())

    def names(self, value: Value) -> tuple[str, ...]:
        """The parameters that hold ``value``, an argument or a result."""
        if value in self.kernel.args:
            name = f"a{self.kernel.args.index(value)}"  # type: ignore[arg-type]
            return (f"{name}k", f"{name}v") if isinstance(value.type, KVType) else (name,)
        return () if isinstance(value.type, KVType) else (f"r{self.kernel.returns.index(value)}",)

    @property
    def pointers(self) -> dict[Value, str]:
        """Arguments that are tensors, by their parameter."""
        return {v: self.names(v)[0] for v in self.kernel.args if not isinstance(v.type, KVType)}

    @property
    def parameters(self) -> list[str]:
        """Declarations: dims, arguments, results, scratch."""
        out = [f"const i64 {d}" for d in self.dims]
        for value in self.kernel.args:
            kind = value.type
            changed = "" if isinstance(kind, KVType) else "const "
            stored = "u8" if isinstance(kind, KVType) and kind.is_coded else stored_dtype(value.dtype)
            out += [f"{changed}{stored} *__restrict__ {name}" for name in self.names(value)]
        for i, value in enumerate(self.kernel.returns):
            if not isinstance(value.type, KVType):
                out.append(f"{stored_dtype(value.dtype)} *__restrict__ r{i}")
        return [*out, *(f"u8 *__restrict__ s{i}" for i in range(len(self.scratch)))]

    @property
    def passed(self) -> str:
        """The parameters as arguments of a device function that has the same."""
        return ", ".join(p.rsplit(" ", 1)[1].lstrip("*") for p in self.parameters)

    def device(self, head: str, body: Iterable[str]) -> None:
        """A device function: ``head`` with ``$`` for the kernel's parameters."""
        text = head.replace("$", ", ".join(self.parameters))
        self.parts.append("\n".join([f"TW_FN {text} {{", *(f"  {line}" for line in body), "}"]))

    def function(self, body: Sequence[str], block: int, grid: tuple[Dim, Dim, Dim], shared: int = 0,
                 when: tuple[Dim, int, int] | None = None, resident: int = 0) -> None:  # fmt: skip
        """A kernel with ``body``, launched behind those before it; one with the same body is not written again.

        Registers are dealt out so that ``resident`` blocks fit a multiprocessor; 0 leaves that to the compiler.
        """
        text = "\n".join([*(f"  {line}" for line in body), "}"])
        name = self.written.setdefault((text, block), f"{self.symbol}_{len(self.launches)}")
        if name not in {launch.symbol for launch in self.launches}:
            bounds = f"{block}, {resident}" if resident else str(block)
            head = f'extern "C" __global__ void __launch_bounds__({bounds}) {name}({", ".join(self.parameters)}) {{'
            self.parts.append(f"{head}\n{text}")
        self.launches.append(Launch(name, grid, block, shared, when))

    def code(self) -> KernelCode:
        """Everything, compiled. Raises CodegenError."""
        text = "\n\n".join(["", *self.parts, ""])
        cubin = compile_source(text, self.target)
        device = DeviceCode(tuple(self.launches), text, cubin.resources)
        return KernelCode(self.symbol, cubin.image, self.dims, scratch=self.scratch, device=device)
