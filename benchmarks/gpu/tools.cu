// Random weights, and the bandwidth of reading.
struct alignas(16) quad { u32 word[4]; };

TW_FN u32 hash(i64 i) {
  u32 x = (u32)i * 0x9e3779b9u + (u32)(i >> 32) * 0x85ebca6bu;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T> TW_FN void uniform(T *to, i64 count, double scale) {
  const float span = (float)scale * 0x1p-31f;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
    tw_store(to + i, (float)(i32)hash(i) * span);
}

extern "C" __global__ void __launch_bounds__(256) tools_f32(f32 *to, i64 count, double scale) { uniform(to, count, scale); }
extern "C" __global__ void __launch_bounds__(256) tools_f16(f16 *to, i64 count, double scale) { uniform(to, count, scale); }
extern "C" __global__ void __launch_bounds__(256) tools_bf16(bf16 *to, i64 count, double scale) { uniform(to, count, scale); }

extern "C" __global__ void __launch_bounds__(256) tools_bytes(u8 *to, i64 count, double scale) {
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) to[i] = (u8)hash(i);
}

extern "C" __global__ void __launch_bounds__(512) tools_read(const quad *__restrict__ from, i64 count, u32 *to) {
  u32 sum = 0;
  const i64 step = (i64)gridDim.x * blockDim.x;
#pragma unroll 8
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const quad q = from[i];
    sum ^= q.word[0] ^ q.word[1] ^ q.word[2] ^ q.word[3];
  }
  if (sum == 0x12345678u) *to = sum;
}
