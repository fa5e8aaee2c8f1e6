// What CUDA kernels share: element types, arithmetic with the meaning of the IR's operations, folds over a block.
// An emulation of the device defines TW_EMULATED and gives its own forms of what is written in PTX here.

typedef long long i64;
typedef int i32;
typedef short i16;
typedef signed char i8;
typedef unsigned char u8;
typedef unsigned u32;
typedef float f32;
typedef double f64;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

#define TW_INF __int_as_float(0x7f800000)
#define TW_FN __device__ __forceinline__

#ifndef TW_EMULATED
TW_FN unsigned short tw_bits_bf16(float x) { unsigned short r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x)); return r; }
TW_FN unsigned short tw_bits_f16(float x) { unsigned short r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x)); return r; }
TW_FN float tw_from_f16(unsigned short x) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x)); return r; }
// Two numbers as the halves of a word, the first one low.
TW_FN u32 tw_pack_bf16(float low, float high) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
TW_FN u32 tw_pack_f16(float low, float high) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
// 2^x within 2 units in the last place, 0 for what is not normal.
TW_FN float tw_exp2(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }

// a * b + c of pairs of 16-bit floats, each rounded once.
TW_FN u32 tw_fma2(bf16, u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
TW_FN u32 tw_fma2(f16, u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }

// Dynamic shared memory, 128-byte aligned.
extern __shared__ __align__(128) u8 tw_dynamic[];
TW_FN u8 *tw_shared() { return tw_dynamic; }
TW_FN u32 tw_shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Copies of 16 bytes (4) to shared memory that run on beside the threads; zeros where `on` is false. A commit ends a group
// of copies, and a wait leaves N groups under way.
TW_FN void tw_copy16(u32 to, const void *from, bool on) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(on ? 16 : 0) : "memory");
}
TW_FN void tw_copy16(void *to, const void *from, bool on) { tw_copy16(tw_shared_address(to), from, on); }
TW_FN void tw_copy4(void *to, const void *from, bool on) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(tw_shared_address(to)), "l"(from), "r"(on ? 4 : 0) : "memory");
}
TW_FN void tw_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> TW_FN void tw_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8.
TW_FN void tw_matrices(u32 *r, u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
TW_FN void tw_matrices(u32 *r, const void *row) { tw_matrices(r, tw_shared_address(row)); }
TW_FN void tw_matrices_transposed(u32 *r, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(tw_shared_address(row)) : "memory");
}

// d[16, 8] += a[16, K] * b[K, 8] in fragments of a warp: K is 16 for 16-bit floats, 32 for 8-bit integers.
TW_FN void tw_mma(bf16, float *d, const u32 *a, const u32 *b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TW_FN void tw_mma(f16, float *d, const u32 *a, const u32 *b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TW_FN void tw_mma(i8, int *d, const u32 *a, const u32 *b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// --- memory ----------------------------------------------------------------------------------------------------------

template <class T> TW_FN T tw_load(const T *p) { return *p; }
TW_FN float tw_load(const bf16 *p) { return __uint_as_float((u32)p->bits << 16); }
TW_FN float tw_load(const f16 *p) { return tw_from_f16(p->bits); }
template <class T, class V> TW_FN void tw_store(T *p, V x) { *p = (T)x; }
template <class V> TW_FN void tw_store(bf16 *p, V x) { p->bits = tw_bits_bf16((float)x); }
template <class V> TW_FN void tw_store(f16 *p, V x) { p->bits = tw_bits_f16((float)x); }

// Codes of few bits, as many as fit in a byte, the first in the lowest bits. Of 3 bits, the highest lies behind the others.
template <int BITS> TW_FN u32 tw_code(const u8 *p, i64 i) { return p[i / (8 / BITS)] >> (int)(i % (8 / BITS)) * BITS & ((1 << BITS) - 1); }
TW_FN u32 tw_code3(const u8 *p, i64 i, i64 count) { return tw_code<2>(p, i) | tw_code<1>(p + (count + 3) / 4, i) << 2; }
template <int BITS> TW_FN int tw_signed(u32 code) { return (int)(code ^ (1 << (BITS - 1))) - (1 << (BITS - 1)); }
TW_FN float tw_f8e4m3(u8 x) {
  float m = (x & 127) == 127 ? __int_as_float(0x7fc00000) : __int_as_float((x & 127) << 20) * 0x1p120f;
  return x & 128 ? -m : m;
}
TW_FN float tw_f8e5m2(u8 x) { return tw_from_f16((unsigned short)(x << 8)); }
TW_FN float tw_f8e8m0(u8 x) {
  return x == 255 ? __int_as_float(0x7fc00000) : x ? __int_as_float((int)x << 23) : __int_as_float(1 << 22);
}
TW_FN float tw_f4e2m1(u32 x) {
  float m = (x & 7) < 2 ? 0.5f * (x & 1) : __int_as_float((((x & 7) >> 1) + 126) << 23 | (x & 1) << 22);
  return x & 8 ? -m : m;
}

// --- arithmetic: tw_ and the name of the operation -------------------------------------------------------------------

template <class T> TW_FN T tw_neg(T x) { return -x; }
template <class T> TW_FN T tw_abs(T x) { return x < 0 ? -x : x; }
TW_FN float tw_abs(float x) { return fabsf(x); }
TW_FN double tw_abs(double x) { return fabs(x); }
template <class T> TW_FN T tw_sign(T x) { return x != x ? x : (T)((x > 0) - (x < 0)); }
template <class T> TW_FN T tw_not(T x) { return ~x; }
TW_FN bool tw_not(bool x) { return !x; }
#define TW_MATH(name, single, wide) \
  TW_FN float tw_##name(float x) { return single; } \
  TW_FN double tw_##name(double x) { return wide; }
TW_MATH(exp, expf(x), exp(x))
TW_MATH(log, logf(x), log(x))
TW_MATH(log1p, log1pf(x), log1p(x))
TW_MATH(sqrt, sqrtf(x), sqrt(x))
TW_MATH(rsqrt, 1.0f / sqrtf(x), 1.0 / sqrt(x))
TW_MATH(reciprocal, 1.0f / x, 1.0 / x)
TW_MATH(sin, sinf(x), sin(x))
TW_MATH(cos, cosf(x), cos(x))
TW_MATH(tanh, tanhf(x), tanh(x))
TW_MATH(sigmoid, 1.0f / (1.0f + expf(-x)), 1.0 / (1.0 + exp(-x)))
TW_MATH(erf, erff(x), erf(x))
TW_MATH(silu, x / (1.0f + expf(-x)), x / (1.0 + exp(-x)))
TW_MATH(gelu, 0.5f * x * (1.0f + erff(x * 0.70710678f)), 0.5 * x * (1.0 + erf(x * 0.7071067811865476)))
TW_MATH(gelu_tanh, 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))),
        0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))))
TW_MATH(softplus, fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))), fmax(x, 0.0) + log1p(exp(-fabs(x))))
#define TW_ROUND(name, single, wide) TW_MATH(name, single, wide) template <class T> TW_FN T tw_##name(T x) { return x; }
TW_ROUND(floor, floorf(x), floor(x))
TW_ROUND(ceil, ceilf(x), ceil(x))
TW_ROUND(round, rintf(x), rint(x))
template <class T> TW_FN T tw_relu(T x) { return x != x || x > 0 ? x : (T)0; }

template <class T> TW_FN T tw_add(T a, T b) { return a + b; }
TW_FN bool tw_add(bool a, bool b) { return a || b; }
template <class T> TW_FN T tw_sub(T a, T b) { return a - b; }
template <class T> TW_FN T tw_mul(T a, T b) { return a * b; }
template <class T> TW_FN T tw_maximum(T a, T b) { return a != a || a > b ? a : b; }
template <class T> TW_FN T tw_minimum(T a, T b) { return a != a || a < b ? a : b; }
template <class T> TW_FN T tw_and(T a, T b) { return a & b; }
template <class T> TW_FN T tw_or(T a, T b) { return a | b; }
template <class T> TW_FN T tw_xor(T a, T b) { return a ^ b; }
template <class T> TW_FN bool tw_eq(T a, T b) { return a == b; }
template <class T> TW_FN bool tw_ne(T a, T b) { return a != b; }
template <class T> TW_FN bool tw_lt(T a, T b) { return a < b; }
template <class T> TW_FN bool tw_le(T a, T b) { return a <= b; }
template <class T> TW_FN bool tw_gt(T a, T b) { return a > b; }
template <class T> TW_FN bool tw_ge(T a, T b) { return a >= b; }
template <class T> TW_FN T tw_where(bool c, T a, T b) { return c ? a : b; }
template <class T, class B> TW_FN T tw_threshold(T x, f32 limit, B by) { return tw_abs(by) < limit ? T(0) : x; }
template <class T> TW_FN T tw_threshold(T x, f32 limit) { return tw_threshold(x, limit, x); }

// Of integers as in numpy, where dividing by 0 gives 0.
template <class T> TW_FN T tw_div(T a, T b) { return b == 0 ? 0 : b == (T)-1 ? (T)(0 - a) : a / b; }
TW_FN u8 tw_div(u8 a, u8 b) { return b ? a / b : 0; }
TW_FN float tw_div(float a, float b) { return a / b; }
TW_FN double tw_div(double a, double b) { return a / b; }
template <class T> TW_FN T tw_mod(T a, T b) { T r = b == 0 || b == (T)-1 ? 0 : a % b; return r != 0 && (r < 0) != (b < 0) ? r + b : r; }
template <class T> TW_FN T tw_floor_div(T a, T b) { return tw_div(a, b) - (T)(b != 0 && b != (T)-1 && a % b != 0 && (a < 0) != (b < 0)); }
TW_FN u8 tw_mod(u8 a, u8 b) { return b ? a % b : 0; }
TW_FN u8 tw_floor_div(u8 a, u8 b) { return b ? a / b : 0; }
template <class T> TW_FN T tw_float_mod(T a, T b) {
  T r = fmod(a, b);
  return r != 0 ? ((r < 0) != (b < 0) ? r + b : r) : copysign((T)0, b) * (r == r ? (T)1 : r);
}
template <class T> TW_FN T tw_float_floor_div(T a, T b) {
  if (b == 0) return a / b;
  T r = fmod(a, b), q = (a - r) / b;
  if (r != 0 && (r < 0) != (b < 0)) q -= 1;
  T down = floor(q);
  return q - down > (T)0.5 ? down + 1 : down;
}
TW_FN float tw_mod(float a, float b) { return tw_float_mod(a, b); }
TW_FN double tw_mod(double a, double b) { return tw_float_mod(a, b); }
TW_FN float tw_floor_div(float a, float b) { return tw_float_floor_div(a, b); }
TW_FN double tw_floor_div(double a, double b) { return tw_float_floor_div(a, b); }
TW_FN float tw_pow(float a, float b) { return powf(a, b); }
TW_FN double tw_pow(double a, double b) { return pow(a, b); }
template <class T> TW_FN T tw_pow(T a, T b) {
  T r = 1;
  for (T i = 0; i < b; i++) r *= a;
  return r;
}

// Indices. Data is made a safe index: a negative one counts from the end, the rest is clamped.
TW_FN i64 tw_max(i64 a, i64 b) { return a > b ? a : b; }
TW_FN i64 tw_min(i64 a, i64 b) { return a < b ? a : b; }
TW_FN i64 tw_floordiv(i64 a, i64 b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
TW_FN i64 tw_pick(i64 i, i64 n) { return tw_max(tw_min(i < 0 ? i + n : i, n - 1), 0); }

// --- folds -----------------------------------------------------------------------------------------------------------

template <class T> struct tw_place { T value; i32 at; }; // of a largest element
struct tw_sum { template <class T> TW_FN T operator()(T a, T b) const { return a + b; } };
struct tw_prod { template <class T> TW_FN T operator()(T a, T b) const { return a * b; } };
struct tw_most { template <class T> TW_FN T operator()(T a, T b) const { return tw_maximum(a, b); } };
struct tw_least { template <class T> TW_FN T operator()(T a, T b) const { return tw_minimum(a, b); } };
struct tw_any { TW_FN bool operator()(bool a, bool b) const { return a || b; } };
struct tw_all { TW_FN bool operator()(bool a, bool b) const { return a && b; } };
struct tw_first { // a NaN is larger than all, and of equals the first wins
  template <class T> TW_FN tw_place<T> operator()(tw_place<T> a, tw_place<T> b) const {
    bool nan = a.value != a.value, other = b.value != b.value;
    bool better = !nan && (b.value > a.value || other), same = b.value == a.value || (nan && other);
    return better || (same && b.at < a.at) ? b : a;
  }
};

template <class T> TW_FN T tw_from_lane(T x, int lane) {
  if constexpr (sizeof(T) < 4) return (T)__shfl_sync(~0u, (int)x, lane);
  else return __shfl_sync(~0u, x, lane);
}
template <class T> TW_FN tw_place<T> tw_from_lane(tw_place<T> x, int lane) {
  return {tw_from_lane(x.value, lane), __shfl_sync(~0u, x.at, lane)};
}

// All threads of a warp get the fold of its values; of a block (of whole warps), of its threads' values.
template <class F, class T> TW_FN T tw_warp(T x) {
  for (int step = 16; step; step >>= 1) x = F()(x, tw_from_lane(x, (threadIdx.x & 31) ^ step));
  return x;
}
template <class F, class T> TW_FN T tw_block(T x) {
  __shared__ T part[32];
  __shared__ T total;
  int warps = blockDim.x >> 5;
  x = tw_warp<F>(x);
  if (warps == 1) return x;
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < warps; i++) x = F()(x, part[i]);
    total = x;
  }
  __syncthreads();
  x = total;
  __syncthreads();
  return x;
}
