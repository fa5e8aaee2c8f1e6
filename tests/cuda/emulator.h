// A CUDA device on one CPU thread: blocks run one after another, a block's threads as fibers that take turns at barriers.
// What PTX does in the kernels' prelude is done here in C++, after the tables of the PTX ISA.
// Two switches show what a race on a device would: `emu_late` holds asynchronous copies back until they are waited for, and
// with `emu_backward` the last thread takes the first turn.
#pragma once
#define TW_EMULATED
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct emu_dim { unsigned x, y, z; };
struct emu_fiber {
  void *stack;  // saved stack pointer
  char *memory;
  emu_dim at;
  bool done;
};
struct emu_barrier { int arrived; long round; };
struct emu_copy { void *to; const void *from; int bytes; bool on; long group; };
struct emu_queue { emu_copy *copies; int count, room; long groups; };  // what a thread has under way, in order

constexpr int EMU_THREADS = 1024, EMU_STACK = 96 << 10;
static emu_fiber emu_fibers[EMU_THREADS];
static int emu_count, emu_now, emu_idle;
static void *emu_home;
static emu_dim emu_block_at, emu_block_size, emu_grid_size;
static emu_barrier emu_block_barrier, emu_warp_barrier[EMU_THREADS / 32];
static int emu_block_alive, emu_warp_alive[EMU_THREADS / 32];
static unsigned long long emu_slots[EMU_THREADS][8];
alignas(128) static unsigned char emu_memory[232 << 10];
static emu_queue emu_queues[EMU_THREADS];
extern "C" { int emu_late, emu_backward; }
static void (*emu_entry)(void **);
static void **emu_params;

#define threadIdx (emu_fibers[emu_now].at)
#define blockIdx emu_block_at
#define blockDim emu_block_size
#define gridDim emu_grid_size

extern "C" void emu_switch(void **save, void *load);
asm(R"(
.text
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

static void emu_yield() {
  int from = emu_now, to = from;
  if (++emu_idle > 2 * emu_count + 8) {
    fprintf(stderr, "emulated block hangs: thread %d waits at a barrier that others never reach\n", from);
    abort();
  }
  do to = (to + (emu_backward ? emu_count - 1 : 1)) % emu_count;
  while (emu_fibers[to].done && to != from);
  if (to == from) return;
  emu_now = to;
  emu_switch(&emu_fibers[from].stack, emu_fibers[to].stack);
}

static void emu_release(emu_barrier &b) { b.arrived = 0, b.round++, emu_idle = 0; }
static void emu_wait(emu_barrier &b, const int &alive) {
  long round = b.round;
  if (++b.arrived >= alive) emu_release(b);
  while (b.round == round) emu_yield();
}

static void emu_start() {
  emu_entry(emu_params);
  int warp = emu_now / 32;
  emu_fibers[emu_now].done = true;
  emu_idle = 0;
  if (--emu_block_alive && emu_block_barrier.arrived >= emu_block_alive) emu_release(emu_block_barrier);
  if (--emu_warp_alive[warp] && emu_warp_barrier[warp].arrived >= emu_warp_alive[warp]) emu_release(emu_warp_barrier[warp]);
  void *dead;
  if (!emu_block_alive) emu_switch(&dead, emu_home);
  emu_yield();
  abort();
}

// Run a grid of a kernel; `entry` unpacks the parameters as cuLaunchKernel takes them.
static void emu_run(void (*entry)(void **), emu_dim grid, unsigned threads, void **params) {
  emu_entry = entry, emu_params = params;
  emu_grid_size = grid, emu_block_size = {threads, 1, 1}, emu_count = (int)threads;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        emu_block_at = {x, y, z};
        memset(emu_memory, 0xff, sizeof emu_memory);  // NaN: what was never written shows
        emu_block_alive = (int)threads, emu_idle = 0, emu_block_barrier = {};
        for (unsigned t = 0; t < threads; t++) {
          emu_fiber &f = emu_fibers[t];
          if (!f.memory) f.memory = (char *)malloc(EMU_STACK);
          void **top = (void **)((uintptr_t)(f.memory + EMU_STACK) & ~(uintptr_t)63);
          *--top = nullptr;  // a return address: stacks are 8 off a multiple of 16 where functions begin
          *--top = (void *)emu_start;
          for (int i = 0; i < 6; i++) *--top = nullptr;
          f.stack = top, f.at = {t, 0, 0}, f.done = false;
          emu_queues[t].count = 0, emu_queues[t].groups = 0;
          if (t % 32 == 0) emu_warp_barrier[t / 32] = {}, emu_warp_alive[t / 32] = 0;
          emu_warp_alive[t / 32]++;
        }
        emu_now = emu_backward ? emu_count - 1 : 0;
        emu_switch(&emu_home, emu_fibers[emu_now].stack);
      }
}

template <class... A, size_t... I> void emu_unpack(void (*f)(A...), void **p, std::index_sequence<I...>) { f(*(std::decay_t<A> *)p[I]...); }
template <class... A> void emu_call(void (*f)(A...), void **p) { emu_unpack(f, p, std::index_sequence_for<A...>{}); }

// --- the device's functions ------------------------------------------------------------------------------------------

static void __syncthreads() { emu_wait(emu_block_barrier, emu_block_alive); }
static void __syncwarp(unsigned = ~0u) { emu_wait(emu_warp_barrier[emu_now / 32], emu_warp_alive[emu_now / 32]); }
template <class T> T __shfl_sync(unsigned, T x, int lane) {
  int warp = emu_now / 32 * 32;
  memcpy(emu_slots[emu_now], &x, sizeof x);
  __syncwarp();
  memcpy(&x, emu_slots[warp + (lane & 31)], sizeof x);
  __syncwarp();
  return x;
}
template <class T> T __shfl_xor_sync(unsigned m, T x, int step) { return __shfl_sync(m, x, (emu_now & 31) ^ step); }
static unsigned __ballot_sync(unsigned, bool on) {
  int warp = emu_now / 32 * 32;
  emu_slots[emu_now][0] = on;
  __syncwarp();
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (unsigned)emu_slots[warp + i][0] << i;
  __syncwarp();
  return r;
}
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
static inline void __threadfence() {}
static inline unsigned atomicAdd(unsigned *p, unsigned x) { unsigned was = *p; *p += x; return was; }
static inline float __uint_as_float(unsigned x) { float r; memcpy(&r, &x, 4); return r; }
static inline float __int_as_float(int x) { float r; memcpy(&r, &x, 4); return r; }
static inline unsigned __float_as_uint(float x) { unsigned r; memcpy(&r, &x, 4); return r; }
static inline int __float_as_int(float x) { int r; memcpy(&r, &x, 4); return r; }
#define __expf expf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float tw_exp2(float x) { return exp2f(x); }
template <class T> T __ldg(const T *p) { return *p; }
static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
  return c;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  unsigned long long both = a | (unsigned long long)b << 32;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };

static inline unsigned short tw_bits_bf16(float x) {
  unsigned u = __float_as_uint(x);
  return x != x ? 0x7fff : (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline unsigned short tw_bits_f16(float x) { _Float16 h = (_Float16)x; unsigned short r; memcpy(&r, &h, 2); return r; }
static inline float tw_from_f16(unsigned short x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
static inline unsigned tw_pack_bf16(float low, float high) { return tw_bits_bf16(low) | (unsigned)tw_bits_bf16(high) << 16; }
static inline unsigned tw_pack_f16(float low, float high) { return tw_bits_f16(low) | (unsigned)tw_bits_f16(high) << 16; }

static unsigned char *tw_shared() { return emu_memory; }
static void emu_do(const emu_copy &c) {
  if (c.on) memcpy(c.to, c.from, c.bytes); else memset(c.to, 0, c.bytes);
}
static void emu_start_copy(void *to, const void *from, int bytes, bool on) {
  if ((uintptr_t)to % bytes || (on && (uintptr_t)from % bytes)) { fprintf(stderr, "an asynchronous copy is not aligned\n"); abort(); }
  emu_queue &q = emu_queues[emu_now];
  emu_copy copy = {to, from, bytes, on, q.groups};
  if (!emu_late) return emu_do(copy);
  if (q.count == q.room) q.copies = (emu_copy *)realloc(q.copies, (q.room = 2 * q.room + 16) * sizeof(emu_copy));
  q.copies[q.count++] = copy;
}
static void tw_copy16(void *to, const void *from, bool on) { emu_start_copy(to, from, 16, on); }
static void tw_copy4(void *to, const void *from, bool on) { emu_start_copy(to, from, 4, on); }
static void tw_commit() { emu_queues[emu_now].groups++; }
template <int N> void tw_wait() {
  emu_queue &q = emu_queues[emu_now];
  int done = 0;
  while (done < q.count && q.copies[done].group < q.groups - N) emu_do(q.copies[done++]);
  memmove(q.copies, q.copies + done, (q.count -= done) * sizeof(emu_copy));
}

// Every lane of the warp gives `words` words; then `f` sees all of them, by lane.
template <class F> void emu_together(const unsigned *mine, int words, F f) {
  memcpy(emu_slots[emu_now], mine, words * sizeof(unsigned));
  __syncwarp();
  f([warp = emu_now / 32 * 32](int lane, int word) { return ((const unsigned *)emu_slots[warp + lane])[word]; });
  __syncwarp();
}
static unsigned short emu_half(const void *row, int i) { unsigned short r; memcpy(&r, (const char *)row + 2 * i, 2); return r; }
static void emu_matrices(unsigned *r, const void *row, bool transposed) {
  if ((uintptr_t)row % 16) { fprintf(stderr, "a matrix row is not aligned\n"); abort(); }
  unsigned mine[2] = {(unsigned)(uintptr_t)row, (unsigned)((uintptr_t)row >> 32)};
  int lane = emu_now & 31;
  emu_together(mine, 2, [&](auto given) {
    for (int m = 0; m < 4; m++) {
      auto address = [&](int i) { return (const void *)((uintptr_t)given(8 * m + i, 0) | (uintptr_t)given(8 * m + i, 1) << 32); };
      int a = lane / 4, b = 2 * (lane % 4);
      r[m] = transposed ? emu_half(address(b), a) | (unsigned)emu_half(address(b + 1), a) << 16
                        : emu_half(address(a), b) | (unsigned)emu_half(address(a), b + 1) << 16;
    }
  });
}
static void tw_matrices(unsigned *r, const void *row) { emu_matrices(r, row, false); }
static void tw_matrices_transposed(unsigned *r, const void *row) { emu_matrices(r, row, true); }

// mma.m16n8: a has rows g and g + 8 (g = lane / 4) and, of each, words t = lane % 4 and t + 4 of the row's K; b has column g
// and words t and t + 4; d has rows g and g + 8, columns 2 t and 2 t + 1.
template <class D, class P> void emu_mma(D *d, const unsigned *a, const unsigned *b, P product) {
  unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  int lane = emu_now & 31, g = lane / 4, t = lane % 4;
  emu_together(mine, 6, [&](auto given) {
    for (int i = 0; i < 4; i++) {
      int high = i / 2, column = 2 * t + i % 2;
      for (int word = 0; word < 8; word++)
        d[i] += product(given(4 * g + word % 4, high + 2 * (word / 4)), given(4 * column + word % 4, 4 + word / 4));
    }
  });
}
