// Attention in tensor cores: 16-bit queries, keys and values, scores and sums in f32.
//
// A warp has TILES tiles of 16 rows. Either each warp of a block has rows of its own and all see the same keys (prefill),
// or all have the same rows and each goes over keys of its own, never waiting for others until the end (OWN_KEYS, decode).
// Fragments are those of mma.m16n8k16: of 16 rows a lane holds rows lane / 4 and lane / 4 + 8, of each 8 columns two.

TW_FN u32 tw_pack(bf16, float low, float high) { return tw_pack_bf16(low, high); }
TW_FN u32 tw_pack(f16, float low, float high) { return tw_pack_f16(low, high); }

// The sum of a number of each of the four lanes that share a row.
TW_FN float tw_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <class P> struct tw_rows {
  float sums[P::TILES][P::VALUE_WIDTH / 8][4], top[P::TILES][2], weight[P::TILES][2];
  float zeros[P::TILES][2];  // of codes: what the zeros of values add to all of a row's sums
};
template <class P> using tw_scores = float[P::TILES][P::KEYS / 8][4];
template <class P> using tw_queries = u32[P::TILES][4];

template <class P> TW_FN void tw_read_queries(tw_queries<P> &a, const typename P::Tile *q, int step, int lane) {
#pragma unroll
  for (int r = 0; r < P::TILES; r++)
    tw_matrices(a[r], q + (16 * r + lane % 16) * P::KEY_STRIDE + 16 * step + lane / 16 * 8);
}

// scores = q * keys^T; the fragments of q are `held`, or read from shared memory.
template <class P> TW_FN void tw_multiply_keys(tw_scores<P> &scores, const typename P::Tile *q, const tw_queries<P> *held,
                                               const typename P::Tile *keys, int lane) {
#pragma unroll
  for (int step = 0; step < P::WIDTH / 16; step++) {
    tw_queries<P> read;
    if (!P::HELD) tw_read_queries<P>(read, q, step, lane);
    const u32 (*a)[4] = P::HELD ? held[step] : read;
#pragma unroll
    for (int n = 0; n < P::KEYS / 16; n++) {
      u32 b[4];
      tw_matrices(b, keys + (16 * n + lane % 8 + lane / 16 * 8) * P::KEY_STRIDE + 16 * step + lane / 8 % 2 * 8);
#pragma unroll
      for (int r = 0; r < P::TILES; r++) {
        tw_mma(typename P::Tile(), scores[r][2 * n], a[r], b);
        tw_mma(typename P::Tile(), scores[r][2 * n + 1], a[r], b + 2);
      }
    }
  }
}

// sums += weights * values, the weights as the scores' fragments have them.
template <class P>
TW_FN void tw_multiply_values(tw_rows<P> &rows, const tw_scores<P> &scores, const typename P::Values *values, int lane) {
#pragma unroll
  for (int step = 0; step < P::KEYS / 16; step++) {
    tw_queries<P> a;
#pragma unroll
    for (int r = 0; r < P::TILES; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *pair = scores[r][2 * step + i / 2] + i % 2 * 2;
        a[r][i] = tw_pack(typename P::Values(), pair[0], pair[1]);
      }
#pragma unroll
    for (int n = 0; n < P::VALUE_WIDTH / 16; n++) {
      u32 b[4];
      tw_matrices_transposed(b, values + (16 * step + lane % 16) * P::VALUE_STRIDE + 16 * n + lane / 16 * 8);
#pragma unroll
      for (int r = 0; r < P::TILES; r++) {
        tw_mma(typename P::Values(), rows.sums[r][2 * n], a[r], b);
        tw_mma(typename P::Values(), rows.sums[r][2 * n + 1], a[r], b + 2);
      }
    }
  }
}

// Of codes: see attention_codes_mma.cuh.
template <class P> using tw_row_sums = float[P::TILES][2];
template <class P> TW_FN void tw_sum_queries(tw_row_sums<P> &totals, const typename P::Tile *q, int lane);
template <class P>
TW_FN void tw_scale_scores(tw_scores<P> &scores, const tw_row_sums<P> &totals, const u8 *stage, int lane);
template <class P>
TW_FN void tw_scale_weights(tw_rows<P> &rows, tw_scores<P> &scores, const u8 *stage, int count, int lane);

// What the problem does to scores, and -inf for keys that a row does not see; `all` are seen by each row.
template <class P>
TW_FN void tw_adjust(const P &p, const tw_work &w, tw_scores<P> &scores, int row, int key, bool all, int lane) {
#pragma unroll
  for (int r = 0; r < P::TILES; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at = row + 16 * r + 8 * half + lane / 4, query = at / P::GROUP, head = w.head * P::GROUP + at % P::GROUP;
      int low = all ? 0 : p.low(w.origin + query), high = all ? w.end : min(p.high(w.origin + query), w.end);
      if (at >= p.rows()) high = 0;
#pragma unroll
      for (int j = 0; j < P::KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float &x = scores[r][j][2 * half + i];
          int k = key + 8 * j + lane % 4 * 2 + i;
          if (low <= k && k < high) x = p.score(x, w.b, head, query, k);
          else x = -TW_INF;
        }
    }
}

// Scores become weights relative to a score that the row had: not always the top one, but none is more than 2^8 above it,
// so that sums and weights so far seldom have to fade.
template <class P> TW_FN void tw_soften(tw_rows<P> &rows, tw_scores<P> &scores) {
  float tops[P::TILES][2];
  bool rises = false;
#pragma unroll
  for (int r = 0; r < P::TILES; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = rows.top[r][half];
#pragma unroll
      for (int j = 0; j < P::KEYS / 8; j++) top = fmaxf(top, fmaxf(scores[r][j][2 * half], scores[r][j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      tops[r][half] = top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      rises |= (top - rows.top[r][half]) * P::POWER > 8.0f;
    }
  if (__ballot_sync(~0u, rises)) {
#pragma unroll
    for (int r = 0; r < P::TILES; r++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float top = tops[r][half], fade = tw_exp2(top == -TW_INF ? 0.0f : (rows.top[r][half] - top) * P::POWER);
        rows.top[r][half] = top, rows.weight[r][half] *= fade, rows.zeros[r][half] *= fade;
#pragma unroll
        for (int j = 0; j < P::VALUE_WIDTH / 8; j++)
          rows.sums[r][j][2 * half] *= fade, rows.sums[r][j][2 * half + 1] *= fade;
      }
  }
#pragma unroll
  for (int r = 0; r < P::TILES; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float base = rows.top[r][half] == -TW_INF ? 0.0f : rows.top[r][half], shift = -base * P::POWER;
#pragma unroll
      for (int j = 0; j < P::KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float &x = scores[r][j][2 * half + i];
          x = P::BIASED ? tw_exp2((x - base) * P::POWER) : tw_exp2(fmaf(x, P::POWER, shift));
          rows.weight[r][half] += x;
        }
    }
}

// Rows as `tw_finish` wants them: this warp's begin at `first` of all slices.
template <class P> TW_FN void tw_lay_out(tw_rows<P> &rows, float *sums, float *stats, int first, int lane) {
#pragma unroll
  for (int r = 0; r < P::TILES; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = first + 16 * r + 8 * half + lane / 4;
      float weight = tw_of_four(rows.weight[r][half]), zeros = P::ZEROS ? tw_of_four(rows.zeros[r][half]) : 0.0f;
      if (lane % 4 == 0) stats[2 * row] = rows.top[r][half] * P::UNIT, stats[2 * row + 1] = weight;
#pragma unroll
      for (int j = 0; j < P::VALUE_WIDTH / 8; j++) {
        float2 pair = {rows.sums[r][j][2 * half] + zeros, rows.sums[r][j][2 * half + 1] + zeros};
        *(float2 *)(sums + row * P::SUM_STRIDE + 8 * j + lane % 4 * 2) = pair;
      }
    }
}

template <class P> TW_FN void tw_attend_mma(const P &p) {
  using T = typename P::Tile;
  tw_work w;
  if (!tw_take(p, w)) return;
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);  // the compiler sees that all lanes have the same
  int lane = threadIdx.x % 32, own = P::OWN_KEYS ? warp : 0;
  constexpr int TILE = P::CODE_BITS ? P::KEYS * (P::KEY_STRIDE + P::VALUE_STRIDE) : 0, OWN = P::OWN_KEYS ? P::WARPS : 1;
  T *queries = (T *)tw_shared(), *tile = queries + P::ROWS * P::KEY_STRIDE + own * TILE;
  auto *ring = (typename P::Brought *)(queries + P::ROWS * P::KEY_STRIDE + OWN * TILE) + own * P::STAGES * P::STAGE;
  auto key_of = [&](int step) { return step * P::STEP + own * P::KEYS; };
  auto stage_of = [&](int step) { return ring + (step - w.first) % P::STAGES * P::STAGE; };
  constexpr int THREADS = P::OWN_KEYS ? 32 : P::THREADS;
  auto fetch = [&](int step) {
    if (step < w.last) tw_fetch_keys<P, THREADS>(p, w, stage_of(step), key_of(step), threadIdx.x % THREADS);
    tw_commit();
  };
#pragma unroll
  for (int i = 0; i < P::STAGES - 1; i++) fetch(w.first + i);
  tw_fetch_queries(p, w, queries);
  tw_commit();
  tw_wait<0>();
  __syncthreads();

  int mine = P::OWN_KEYS ? 0 : warp * P::TILES * 16, row = w.row + mine, last = min(row + P::TILES * 16, p.rows()) - 1;
  int low = p.low(w.origin + last / P::GROUP), high = min(p.high(w.origin + row / P::GROUP), w.end);  // seen by all rows
  int lowest = p.low(w.origin + row / P::GROUP), end = row <= last ? min(p.high(w.origin + last / P::GROUP), w.end) : 0;
  const T *q = queries + mine * P::KEY_STRIDE;
  tw_queries<P> held[P::HELD ? P::WIDTH / 16 : 1];
#pragma unroll
  for (int step = 0; step < P::WIDTH / 16; step++)
    if (P::HELD) tw_read_queries<P>(held[step], q, step, lane);

  tw_row_sums<P> totals = {};
  if constexpr (P::ZEROS) tw_sum_queries<P>(totals, q, lane);
  tw_rows<P> rows = {};
#pragma unroll
  for (int r = 0; r < P::TILES; r++) rows.top[r][0] = rows.top[r][1] = -TW_INF;
  for (int step = w.first; step < w.last; step++) {
    tw_wait<P::STAGES - 2>();
    if (P::OWN_KEYS) __syncwarp();
    else __syncthreads();
    fetch(step + P::STAGES - 1);
    int key = key_of(step);
    const typename P::Brought *stage = stage_of(step);
    const T *keys = tw_open<P, THREADS>(w, stage, tile, key, threadIdx.x % THREADS);
    if (key >= end || key + P::KEYS <= lowest) continue;
    tw_scores<P> scores = {};
    tw_multiply_keys<P>(scores, q, held, keys, lane);
    if constexpr (P::CODE_BITS > 0) tw_scale_scores<P>(scores, totals, stage, lane);
    bool all = low <= key && key + P::KEYS <= high;
    if (P::SCORED || !all) tw_adjust(p, w, scores, row, key, all, lane);
    tw_soften(rows, scores);
    if constexpr (P::CODE_BITS > 0) tw_scale_weights<P>(rows, scores, stage, w.end - key, lane);
    tw_multiply_values(rows, scores, (const typename P::Values *)(keys + P::KEYS * P::KEY_STRIDE), lane);
  }
  tw_wait<0>();
  __syncthreads();
  float *sums = (float *)tw_shared(), *stats = sums + P::SLICES * P::ROWS * P::SUM_STRIDE;
  tw_lay_out(rows, sums, stats, P::OWN_KEYS ? warp * P::ROWS : mine, lane);
  __syncthreads();
  tw_finish(p, w, sums, stats);
}
