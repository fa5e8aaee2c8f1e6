"""Elementary functions of f32 values (scalars or vectors of any width) as polynomials.

Errors are relative to the exact result and were measured over the whole range (see tests/backend/test_mlir_math.py).
Infinities and NaNs behave as in C; denormal results may become zero.
"""

from collections.abc import Sequence

from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.tables import erf_tail, gated, tanh_tail
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
    lowest = -105.0 if _is_wide(x) else -87.5
    clamped = _c(89.0, x).min(_c(lowest, x).max(x))  # the constant first: a NaN stays a NaN
    n = (clamped * _LOG2E_HIGH).round_even()
    f = fma(clamped, _c(_LOG2E_HIGH, x), -n)
    f = fma(clamped, _c(_LOG2E_LOW, x), f)
    return _scale(polynomial(f, _EXP2), n)


def exp2_of_negative(x: Val) -> Val:
    """2**x for x <= 0, within 1.5e-7; 0 where the result would be (nearly) denormal."""
    clamped = _c(-152.0 if _is_wide(x) else -126.0, x).max(x)
    n = clamped.round_even()
    return _scale(polynomial(clamped - n, _EXP2), n)


_EXP2_ROUGH = (0.23842570185661316, 0.7034428119659424, 1.0004429817199707)
_WHOLE = 1.5 * 2.0**23  # f32 numbers around it are the integers


def exp2_in_bits(x: Val, rough: bool) -> Val:
    """2**x for -125 <= x <= 127, within 1.5e-7, or 1.8e-3 when ``rough``, by instructions that every pipe is quick at."""
    shifted = x + _WHOLE
    value = polynomial(x - (shifted - _WHOLE), _EXP2_ROUGH if rough else _EXP2)
    return (value.bitcast("i32") + (shifted.bitcast("i32") << 23)).bitcast("f32")


def _scale(p: Val, n: Val) -> Val:
    """p * 2**n for p near 1 and n <= 128; n >= -152 where there is an instruction, elsewhere n >= -126, which gives 0."""
    if _is_wide(p):
        every, current = constant(-1, "i16"), constant(4, "i32")
        return intrinsic("llvm.x86.avx512.mask.scalef.ps.512", "f32", 16, p, n, _c(0.0, p), every, current)
    # 2**n in two factors: the exponent field alone reaches 127, and n may be 128. At -126 the field is 0: zero.
    half = ((n.to("i32") + 126) << 23).bitcast("f32")
    return (p * half) * 2.0


def _is_wide(x: Val) -> bool:
    """Whether this is one vector of AVX-512, whose scalef and permutations are used here."""
    return x.lanes == 16 and Kernel.current().target.vector_bits == 512


def sigmoid(x: Val) -> Val:
    """1 / (1 + e**-x)."""
    return 1.0 / (exp(-x) + 1.0)


def silu(x: Val) -> Val:
    """x * sigmoid(x)."""
    return x / (exp(-x) + 1.0)


# Rational minimax approximations (Remez's problem solved by Lawson's iteration); the highest power first.
_TANH = ((1.3354225e-08, 2.060876e-05, 3.4955684e-03, 1.3381009e-01, 1.0),
         (7.776377e-07, 3.2856027e-04, 2.5876908e-02, 4.6714324e-01, 1.0))
_ERF = ((2.1231338e-06, 2.8594234e-04, 3.652726e-03, 5.2418444e-02, 1.8730772e-01, 1.1283791),
        (3.889825e-05, 1.1417001e-03, 1.4742442e-02, 1.1290024e-01, 4.9933004e-01, 1.0))
_PHI = ((2.3457535e-08, 6.318493e-06, 1.6142921e-04, 4.63318e-03, 3.311164e-02, 3.9894226e-01),
        (1.2155704e-06, 7.1356255e-05, 1.8428053e-03, 2.822506e-02, 2.4966502e-01, 1.0))
_Ratio = tuple[Sequence[float], Sequence[float]]


def tanh(x: Val) -> Val:
    """Hyperbolic tangent within 3.5e-7."""
    return _clamp(_odd(_clamp(x, 9.0), _TANH), 1.0)


def erf(x: Val) -> Val:
    """The error function within 3.5e-7."""
    return _clamp(_odd(_clamp(x, 3.8325), _ERF), 1.0)


def gelu(x: Val) -> Val:
    """x * (1 + erf(x / sqrt 2)) / 2; the factor of x is within 2.5e-7 of the exact one, and exactly 0 or 1 far out."""
    if _is_wide(x):
        return gated(x, erf_tail, 5.4)
    return x * (_odd(_clamp(x, 5.41), _PHI) + 0.5)


def gelu_tanh(x: Val) -> Val:
    """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2, as accurate as `gelu`."""
    if _is_wide(x):
        return gated(x, tanh_tail, 5.4)
    inner = fma(x * x, _c(0.7978845608028654 * 0.044715, x), _c(0.7978845608028654, x)) * x
    half = [coefficient / 2 for coefficient in _TANH[0]]
    return x * (_odd(_clamp(inner, 9.02), (half, _TANH[1])) + 0.5)


def _odd(x: Val, ratio: _Ratio) -> Val:
    """x * P(x**2) / Q(x**2)."""
    square = x * x
    return x * polynomial(square, ratio[0]) / polynomial(square, ratio[1])


def _clamp(x: Val, bound: float) -> Val:
    """x between -bound and bound; a NaN stays a NaN."""
    return _c(bound, x).min(_c(-bound, x).max(x))  # the constant first: of two, the second is taken when one is a NaN


def softplus(x: Val) -> Val:
    """log(1 + e**x), stable on both sides; the logarithm as a ratio of polynomials, since e**-|x| <= 1."""
    e = exp(-x.abs())
    return x.max(_c(0.0, x)) + e * polynomial(e, _LOG1P[0]) / polynomial(e, _LOG1P[1])


_LOG1P = ((3.4173173e-03, 2.3815873e-01, 1.0662206, 1.0), (7.528775e-02, 6.879386e-01, 1.5662205, 1.0))


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
