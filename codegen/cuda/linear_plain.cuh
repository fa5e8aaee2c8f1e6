// Linear layers without tensor cores: elements of both factors as f32 from whatever they are stored as, products in f32.
// `L` is the layer, whose x_at(m, k) and weight_at(part, n, k) give elements.

// For up to M rows: a warp owns FEATURES features, its lanes neighbouring k's.
template <class L, int M, int FEATURES> TW_FN void tw_multiply_few(const L &layer) {
  i64 rows = layer.rows();
  int lane = threadIdx.x % 32, feature = (blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * FEATURES;
  if (feature >= L::N) return;
  f32 sums[L::PARTS][FEATURES][M] = {};
#pragma unroll 8
  for (int k = lane; k < L::K; k += 32) {
    f32 x[M];
#pragma unroll
    for (int m = 0; m < M; m++) x[m] = layer.x_at(tw_min(m, rows - 1), k);
#pragma unroll
    for (int p = 0; p < L::PARTS; p++)
#pragma unroll
      for (int i = 0; i < FEATURES; i++) {
        f32 w = layer.weight_at(p, min(feature + i, L::N - 1), k);
#pragma unroll
        for (int m = 0; m < M; m++) sums[p][i][m] += w * x[m];
      }
  }
  f32 mine[L::PARTS] = {};
#pragma unroll
  for (int p = 0; p < L::PARTS; p++)
#pragma unroll
    for (int i = 0; i < FEATURES * M; i++) {
      f32 sum = tw_warp<tw_sum>(sums[p][i / M][i % M]);
      if (lane == i) mine[p] = sum;
    }
  int n = feature + lane / M, m = lane % M;
  if (lane < FEATURES * M && n < L::N && m < rows) layer.finish(m, n, mine);
}

// A block owns [M, N]; threads have EACH_M neighbouring rows of it and every (N / EACH_N)th feature.
template <class L, int M, int N, int K, int EACH_M, int EACH_N> struct tw_plain_tile {
  static constexpr int PARTS = L::PARTS, ACROSS = N / EACH_N, THREADS = M / EACH_M * ACROSS;
  static constexpr int X_PITCH = M + 4, W_PITCH = N + 1, X_EACH = M * K / THREADS, W_EACH = N * K / THREADS;
  static constexpr int SLAB = M / EACH_M * N;
  static_assert(M * K % THREADS == 0 && N * K % THREADS == 0 && THREADS % K == 0, "as many elements for each thread");

  const L &layer;
  i64 rows, row;
  int feature;
  f32 *xs, *ws;
  f32 sums[PARTS][EACH_M][EACH_N], x[X_EACH], w[PARTS][W_EACH];

  TW_FN tw_plain_tile(const L &l) : layer(l), rows(l.rows()), row((i64)blockIdx.x * M), feature(blockIdx.y * N) {
    xs = (f32 *)tw_shared(), ws = xs + K * X_PITCH;
#pragma unroll
    for (int i = 0; i < PARTS * EACH_M * EACH_N; i++) (&sums[0][0][0])[i] = 0;
  }

  TW_FN void load(int start) {
    int k = start + threadIdx.x % K, first = threadIdx.x / K;
    bool inside = k < L::K;
#pragma unroll
    for (int i = 0; i < X_EACH; i++) {
      i64 m = row + first + i * (THREADS / K);
      x[i] = inside && m < rows ? layer.x_at(m, k) : 0.0f;
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int i = 0; i < W_EACH; i++) {
        int n = feature + first + i * (THREADS / K);
        w[p][i] = inside && n < L::N ? layer.weight_at(p, n, k) : 0.0f;
      }
  }

  TW_FN void store() {
    int k = threadIdx.x % K, first = threadIdx.x / K;
#pragma unroll
    for (int i = 0; i < X_EACH; i++) xs[k * X_PITCH + first + i * (THREADS / K)] = x[i];
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int i = 0; i < W_EACH; i++) ws[(p * K + k) * W_PITCH + first + i * (THREADS / K)] = w[p][i];
  }

  TW_FN void multiply() {
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
#pragma unroll 4
    for (int k = 0; k < K; k++) {
      f32 a[EACH_M];
#pragma unroll
      for (int i = 0; i < EACH_M; i++) a[i] = xs[k * X_PITCH + down * EACH_M + i];
#pragma unroll
      for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int j = 0; j < EACH_N; j++) {
          f32 b = ws[(p * K + k) * W_PITCH + across + j * ACROSS];
#pragma unroll
          for (int i = 0; i < EACH_M; i++) sums[p][i][j] += a[i] * b;
        }
    }
  }

  // Through shared memory, one of each thread's rows at a time.
  TW_FN void finish() {
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
#pragma unroll
    for (int i = 0; i < EACH_M; i++) {
      __syncthreads();
#pragma unroll
      for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int j = 0; j < EACH_N; j++) xs[p * SLAB + down * N + across + j * ACROSS] = sums[p][i][j];
      __syncthreads();
#pragma unroll 4
      for (int e = threadIdx.x; e < SLAB; e += THREADS) {
        i64 m = row + e / N * EACH_M + i;
        int n = feature + e % N;
        f32 sum[PARTS];
#pragma unroll
        for (int p = 0; p < PARTS; p++) sum[p] = xs[p * SLAB + e];
        if (m < rows && n < L::N) layer.finish(m, n, sum);
      }
    }
  }
};

template <class L, int M, int N, int K, int EACH_M, int EACH_N> TW_FN void tw_multiply_plain(const L &layer) {
  tw_plain_tile<L, M, N, K, EACH_M, EACH_N> block(layer);
  block.load(0);
  for (int k = 0; k < L::K; k += K) {
    __syncthreads();
    block.store();
    __syncthreads();
    if (k + K < L::K) block.load(k + K);
    block.multiply();
  }
  block.finish();
}
