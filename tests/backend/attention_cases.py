"""Attention kernels that every backend is to compile: as fusion cuts them, and with all that a score may meet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.ir import DType, Function, KVType, Module, Return, TensorType, Value, eval_dim, interpret, ops

LENGTH = 96
Compiled = Callable[[Sequence[Any], Mapping[str, int]], list[Any]]


def expected(kernel: Function, operands: Sequence[Any]) -> list[Any]:
    """What the interpreter gives."""
    module = Module("m", dims={name: (1, 1 << 20) for name in kernel.symbols()})
    module.add(kernel)
    return interpret(module, kernel.name, list(operands))


def compare(got: np.ndarray, want: np.ndarray, limit: float) -> None:
    """No element is further off than ``limit``, relative to those above 1."""
    assert got.shape == want.shape
    wide = want.astype(np.float64)
    error = np.abs(got.astype(np.float64) - wide) / np.maximum(np.abs(wide), 1)
    assert not (error > limit).any(), f"{error.max()} at {np.unravel_index(int(error.argmax()), error.shape)}"
    assert np.array_equal(np.isnan(got), np.isnan(want))


class Case:
    """One attention operation over columns of a fused projection; ``rope`` is (rotated elements, style, batch of cos)."""

    def __init__(
        self, dtype: str, q: int, kv: int, dim: int, rope: tuple[int, str, str | int] | None, s: str | int
    ) -> None:
        self.q, self.kv, self.dim, self.rope, self.s = q, kv, dim, rope, s
        self.dtype = DType(dtype)
        self.kernel = Function("k", kind="kernel")
        self.qkv = self.kernel.arg("qkv", TensorType(("B", s, (q + 2 * kv) * dim), self.dtype))
        self.cache = self.kernel.arg("cache", KVType(kv, dim, dim, LENGTH, self.dtype))
        self.start = self.kernel.arg("start", TensorType(("B",), DType.i64))
        if rope:
            table = TensorType((rope[2], s, rope[0]), DType.f32)
            self.tables = self.kernel.arg("cos", table), self.kernel.arg("sin", table)

    def heads(self, first: int, count: int, rotate: bool) -> Value:
        """``count`` heads of the projection from the ``first`` on."""
        b, s, _ = self.qkv.shape
        columns = ops.Slice(self.qkv, starts=(0, 0, first * self.dim), stops=(b, s, (first + count) * self.dim),
                            steps=(1, 1, 1))
        split = self.kernel.append(ops.Reshape(self.kernel.append(columns).result, shape=(b, s, count, self.dim))).result
        if not rotate or self.rope is None:
            return split
        return self.kernel.append(ops.Rope(split, *self.tables, style=self.rope[1])).result

    def attend(self, **given: float) -> None:
        q = self.heads(0, self.q, True)
        op = self.kernel.append(ops.Attend(q, self.cache, self.start, scale=self.dim**-0.5, **given))
        self.kernel.append(Return(op.results))

    def append(self) -> None:
        k, v = self.heads(self.q, self.kv, True), self.heads(self.q + self.kv, self.kv, False)
        self.kernel.append(Return(self.kernel.append(ops.Append(self.cache, k, v, self.start)).results))

    def check(self, compiled: Compiled, starts: list[int], s: int, limit: float) -> None:
        """``compiled`` is the kernel, called with operands and dims."""
        rng, b, kind = np.random.default_rng(0), len(starts), self.dtype.np

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        cache = tuple(normal(b, LENGTH, self.kv, self.dim).astype(kind) for _ in "kv")
        operands = [normal(b, s, self.qkv.shape[2]).astype(kind), cache, np.array(starts)]
        if self.rope:
            angles = normal(b if self.rope[2] == "B" else 1, s, self.rope[0])
            operands += [np.cos(angles), np.sin(angles)]
        (got,), (want,) = compiled(operands, {"B": b, "S": s}), expected(self.kernel, operands)
        if isinstance(got, tuple):  # slots behind the newest token may hold anything
            got, want = ([x[i, :at + s] for x in pair for i, at in enumerate(starts)] for pair in (got, want))
        else:
            got, want = (got,), (want,)
        for mine, theirs in zip(got, want):
            compare(mine, theirs, limit)


ROPES = {
    "half": (32, "half", 1),
    "half, part of a vector": (20, "half", "B"),
    "part of the head": (16, "half", "B"),
    "interleaved": (32, "interleaved", 1),
    "interleaved, part of the head": (12, "interleaved", "B"),
    "none": None,
}

MASKS = {
    "causal window": {"causal": True, "window": 9},
    "both windows": {"window": 7, "window_right": 3},
    "chunk": {"chunk": 16},
    "causal chunk": {"causal": True, "chunk": 16},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": "f32", "causal": True},
    "mask": {"mask": "bst"},
    "bias by head": {"bias": "hst"},
    "bias by key": {"bias": "bt", "bias_dtype": "bf16", "mask": "s"},
    "padding": {"padding": True},
    "all": {"causal": True, "window": 30, "mask": "bhst", "bias": "st", "sinks": "bf16", "softcap": 5.0},
}


CACHED = {
    "plain": {},
    "window": {"window": 9},
    "chunk": {"chunk": 16},
    "all": {"window": 40, "chunk": 32, "softcap": 4.0, "bias": "hst", "sinks": "f32"},
}


def attention(dtype: str, heads: int, kv_heads: int, dim: int, vdim: int, **given: Any) -> Function:
    """``nn.attention`` over tensors; ``given`` is as in `MASKS`, with a name of axes for a mask and a bias."""
    kernel = Function("k", kind="kernel")
    shapes = {"q": ("B", "S", heads, dim), "k": ("B", "T", kv_heads, dim), "v": ("B", "T", kv_heads, vdim)}
    q, k, v = (kernel.arg(name, TensorType(shape, DType(dtype))) for name, shape in shapes.items())
    more, options = _extras(kernel, heads, "T", **given)
    op = kernel.append(ops.Attention(q, k, v, **more, **{"scale": dim**-0.5, **options}))
    kernel.append(Return(op.results))
    return kernel


def attend(dtype: str, stored: str, heads: int, kv: KVType, s: str | int, **given: Any) -> Function:
    """``kv.attend`` over a cache of elements ``stored``; ``given`` is as in `CACHED`."""
    kernel = Function("k", kind="kernel")
    q = kernel.arg("q", TensorType(("B", s, heads, kv.dim), DType(dtype)))
    cache = kernel.arg("cache", KVType(kv.heads, kv.dim, kv.vdim, kv.length, DType(stored)))
    start = kernel.arg("start", TensorType(("B",), DType.i64))
    more, options = _extras(kernel, heads, kv.length, s, **given)
    op = kernel.append(ops.Attend(q, cache, start, **more, **{"scale": kv.dim**-0.5, **options}))
    kernel.append(Return(op.results))
    return kernel


def _extras(
    kernel: Function, heads: int, keys: str | int, s: str | int = "S", bias_dtype: str = "f32", **given: Any
) -> tuple[dict[str, Value], dict[str, Any]]:
    """Arguments for what ``given`` names of mask, bias, sinks and padding, and the other options."""
    size = {"b": "B", "h": heads, "s": s, "t": keys}
    more = {}
    for name, dtype in (("mask", "bool"), ("bias", bias_dtype)):
        if axes := given.pop(name, None):
            shape = tuple(size[axis] if axis in axes else 1 for axis in "bhst")
            more[name] = kernel.arg(name, TensorType(shape, DType(dtype)))
    if sinks := given.pop("sinks", None):
        more["sinks"] = kernel.arg("sinks", TensorType((heads,), DType(sinks)))
    if given.pop("padding", False):
        more["padding"] = kernel.arg("padding", TensorType(("B", keys), DType.bool))
    return more, given


def operands(kernel: Function, dims: Mapping[str, int], starts: Sequence[int] = (), seed: int = 0) -> list[Any]:
    """Random arguments; a cache is full, so that slots which no query may see hold something."""
    rng, made = np.random.default_rng(seed), []
    for arg in kernel.args:
        if isinstance(arg.type, KVType):
            shape = (dims["B"], arg.type.length, arg.type.heads)
            sizes = (arg.type.dim, arg.type.vdim)
            made.append(tuple(rng.standard_normal((*shape, n)).astype(arg.dtype.np) for n in sizes))
        elif arg.name == "start":
            made.append(np.array(starts))
        else:
            shape = tuple(eval_dim(d, dims) for d in arg.shape)
            flags = arg.dtype is DType.bool
            made.append(rng.random(shape) < 0.6 if flags else rng.standard_normal(shape).astype(arg.dtype.np))
    return made
