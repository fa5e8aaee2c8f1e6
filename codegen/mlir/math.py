"""Elementary functions of f32 values (scalars or vectors of any width) as polynomials.

Errors are relative to the exact result and were measured over the whole range (see tests/backend/test_mlir_math.py).
Infinities and NaNs behave as in C; denormal results may become zero.
"""

from collections.abc import Sequence

from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.value import Val, constant, float_from_bits, fma, intrinsic

_LOG2E_HIGH, _LOG2E_LOW = 1.44269502162933349609375, 1.92596299112661746887e-8


def _c(value: float, like: Val) -> Val:
    return constant(value, like.dtype, like.lanes)


def polynomial(x: Val, coefficients: Sequence[float]) -> Val:
    """Horner's rule; the highest power first."""
    result = _c(coefficients[0], x)
    for coefficient in coefficients[1:]:
        result = fma(result, x, _c(coefficient, x))
    return result


# --- exponentials -------------------------------------------------------------------------------------------------

_EXP2 = (1.3276470126584172e-3, 9.675540961325169e-3, 5.550713464617729e-2, 0.24022120237350464, 0.6931469440460205,
         1.0000001192092896)


def exp(x: Val) -> Val:
    """e**x within 2e-7; 0 where the result would be (nearly) denormal, inf above 88.73."""
    clamped = _c(89.0, x).min(_c(-105.0, x).max(x))  # the constant first: a NaN stays a NaN
    n = (clamped * _LOG2E_HIGH).round_even()
    f = fma(clamped, _c(_LOG2E_HIGH, x), -n)
    f = fma(clamped, _c(_LOG2E_LOW, x), f)
    return _scale(polynomial(f, _EXP2), n)


def exp2_of_negative(x: Val) -> Val:
    """2**x for x <= 0, within 1.5e-7; 0 where the result would be (nearly) denormal."""
    clamped = _c(-152.0, x).max(x)
    n = clamped.round_even()
    return _scale(polynomial(clamped - n, _EXP2), n)


def _scale(p: Val, n: Val) -> Val:
    """p * 2**n for -152 <= n <= 128 and p near 1; zero where the result would be denormal."""
    if p.lanes == 16 and Kernel.current().target.vector_bits == 512:
        every, current = constant(-1, "i16"), constant(4, "i32")
        return intrinsic("llvm.x86.avx512.mask.scalef.ps.512", "f32", 16, p, n, _c(0.0, p), every, current)
    # 2**n in two factors: the exponent field alone reaches 127, and n may be 128.
    half = ((n.to("i32") + 126) << 23).bitcast("f32")
    return (n < -125.0).select(_c(0.0, p), (p * half) * 2.0)


def sigmoid(x: Val) -> Val:
    """1 / (1 + e**-x)."""
    return 1.0 / (exp(-x) + 1.0)


def silu(x: Val) -> Val:
    """x * sigmoid(x)."""
    return x / (exp(-x) + 1.0)


_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def tanh(x: Val) -> Val:
    """Cephes: an odd polynomial near zero, 1 - 2 / (e**2|x| + 1) beyond."""
    size, square = x.abs(), x * x
    near = fma(polynomial(square, _TANH) * square, x, x)
    far = (1.0 - 2.0 / (exp(size * 2.0) + 1.0)).copysign(x)
    return (size < 0.625).select(near, far)


_ERF_NEAR = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)


def erf(x: Val) -> Val:
    """N. Juffa's two-piece approximation."""
    size, square = x.abs(), x * x
    near = fma(polynomial(square, _ERF_NEAR), x, x)
    t = _c(9.5, x).min(size)
    high = polynomial(t, (-1.72853470e-5, 3.83197126e-4))
    low = polynomial(t, (-3.88396438e-3, 2.42546219e-2))
    r = fma(high, t * t, low)
    for coefficient in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = fma(r, t, _c(coefficient, x))
    far = (1.0 - exp(fma(r, t, -t))).copysign(x)
    return (size > 0.921875).select(far, near)


def gelu(x: Val) -> Val:
    """x * (1 + erf(x / sqrt 2)) / 2."""
    half = x * 0.5
    return fma(half, erf(x * 0.7071067811865476), half)


def gelu_tanh(x: Val) -> Val:
    """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2, through the sigmoid of twice the argument."""
    inner = fma(x * x, _c(0.044715, x), _c(1.0, x)) * x
    return x * sigmoid(inner * 1.5957691216057308)


def softplus(x: Val) -> Val:
    """log(1 + e**x), stable on both sides."""
    return x.max(_c(0.0, x)) + log1p(exp(-x.abs()))


# --- logarithms and powers ------------------------------------------------------------------------------------------

_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)


def log(x: Val) -> Val:
    """Natural logarithm; -inf at 0, NaN below, denormals included."""
    tiny = x < 1.17549435e-38
    scaled = tiny.select(x * 8388608.0, x)
    exponent, m = _split(scaled)
    exponent = tiny.select(exponent - 23.0, exponent)
    f = m - 1.0
    square = f * f
    y = polynomial(f, _LOG) * f * square
    y = fma(exponent, _c(-2.12194440e-4, x), y)
    y = fma(square, _c(-0.5, x), y)
    return _log_edges(x, fma(exponent, _c(0.693359375, x), f + y))


def _split(x: Val) -> tuple[Val, Val]:
    """x = 2**exponent * m with sqrt(1/2) <= m < sqrt 2, for positive normal x."""
    bits = x.bitcast("i32")
    offset = bits - 0x3F3504F3  # bits of sqrt(1/2)
    exponent = (offset >> 23).to("f32")
    m = (bits - (offset & -0x800000)).bitcast("f32")
    return exponent, m


def _log_edges(x: Val, result: Val) -> Val:
    infinity, nan = _c(float("inf"), x), _c(float("nan"), x)
    result = (x < infinity).select(result, x)  # inf and NaN map to themselves
    result = (x < 0.0).select(nan, result)
    return x.eq(0.0).select(-infinity, result)


def log1p(x: Val) -> Val:
    """log(1 + x), corrected for the rounding of 1 + x."""
    u = x + 1.0
    correction = (x - (u - 1.0)) / u
    corrected = (u < float("inf")).select(log(u) + correction, u)
    return (x.abs() < 1e-7).select(x, (u <= 0.0).select(log(u), corrected))


def rsqrt(x: Val) -> Val:
    """1 / sqrt(x)."""
    return 1.0 / x.sqrt()


_EXP64 = (1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def power(x: Val, y: Val) -> Val:
    """x**y, computed in f64; a negative x needs an integral y (else NaN)."""
    size = x.abs()
    exact = _exp_f64(_log_f64(size) * y.to("f64"))
    integral, odd = y.floor().eq(y), ((y * 0.5).floor() * 2.0).ne(y)
    signed = (x < 0.0).select(integral.select(odd.select(-exact, exact), _c(float("nan"), x)), exact)
    at_zero = (y < 0.0).select(_c(float("inf"), x), _c(0.0, x))
    result = x.eq(0.0).select(at_zero, signed)
    one = _c(1.0, x)
    return (y.eq(0.0) | x.eq(1.0)).select(one, result)


def _log_f64(x: Val) -> Val:
    """log of positive f32 ``x`` as f64, within 1e-12: log m = 2 atanh((m - 1) / (m + 1))."""
    exponent, m = _split(x)
    m = m.to("f64")
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = polynomial(square, [1 / k for k in range(17, 0, -2)])
    infinite = x.eq(float("inf"))
    result = fma(exponent.to("f64"), _c(0.6931471805599453, m), s * series * 2.0)
    return infinite.select(_c(float("inf"), m), result)


def _exp_f64(x: Val) -> Val:
    """e**x of f64 ``x`` rounded to f32."""
    clamped = _c(100.0, x).min(_c(-120.0, x).max(x))
    n = (clamped * 1.4426950408889634).round_even()
    f = fma(n, _c(-0.6931471805599453, x), clamped)
    scale = ((n.to("i32").to("i64") + 1023) << 52).bitcast("f64")
    return (polynomial(f, _EXP64) * scale).to("f32")


# --- trigonometry -----------------------------------------------------------------------------------------------------

_HALF_PI = tuple(-float_from_bits(bits) for bits in (0x3FC90FD8, 0x34A8885A, 0x27C234C4))
_SIN = (2.86567956e-6, -1.98559923e-4, 8.33338592e-3, -1.66666672e-1)
_COS = (2.44677067e-5, -1.38877297e-3, 4.16666567e-2, -0.5)


def sin(x: Val) -> Val:
    """Sine; absolute error below 1.5e-7 for |x| <= 1e5."""
    return _quadrant(x, 0)


def cos(x: Val) -> Val:
    """Cosine; absolute error below 1.5e-7 for |x| <= 1e5."""
    return _quadrant(x, 1)


def _quadrant(x: Val, shift: int) -> Val:
    """Reduce to |r| <= pi/4 by a three-part pi/2 (exact with fma), then sine or cosine by the quadrant's number."""
    n = (x * 0.6366197723675814).round_even()
    r = x
    for part in _HALF_PI:
        r = fma(n, _c(part, x), r)
    square = r * r
    sine = fma(polynomial(square, _SIN) * square, r, r)
    cosine = fma(polynomial(square, _COS), square, _c(1.0, x))
    quadrant = n.to("i32") + shift
    value = (quadrant & 1).ne(0).select(cosine, sine)
    sign = (quadrant & 2) << 30
    return (value.bitcast("i32") ^ sign).bitcast("f32")


FUNCTIONS = {
    "exp": exp, "log": log, "log1p": log1p, "rsqrt": rsqrt, "sin": sin, "cos": cos, "tanh": tanh, "sigmoid": sigmoid,
    "erf": erf, "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "softplus": softplus,
}
"""One-argument functions by name."""
