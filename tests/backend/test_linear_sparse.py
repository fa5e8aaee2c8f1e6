"""Kernels over weights of which only what is not zero is stored, against the interpreter."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from tests.backend.loops_harness import kernel_of
from tests.backend.mlir_helpers import assert_close
from tests.backend.test_mlir_linear_codes import named
from tilewright.codegen.emitters import emitter
from tilewright.codegen.mlir.linear_emitter import LinearEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.ir import Builder, DType, Function, Module, Value, interpret, ops, sym
from tilewright.ir.ops.sparse_expand import MaskLayout

B = sym("B")
TARGETS = ["x86-64-v3", "x86-64-v4", "native"]


@dataclass(frozen=True)
class Layer:
    """A linear layer of ``dtype`` weights, a bit of the mask for ``unit``; ``group`` k's share a scale (0: all)."""

    dtype: str
    unit: int
    x: str
    n: int = 70
    k: int = 187
    group: int = 0
    act: str | None = None
    scale: str = "f32"

    @property
    def layout(self) -> MaskLayout:
        dtype = DType(self.dtype)
        return MaskLayout(dtype, self.unit, dtype.bits <= 8 and self.x != "i8")

    @property
    def count(self) -> int:
        return 2 if self.act else 1

    @property
    def scales(self) -> list[tuple]:
        shape = (self.n, self.k // self.group if self.group else 1)
        return [(shape, self.scale)] if self.layout.dtype.bits <= 8 else []

    def weight(self, rng: np.random.Generator) -> np.ndarray:
        """Rows of any density, also full and empty ones; a block without any number."""
        kind, shape = self.layout.dtype, (self.n, self.k)
        top = 1 << kind.bits - 1
        numbers = rng.integers(-top, top, shape) if kind.is_int else rng.standard_normal(shape)
        keep = rng.random(shape) < rng.random((self.n, 1))
        keep[0], keep[1:2], keep[32:48] = True, False, False
        return np.where(keep, numbers.astype(kind.np), kind.np.type(0))

    def kernel(self, room: int) -> Function:
        types = [(t.shape, t.dtype.value) for t in self.layout.types(self.n, self.k, room)]
        dynamic, each = self.x == "i8", len(types) + len(self.scales)

        def factor(b: Builder, parts: Sequence[Value]) -> Value:
            made = b.add(ops.SparseExpand(*parts[:3], rows=self.n, columns=self.k, dtype=self.layout.dtype,
                                          unit=self.unit, split=self.layout.split))  # fmt: skip
            return b.add(ops.Dequantize(made, parts[3])) if self.scales else made

        def body(b: Builder, x: Value, *given: Value) -> Value:
            rest = given[1:] if dynamic else given
            x = b.add(ops.Dequantize(x, given[0])) if dynamic else x
            factors = [factor(b, rest[i * each : (i + 1) * each]) for i in range(self.count)]
            if self.act:
                return b.add(ops.GatedLinear(x, *factors, *rest[-2:], act=self.act))
            made = b.add(ops.Linear(x, *factors))
            return made if made.dtype is not DType.f32 else b.add(ops.Add(made, b.add(ops.Silu(made))))

        given = [((B, self.k), self.x), *[((B, 1), "f32")] * dynamic]
        biases = [((self.n,), "f32" if dynamic else self.x)] * 2 if self.act else []
        return kernel_of(body, *given, *[*types, *self.scales] * self.count, *biases)


def inputs(kernel: Function, layer: Layer, weights: Sequence[np.ndarray], room: int, rng: np.random.Generator, m: int
           ) -> list[np.ndarray]:  # fmt: skip
    dynamic, shape = layer.x == "i8", (m, layer.k)
    x = rng.integers(-127, 128, shape) if dynamic else rng.standard_normal(shape)
    given = [x.astype(DType(layer.x).np), *[rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32)] * dynamic]
    for weight in weights:
        given += layer.layout.store(weight, room)
        given += [rng.uniform(0.005, 0.02, s).astype(DType(kind).np) for s, kind in layer.scales]
    return given + [rng.standard_normal(a.shape).astype(a.dtype.np) for a in kernel.args[len(given) :]]


def check(layer: Layer, where: str, rows: Sequence[int]) -> None:
    rng = np.random.default_rng(layer.n)
    weights = [layer.weight(rng) for _ in range(layer.count)]
    room = max(map(layer.layout.count, weights)) + 5
    kernel = layer.kernel(room)
    assert LinearEmitter().match(kernel, named(where)) is None
    module = Module("m")
    module.add(kernel)
    compiled = StandaloneKernel(kernel, named(where), emitter("mlir.linear"))
    for m in rows:
        given = inputs(kernel, layer, weights, room, rng, m)
        (want,) = interpret(module, kernel.name, given)
        (got,) = compiled(given, {"B": m})
        assert_close(got, want.astype(np.float64), DType.of(want.dtype).value)


LAYERS = [
    Layer("i8", 1, "i8"),
    Layer("i8", 1, "i8", group=32, k=384, scale="f16"),
    Layer("i8", 1, "bf16"),
    Layer("i8", 4, "i8", act="silu"),
    Layer("i8", 4, "bf16", group=128, k=384),
    Layer("i4", 1, "i8", k=600, group=8, scale="f16"),
    Layer("i4", 1, "f32", act="gelu", n=33),
    Layer("i4", 1, "bf16", k=199),
    Layer("i4", 8, "i8", k=640, group=128, scale="f16"),
    Layer("i4", 8, "bf16", n=16, k=9),
    Layer("f8e4m3", 1, "bf16"),
    Layer("f8e5m2", 4, "f32", group=64, k=320),
    Layer("f4e2m1", 1, "bf16", group=32, k=96, scale="f8e8m0"),
    Layer("f4e2m1", 8, "f32"),
    Layer("bf16", 1, "bf16", act="silu"),
    Layer("bf16", 2, "bf16", n=200, k=601),
    Layer("f16", 1, "f16"),
    Layer("f32", 1, "f32", n=1, k=5),
    Layer("f32", 1, "bf16", act="relu"),
]


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: f"{x.dtype}-{x.unit}-{x.x}-{x.group}{x.act or ''}")
def test_results_are_those_of_the_interpreter(where: str, layer: Layer) -> None:
    """One row, a few, a tile, tiles and a remainder, several blocks of rows."""
    check(layer, where, (1, 2, 4, 7, 130, 250))
