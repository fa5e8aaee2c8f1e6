// Attention in plain f32: a block goes over keys in shared memory; its threads share the scores (a key and SCORES_EACH rows
// each), then the rows' softmax (a warp a row), then the sums (a column and SUMS_EACH rows each).

// What lies in shared memory behind the stages: scores [ROWS, SCORE_STRIDE], and each row's top score, weight and fading.
template <class P> struct tw_board {
  float *scores, *top, *weight, *fade;
};

template <class P>
TW_FN void tw_score_keys(const P &p, const tw_work &w, const tw_board<P> &board, const float *q, const float *keys,
                         int key) {
  constexpr int R = P::SCORES_EACH;
  tw_deal<P::ROWS / R, P::KEYS, 1, P::THREADS>(threadIdx.x, [&](int set, int i) {
    float x[R] = {};
    for (int d = 0; d < P::WIDTH; d += 4) {
      float4 k = *(const float4 *)(keys + i * P::KEY_STRIDE + d);
#pragma unroll
      for (int r = 0; r < R; r++) {
        float4 a = *(const float4 *)(q + (set * R + r) * P::KEY_STRIDE + d);
        x[r] = fmaf(a.x, k.x, fmaf(a.y, k.y, fmaf(a.z, k.z, fmaf(a.w, k.w, x[r]))));
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      int row = w.row + set * R + r, query = row / P::GROUP, at = key + i;
      bool seen = row < p.rows() && p.low(w.origin + query) <= at && at < min(p.high(w.origin + query), w.end);
      float score = -TW_INF;
      if (seen) score = p.score(x[r], w.b, w.head * P::GROUP + row % P::GROUP, query, at) * P::UNIT;
      board.scores[(set * R + r) * P::SCORE_STRIDE + i] = score;
    }
  });
}

template <class P> TW_FN void tw_soften_rows(const tw_board<P> &board) {
  int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < P::ROWS; row += P::WARPS) {
    float *scores = board.scores + row * P::SCORE_STRIDE, was = board.top[row], top = was, weight = 0.0f;
    for (int i = lane; i < P::KEYS; i += 32) top = fmaxf(top, scores[i]);
    top = tw_warp<tw_most>(top);
    for (int i = lane; i < P::KEYS; i += 32) weight += scores[i] = tw_share(scores[i], top);
    weight = tw_warp<tw_sum>(weight);
    if (lane == 0) {
      float fade = tw_share(was, top);
      board.top[row] = top, board.fade[row] = fade, board.weight[row] = board.weight[row] * fade + weight;
    }
    __syncwarp();
  }
}

template <class P> TW_FN void tw_attend_plain(const P &p) {
  tw_work w;
  if (!tw_take(p, w)) return;
  constexpr int R = P::SUMS_EACH, SETS = P::ROWS / R, UNITS = (SETS * P::VDIM + P::THREADS - 1) / P::THREADS;
  constexpr int TILE = P::CODE_BITS ? P::KEYS * (P::KEY_STRIDE + P::VALUE_STRIDE) : 0;
  float *q = (float *)tw_shared(), *tile = q + P::ROWS * P::KEY_STRIDE;
  auto *ring = (typename P::Brought *)(tile + TILE);
  float *scores = (float *)(ring + P::STAGES * P::STAGE);
  float *top = scores + P::ROWS * P::SCORE_STRIDE;
  tw_board<P> board = {scores, top, top + P::ROWS, top + 2 * P::ROWS};
  for (int row = threadIdx.x; row < P::ROWS; row += P::THREADS) board.top[row] = -TW_INF, board.weight[row] = 0.0f;
  auto stage_of = [&](int step) { return ring + (step - w.first) % P::STAGES * P::STAGE; };
  auto fetch = [&](int step) {
    if (step < w.last) tw_fetch_keys<P, P::THREADS>(p, w, stage_of(step), step * P::KEYS, threadIdx.x);
    tw_commit();
  };
#pragma unroll
  for (int i = 0; i < P::STAGES - 1; i++) fetch(w.first + i);
  tw_fetch_queries(p, w, q);
  tw_commit();
  tw_wait<0>();

  float sums[UNITS][R] = {};
  for (int step = w.first; step < w.last; step++) {
    tw_wait<P::STAGES - 2>();
    __syncthreads();
    fetch(step + P::STAGES - 1);
    const float *keys = tw_open<P, P::THREADS>(w, stage_of(step), tile, step * P::KEYS, threadIdx.x);
    const float *values = keys + P::KEYS * P::KEY_STRIDE;
    tw_score_keys(p, w, board, q, keys, step * P::KEYS);
    __syncthreads();
    tw_soften_rows<P>(board);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < UNITS; n++) {
      int unit = threadIdx.x + n * P::THREADS, row = unit / P::VDIM * R, column = unit % P::VDIM;
      if (unit >= SETS * P::VDIM) break;
#pragma unroll
      for (int r = 0; r < R; r++) sums[n][r] *= board.fade[row + r];
      for (int i = 0; i < P::KEYS; i += 4) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = values[(i + e) * P::VALUE_STRIDE + column];
#pragma unroll
        for (int r = 0; r < R; r++) {
          float4 a = *(const float4 *)(board.scores + (row + r) * P::SCORE_STRIDE + i);
          sums[n][r] = fmaf(a.x, v[0], fmaf(a.y, v[1], fmaf(a.z, v[2], fmaf(a.w, v[3], sums[n][r]))));
        }
      }
    }
  }
  tw_wait<0>();
  __syncthreads();
  float *all = (float *)tw_shared(), *stats = all + P::ROWS * P::SUM_STRIDE;
  float kept[2] = {};
  static_assert(P::ROWS <= P::THREADS, "a thread for each row's statistics");
  if (threadIdx.x < P::ROWS) kept[0] = board.top[threadIdx.x], kept[1] = board.weight[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < P::ROWS) stats[2 * threadIdx.x] = kept[0], stats[2 * threadIdx.x + 1] = kept[1];
#pragma unroll
  for (int n = 0; n < UNITS; n++) {
    int unit = threadIdx.x + n * P::THREADS;
#pragma unroll
    for (int r = 0; r < R; r++)
      if (unit < SETS * P::VDIM) all[(unit / P::VDIM * R + r) * P::SUM_STRIDE + unit % P::VDIM] = sums[n][r];
  }
  __syncthreads();
  tw_finish(p, w, all, stats);
}
