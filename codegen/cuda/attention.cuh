// Attention over tiles of keys with a running softmax (Dao, FlashAttention-2, 2023); where rows are few, in parts of the
// keys that a second kernel puts together (Flash-Decoding).
//
// Keys and values are brought to a ring of stages in shared memory; those of a cache of codes (CODE_BITS) as codes, of which
// attention_codes.cuh makes what is multiplied, step by step.
//
// A row is a query of one of the GROUP heads that share a key head, row = query * GROUP + member; a block has ROWS of one
// sequence and key head. Keys go by in tiles of KEYS, a step takes STEP of them. `P` is the problem, written by the
// emitter: sizes, where operands come from, what a row sees. Scores are in units of UNIT, so that scaling costs nothing.

constexpr float TW_LOG2E = 1.44269504f;
constexpr int tw_up(int n, int step) { return (n + step - 1) / step * step; }

// The steps over all keys that any row of a tile sees, and the parts they are cut into, of `each` steps.
struct tw_cut { int first, steps, each, parts, end; };

template <class P> TW_FN tw_cut tw_cut_keys(const P &p, int b, int row) {
  int at = p.origin(b), last = min(row + P::ROWS, p.rows()) - 1;
  int low = max(p.low(at + row / P::GROUP), 0), end = min(p.high(at + last / P::GROUP), p.keys());
  int first = low / P::STEP, steps = max((end + P::STEP - 1) / P::STEP - first, 0);
  int each = max((steps + p.parts() - 1) / p.parts(), P::LEAST);
  return {first, steps, each, max((steps + each - 1) / each, 1), end};
}

// What a block does: rows from `row` on, steps `first <= step < last`.
struct tw_work {
  int b, head, row, origin, end, first, last, part, parts;
};

// Blocks with the most keys first. False for a part that a short sequence does not have.
template <class P> TW_FN bool tw_take(const P &p, tw_work &w) {
  int lanes = p.batch() * P::HEADS, tile = blockIdx.x / lanes, lane = blockIdx.x - tile * lanes;
  w.b = lane / P::HEADS, w.head = lane % P::HEADS, w.part = blockIdx.z;
  w.row = ((int)gridDim.x / lanes - 1 - tile) * P::ROWS;
  tw_cut cut = tw_cut_keys(p, w.b, w.row);
  w.origin = p.origin(w.b), w.end = cut.end, w.parts = cut.parts;
  w.first = cut.first + w.part * cut.each, w.last = min(w.first + cut.each, cut.first + cut.steps);
  return w.part < cut.parts;
}

// f(row, column) for each piece of PIECE elements of a tile [ROWS, WIDTH], dealt out to threads, AT_ONCE for each.
// Where pieces are elements a warp takes whole rows: what is computed of a row alone is computed once.
template <int ROWS, int WIDTH, int PIECE, int THREADS, int AT_ONCE = 4, class F> TW_FN void tw_deal(int thread, F f) {
  constexpr int ACROSS = WIDTH / PIECE, ALL = ROWS * ACROSS, EACH = (ALL + THREADS - 1) / THREADS;
  if constexpr (PIECE == 1 && WIDTH >= 32) {
#pragma unroll 2
    for (int row = thread / 32; row < ROWS; row += THREADS / 32)
#pragma unroll
      for (int n = 0; n < WIDTH; n += 32)
        if (WIDTH % 32 == 0 || n + thread % 32 < WIDTH) f(row, n + thread % 32);
  } else {
    int row = thread / ACROSS, column = thread % ACROSS * PIECE;
#pragma unroll AT_ONCE
    for (int n = 0; n < EACH; n++) {
      if (ALL % THREADS && thread + n * THREADS >= ALL) break;
      if (THREADS % ACROSS == 0) f(row + n * (THREADS / ACROSS), column);
      else f((thread + n * THREADS) / ACROSS, (thread + n * THREADS) % ACROSS * PIECE);
    }
  }
}

// PIECE elements from memory to a tile of another type.
template <int PIECE, class T, class S> TW_FN void tw_widen(T *to, const S *from, bool on) {
  union { S part[PIECE]; uint4 all; } in;
  if (!on) in.all = {0, 0, 0, 0};
  else if constexpr (PIECE * sizeof(S) == 16) in.all = *(const uint4 *)from;
  else in.part[0] = *from;
  static_assert(PIECE == 1 || PIECE * sizeof(S) == 16, "an element, or 16 bytes");
#pragma unroll
  for (int i = 0; i < PIECE; i++) tw_store(to + i, tw_load(in.part + i));
}

TW_FN float tw_quick_tanh(float x) { return 1.0f - __fdividef(2.0f, 1.0f + tw_exp2(2.0f * TW_LOG2E * x)); }

// The block's queries into a tile [ROWS, WIDTH]: zero beyond the last row and beyond DIM.
template <class P> TW_FN void tw_fetch_queries(const P &p, const tw_work &w, typename P::Tile *q) {
  tw_deal<P::ROWS, P::WIDTH, P::QUERY_PIECE, P::THREADS, P::QUERY_PIECE == 1 ? 8 : 4>(threadIdx.x, [&](int i, int d) {
    int row = min(w.row + i, p.rows() - 1);
    p.query(q + i * P::KEY_STRIDE + d, w.b, row / P::GROUP, w.head * P::GROUP + row % P::GROUP, d,
            w.row + i < p.rows() && d < P::DIM);
  });
}

// Of codes: see attention_codes.cuh.
template <class P, int THREADS> TW_FN void tw_fetch_scales(const P &p, const tw_work &w, u8 *stage, int key, int thread);
template <class P, int THREADS>
TW_FN const typename P::Tile *tw_expand(const tw_work &w, const u8 *stage, typename P::Tile *tile, int key, int thread);

// The keys and values of a step as they are multiplied: where they are, or, of a cache of codes, made of these in `tile`.
template <class P, int THREADS>
TW_FN const typename P::Tile *tw_open(const tw_work &w, const typename P::Brought *stage, typename P::Tile *tile, int key,
                                      int thread) {
  if constexpr (P::CODE_BITS > 0) return tw_expand<P, THREADS>(w, stage, tile, key, thread);
  else return stage;
}

// KEYS keys and their values, by `THREADS` threads; zero from the `end` on, since what lies there may be anything.
template <class P, int THREADS, bool WHOLE>
TW_FN void tw_fetch(const P &p, const tw_work &w, typename P::Brought *stage, int key, int thread) {
  constexpr int AT_ONCE = WHOLE ? 16 : 4;
  tw_deal<P::KEYS, P::KEY_ROW, P::KEY_PIECE, THREADS, AT_ONCE>(thread, [&](int i, int d) {
    p.key(stage + i * P::KEY_STEP + d, w.b, WHOLE ? key + i : min(key + i, w.end - 1), w.head, d,
          (WHOLE || key + i < w.end) && d < P::KEY_HELD);
  });
  typename P::Brought *values = stage + P::KEYS * P::KEY_STEP;
  tw_deal<P::KEYS, P::VALUE_ROW, P::VALUE_PIECE, THREADS, AT_ONCE>(thread, [&](int i, int d) {
    p.value(values + i * P::VALUE_STEP + d, w.b, WHOLE ? key + i : min(key + i, w.end - 1), w.head, d,
            (WHOLE || key + i < w.end) && d < P::VALUE_HELD);
  });
  if constexpr (P::CODE_BITS > 0) tw_fetch_scales<P, THREADS>(p, w, stage, key, thread);
}
template <class P, int THREADS>
TW_FN void tw_fetch_keys(const P &p, const tw_work &w, typename P::Brought *stage, int key, int thread) {
  bool whole = P::KEY_PIECE > 1 && P::VALUE_PIECE > 1 && key + P::KEYS <= w.end;
  if (whole) tw_fetch<P, THREADS, true>(p, w, stage, key, thread);
  else tw_fetch<P, THREADS, false>(p, w, stage, key, thread);
}

// --- results ---------------------------------------------------------------------------------------------------------

// exp(x) for x <= 0, of a top score that may be missing.
TW_FN float tw_share(float x, float top) { return x == -TW_INF ? 0.0f : tw_exp(x - top); }

// PIECE neighbours of a result, by 16 bytes where that is what they take.
template <int PIECE, class T> TW_FN void tw_put(T *to, const float *x) {
  union { T part[PIECE]; uint4 all[(PIECE * sizeof(T) + 15) / 16]; } out;
#pragma unroll
  for (int i = 0; i < PIECE; i++) tw_store(out.part + i, x[i]);
  if constexpr (PIECE * sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < PIECE * sizeof(T) / 16; i++) ((uint4 *)to)[i] = out.all[i];
  } else {
#pragma unroll
    for (int i = 0; i < PIECE; i++) to[i] = out.part[i];
  }
}

// A row's part in scratch: VDIM sums, its top score, and the weight of its keys relative to that.
template <class P> TW_FN float *tw_record(const P &p, int b, int head, int part, int row) {
  return p.scratch() + (((i64)(b * P::HEADS + head) * p.parts() + part) * p.rows() + row) * P::RECORD;
}

template <class P> TW_FN typename P::Result *tw_result(const P &p, int b, int head, int row) {
  i64 query = (i64)b * p.queries() + row / P::GROUP;
  return p.result() + (query * P::HEADS * P::GROUP + head * P::GROUP + row % P::GROUP) * P::VDIM;
}

// 1 / the weight of all keys and of the sink, which moves the top. A row that sees nothing is zero.
template <class P> TW_FN float tw_divide(const P &p, int head, int row, float top, float weight, float &share) {
  share = 1.0f;
  if (P::SINKS) {
    float sink = p.sink(head * P::GROUP + row % P::GROUP), highest = fmaxf(top, sink);
    share = tw_share(top, highest), weight = weight * share + tw_share(sink, highest);
  }
  return weight > 0.0f ? 1.0f / weight : weight == weight ? 0.0f : weight;
}

// Rows in shared memory, in SLICES that add up: sums [SLICES, ROWS, SUM_STRIDE], and their top scores and weights
// [SLICES, ROWS, 2]. They go to the result, or to scratch where there are other parts.
template <class P> TW_FN void tw_finish(const P &p, const tw_work &w, const float *sums, const float *stats) {
  tw_deal<P::ROWS, P::VDIM, P::RESULT_PIECE, P::THREADS>(threadIdx.x, [&](int i, int d) {
    int row = w.row + i;
    if (row >= p.rows()) return;
    float top = -TW_INF, weight = 0.0f, x[P::RESULT_PIECE] = {};
#pragma unroll
    for (int n = 0; n < P::SLICES; n++) top = fmaxf(top, stats[2 * (n * P::ROWS + i)]);
#pragma unroll
    for (int n = 0; n < P::SLICES; n++) {
      float share = P::SLICES == 1 ? 1.0f : tw_share(stats[2 * (n * P::ROWS + i)], top);
      weight += stats[2 * (n * P::ROWS + i) + 1] * share;
#pragma unroll
      for (int e = 0; e < P::RESULT_PIECE; e++) x[e] += sums[(n * P::ROWS + i) * P::SUM_STRIDE + d + e] * share;
    }
    if (w.parts == 1) {
      float share, factor = tw_divide(p, w.head, row, top, weight, share);
#pragma unroll
      for (int e = 0; e < P::RESULT_PIECE; e++) x[e] *= share * factor;
      tw_put<P::RESULT_PIECE>(tw_result(p, w.b, w.head, row) + d, x);
    } else {
      float *record = tw_record(p, w.b, w.head, w.part, row);
#pragma unroll
      for (int e = 0; e < P::RESULT_PIECE; e++) record[d + e] = x[e];
      if (d == 0) record[P::VDIM] = top, record[P::VDIM + 1] = weight;
    }
  });
}

// A block puts the parts of one row together.
template <class P> TW_FN void tw_combine(const P &p) {
  int lane = blockIdx.x / p.rows(), row = blockIdx.x - lane * p.rows(), b = lane / P::HEADS, head = lane % P::HEADS;
  int parts = tw_cut_keys(p, b, row / P::ROWS * P::ROWS).parts;
  if (parts == 1) return;
  const float *record = tw_record(p, b, head, 0, row);
  i64 next = (i64)p.rows() * P::RECORD;
  float top = -TW_INF, weight = 0.0f, share;
#pragma unroll 8
  for (int n = 0; n < parts; n++) top = fmaxf(top, record[n * next + P::VDIM]);
#pragma unroll 8
  for (int n = 0; n < parts; n++) weight += record[n * next + P::VDIM + 1] * tw_share(record[n * next + P::VDIM], top);
  float factor = tw_divide(p, head, row, top, weight, share) * share;
  for (int d = threadIdx.x; d < P::VDIM; d += blockDim.x) {
    float x = 0.0f;
#pragma unroll 8
    for (int n = 0; n < parts; n++) x += record[n * next + d] * tw_share(record[n * next + P::VDIM], top);
    tw_store(tw_result(p, b, head, row) + d, x * factor);
  }
}
