"""Elementwise operations."""

import torch
import torch.nn.functional as F

from tests.ir_cases.case import INTS, Case, fixed, flags, integers, normal, positive
from tilewright.ir import DType
from tilewright.ir import ops as o

EXTREME = fixed([0.0, -0.0, 1e-30, -50.0, 50.0, 300.0, -300.0, float("inf"), float("-inf"), float("nan")])
BOOL = (DType.bool,)

_UNARY = [
    (o.Neg, torch.neg),
    (o.Abs, torch.abs),
    (o.Exp, torch.exp),
    (o.Sin, torch.sin),
    (o.Cos, torch.cos),
    (o.Tanh, torch.tanh),
    (o.Sigmoid, torch.sigmoid),
    (o.Erf, torch.erf),
    (o.Floor, torch.floor),
    (o.Ceil, torch.ceil),
    (o.Round, torch.round),
    (o.Relu, torch.relu),
    (o.Silu, F.silu),
    (o.Gelu, F.gelu),
    (o.GeluTanh, lambda x: F.gelu(x, approximate="tanh")),
    (o.Softplus, F.softplus),
]
_NO_INFINITY = (o.Sin, o.Cos, o.Silu, o.Gelu, o.GeluTanh)  # -inf gives nan there, in torch sometimes 0
_POSITIVE = [
    (o.Log, torch.log),
    (o.Log1p, torch.log1p),
    (o.Sqrt, torch.sqrt),
    (o.Rsqrt, torch.rsqrt),
    (o.Reciprocal, torch.reciprocal),
]
_BINARY = [
    (o.Add, torch.add),
    (o.Sub, torch.sub),
    (o.Mul, torch.mul),
    (o.Maximum, torch.maximum),
    (o.Minimum, torch.minimum),
    (o.Eq, torch.eq),
    (o.Ne, torch.ne),
    (o.Lt, torch.lt),
    (o.Le, torch.le),
    (o.Gt, torch.gt),
    (o.Ge, torch.ge),
]
_DIVIDE = [
    (o.FloorDiv, lambda a, b: torch.div(a, b, rounding_mode="floor")),
    (o.Mod, torch.remainder),
    (o.Div, lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")),
]
_BITS = [(o.And, torch.bitwise_and), (o.Or, torch.bitwise_or), (o.Xor, torch.bitwise_xor)]
_BIG = fixed([2**62 + 1, -(2**62) - 1, 7, -7, 7, -7, 0, -(2**63)])
_BY = fixed([3, 3, 2, 2, -2, -2, 5, 7])

CASES = [
    *(Case(k, [normal(3, 7, scale=3.0)], f) for k, f in _UNARY),
    *(Case(k, [EXTREME], f, note="extreme") for k, f in _UNARY if k not in _NO_INFINITY),
    *(Case(k, [positive(5, 3)], f) for k, f in _POSITIVE),
    *(Case(k, [normal(3, 1, 7), normal(2, 7)], f, note="broadcast") for k, f in _BINARY),
    *(Case(k, [integers(6), integers(5, 6)], f, dtypes=INTS, note="ints") for k, f in _BINARY),
    *(Case(k, [normal(4, 5, scale=9.0), positive(5)], f) for k, f in _DIVIDE),
    *(Case(k, [integers(4, 5), integers(5, low=1)], f, dtypes=INTS, note="ints") for k, f in _DIVIDE),
    *(Case(k, [_BIG, _BY], f, dtypes=(DType.i64,), note="beyond-f64") for k, f in _DIVIDE),
    *(Case(k, [integers(4, 5), integers(5)], f, dtypes=INTS, note="ints") for k, f in _BITS),
    *(Case(k, [flags(4, 5), flags(5)], f, dtypes=BOOL, note="bool") for k, f in _BITS),
    Case(o.Pow, [positive(3, 5), normal(5)], torch.pow),
    Case(o.Pow, [integers(3, 5), integers(5, low=0, high=4)], torch.pow, dtypes=INTS, note="ints"),
    Case(o.Sign, [fixed([-3.5, 0.0, 2.0])], torch.sign),
    Case(o.Not, [flags(9)], torch.bitwise_not, dtypes=BOOL),
    Case(o.Not, [integers(9)], torch.bitwise_not, dtypes=INTS, note="ints"),
    Case(o.Neg, [integers(9)], torch.neg, dtypes=INTS, note="ints"),
    Case(o.Abs, [integers(9)], torch.abs, dtypes=INTS, note="ints"),
    Case(o.Where, [flags(4, 1), normal(5), normal(4, 5)], torch.where),
    Case(o.Cast, [normal(20, scale=50.0)], lambda x: x.long(), {"dtype": DType.i64}, note="truncates"),
    Case(o.Cast, [normal(20, scale=50.0)], lambda x: x.to(torch.float16).numpy(), {"dtype": DType.f16}, note="f16"),
    Case(o.Cast, [normal(200)], lambda x: x.to(torch.bfloat16).float(), {"dtype": DType.bf16}, note="bf16"),
    Case(o.Cast, [fixed([0.0, 0.3, -2.0])], lambda x: x.bool(), {"dtype": DType.bool}, note="bool"),
    Case(o.Cast, [flags(9)], lambda x: x.float(), {"dtype": DType.f32}, BOOL, note="of-bool"),
]
