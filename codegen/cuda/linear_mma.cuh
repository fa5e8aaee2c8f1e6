// Linear layers on tensor cores: 16-bit floats with sums in f32, or bytes with sums in i32.
//
// Features are the rows of mma's first factor, rows of x the columns of its second: a tile of sums is [16, 8]. Weights of fewer
// bits than x are decoded on the way to mma: lane t of the four that share a row takes LANE bytes of x, and what mma thinks are
// columns 2 t, 2 t + 1, 2 t + 8 ... are LANE / 2 neighbours, in both factors alike: sums do not depend on the order of k.
//
// The warps of a team share a tile of ACROSS * DOWN times [16 TILES features, 8 COLUMNS rows]; the teams of a block, and blocks
// along z, divide K. A team of one warp waits for nobody but itself. `L` is the layer, `S` the shape: N features and M rows of
// a team (where M is 1, 2 or 4 there are no more rows), K of a stage, STAGES of which are under way.

template <int N_, int M_, int K_, int ACROSS_, int DOWN_, int TEAMS_, int STAGES_> struct tw_shape {
  static constexpr int N = N_, M = M_, K = K_, ACROSS = ACROSS_, DOWN = DOWN_, TEAMS = TEAMS_, STAGES = STAGES_;
};

template <class X> struct tw_sum_of { typedef f32 type; };
template <> struct tw_sum_of<i8> { typedef i32 type; };
TW_FN u32 tw_ones(bf16) { return tw_twice(tw_power<bf16>(0)); }
TW_FN u32 tw_ones(f16) { return tw_twice(tw_power<f16>(0)); }
TW_FN u32 tw_ones(i8) { return 0x01010101; }
TW_FN u32 tw_both(bf16, f32 x) { return tw_pack_bf16(x, x); }
TW_FN u32 tw_both(f16, f32 x) { return tw_pack_f16(x, x); }

constexpr int tw_gcd(int a, int b) { return b ? tw_gcd(b, a % b) : a; }

template <class L, class S> struct tw_team {
  typedef typename L::X X;
  typedef typename L::Code Code;
  typedef typename tw_sum_of<X>::type Sum;
  static constexpr int PARTS = L::PARTS, WARPS = S::ACROSS * S::DOWN, THREADS = 32 * WARPS;
  static constexpr int TILES = S::N / 16 / S::ACROSS, COLUMNS = (S::M + 7) / 8 / S::DOWN;
  static constexpr int X_BITS = 8 * sizeof(X), STEP = 32 * L::LANE / X_BITS, STEPS = S::K / STEP;
  static constexpr int W_LANE = L::LANE * Code::BITS / X_BITS, WORDS = L::LANE / 4;
  static constexpr int X_PIECES = S::K * X_BITS / 128, W_PIECES = S::K * Code::BITS / 128;
  static constexpr int X_PITCH = L::K * X_BITS / 8, W_PITCH = L::K * Code::BITS / 8;
  static constexpr int W_BYTES = 16 * S::N * W_PIECES, X_BYTES = (16 * S::M * X_PIECES + 127) / 128 * 128;
  static constexpr int STAGE = PARTS * W_BYTES + X_BYTES, MEMORY = S::TEAMS * S::STAGES * STAGE;
  static constexpr int FLUSH = L::GROUP < L::K ? tw_gcd(L::GROUP, S::K) : S::K, FLUSHES = S::K / FLUSH; // k's of one scale
  static constexpr bool MATRICES = Code::BITS == X_BITS && L::LANE == 16; // both factors are read as they lie
  static constexpr bool RAISED = L::GROUPED && COLUMNS == 1 && Code::raised(X());
  static constexpr bool LEVEL = L::ZEROS && COLUMNS > 1 && sizeof(X) == 2;    // zero points taken off each number
  static constexpr bool SHIFTED = L::OFFSETS || L::ZEROS && !LEVEL || RAISED; // by so much for each sum of x
  static constexpr int CHAINS = PARTS * TILES * COLUMNS == 1 ? 2 : 1; // products that need not wait for each other
  static constexpr int WIDE = 16 * TILES + 4; // a row of sums in shared memory
  static constexpr int slab(int columns) { return 4 * PARTS * 8 * columns * WIDE; }
  static constexpr int round(int columns) {
    return columns % 2 || S::TEAMS * WARPS * slab(columns) <= MEMORY ? columns : round(columns / 2);
  }
  static constexpr int ROUND = round(COLUMNS); // columns that are written together

  struct tw_scales { // as stored, of rows g and g + 8 of each tile
    typename L::Scale scale[PARTS][TILES][2][FLUSHES];
    u8 zero[PARTS][TILES][2][FLUSHES];
    f32 offset[PARTS][TILES][2][FLUSHES];
  };

  const L &layer;
  int lane, team, across, down, feature, unit;
  i64 row, rows;
  tw_at w_place[STEPS][2], x_place[STEPS];
  tw_stream<S::N, W_PIECES, THREADS, W_PITCH, L::N % S::N == 0> w_stream[PARTS];
  tw_stream<S::M, X_PIECES, THREADS, X_PITCH, S::M == 1> x_stream;
  Sum sums[CHAINS][PARTS][TILES][COLUMNS][4], of_x[COLUMNS][4];
  f32 scaled[PARTS][TILES][COLUMNS][4];
  tw_scales next;

  TW_FN tw_team(const L &l, int first) : layer(l) {
    int warp = threadIdx.x / 32, thread = threadIdx.x % THREADS;
    lane = threadIdx.x % 32, team = warp / WARPS, across = warp % S::ACROSS, down = warp / S::ACROSS % S::DOWN;
    row = (i64)blockIdx.x * S::M, feature = blockIdx.y * S::N, rows = l.rows(), unit = first + team;
    tw_at memory = tw_at_of(tw_shared()) + team * S::STAGES * STAGE;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
      w_stream[p].start(memory + p * W_BYTES, layer.weight(p) + (i64)feature * W_PITCH, L::N - feature, unit, thread);
    x_stream.start(memory + PARTS * W_BYTES, layer.x() + row * X_PITCH, rows - row, unit, thread);
  }

  // What can wait until loads are under way.
  TW_FN void settle() {
    places();
    clear();
#pragma unroll
    for (int i = 0; i < PARTS * TILES * COLUMNS * 4; i++) (&scaled[0][0][0][0])[i] = 0;
    if constexpr (L::GROUPED) ask(unit);
  }

  // Where a lane reads in the first stage.
  TW_FN void places() {
    tw_at memory = tw_at_of(tw_shared()) + team * S::STAGES * STAGE;
    int w_row = 16 * TILES * across, x_row = 8 * COLUMNS * down, t = lane % 4, low = lane % 8;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      tw_at w = memory, x = memory + PARTS * W_BYTES;
      if constexpr (MATRICES) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          w_place[step][i] = w + 16 * tw_piece<W_PIECES>(w_row + low + lane / 8 % 2 * 8, 4 * step + 2 * i + lane / 16);
        x_place[step] = x + 16 * tw_piece<X_PIECES>((x_row + low) % S::M, 4 * step + lane / 8);
      } else {
        int w_at = (4 * step + t) * W_LANE, x_at = (4 * step + t) * L::LANE;
        w_place[step][0] = w + 16 * tw_piece<W_PIECES>(w_row + lane / 4, w_at / 16) + w_at % 16;
        x_place[step] = x + 16 * tw_piece<X_PIECES>((x_row + lane / 4) % S::M, x_at / 16) + x_at % 16;
      }
      tw_keep(w_place[step][0]), tw_keep(x_place[step]);
      if constexpr (MATRICES) tw_keep(w_place[step][1]);
    }
  }

  TW_FN void clear() {
#pragma unroll
    for (int i = 0; i < CHAINS * PARTS * TILES * COLUMNS * 4; i++) (&sums[0][0][0][0][0])[i] = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS * 4; i++) (&of_x[0][0])[i] = 0;
  }

  TW_FN void sync() {
    if constexpr (WARPS == 1) __syncwarp();
    else __syncthreads();
  }

  TW_FN void bring(int slot) {
#pragma unroll
    for (int p = 0; p < PARTS; p++) w_stream[p].bring(slot * STAGE, S::TEAMS);
    x_stream.bring(slot * STAGE, S::TEAMS);
  }

  // The scales of a stage, asked for long before they are used.
  TW_FN void ask(int unit) {
    constexpr int GROUPS = L::K / L::GROUP;
    int first = min(unit, (L::K - 1) / S::K) * S::K;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++)
#pragma unroll
        for (int f = 0; f < FLUSHES; f++) {
          int n = min(feature + 16 * TILES * across + 8 * i + lane / 4, L::N - 1), group = (first + f * FLUSH) / L::GROUP;
          u32 at = n * GROUPS + (L::K % S::K ? min(group, GROUPS - 1) : group);
          next.scale[p][i / 2][i % 2][f] = layer.scale(p)[at];
          if constexpr (L::ZEROS) next.zero[p][i / 2][i % 2][f] = layer.zero(p)[at];
          if constexpr (L::OFFSETS) next.offset[p][i / 2][i % 2][f] = layer.offset(p)[at];
        }
  }

  TW_FN void multiply(int slot) {
    tw_scales now = next;
    if constexpr (L::GROUPED) ask(unit + S::TEAMS);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 b[COLUMNS][WORDS];
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
        tw_at at = x_place[step] + slot * STAGE + j * 128 * X_PIECES;
        if constexpr (MATRICES) tw_matrices(b[j], at);
        else tw_fetch<L::LANE>(b[j], at);
      }
#pragma unroll
      for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          u32 a[WORDS / 2][4];
          factors(a, now, slot, step, p, i);
#pragma unroll
          for (int s = 0; s < WORDS / 2; s++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) tw_mma(X(), sums[s % CHAINS][p][i][j], a[s], b[j] + 2 * s);
        }
      if constexpr (SHIFTED) {
        u32 ones[4] = {tw_ones(X()), tw_ones(X()), tw_ones(X()), tw_ones(X())};
#pragma unroll
        for (int s = 0; s < WORDS; s += 2)
#pragma unroll
          for (int j = 0; j < COLUMNS; j++) tw_mma(X(), of_x[j], ones, b[j] + s);
      }
      if constexpr (L::GROUPED)
        if ((step + 1) * STEP % FLUSH == 0) flush(now, step * STEP / FLUSH);
    }
  }

  // The first factors of a step's products.
  TW_FN void factors(u32 (*a)[4], const tw_scales &now, int slot, int step, int p, int i) {
    int offset = slot * STAGE + p * W_BYTES + i * 256 * W_PIECES;
    if constexpr (MATRICES) {
#pragma unroll
      for (int s = 0; s < 2; s++) {
        tw_matrices(a[s], w_place[step][s] + offset);
        Code::template decode<RAISED, 4>(X(), a[s], a[s]);
      }
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 raw[4], decoded[WORDS];
      tw_fetch<W_LANE>(raw, w_place[step][0] + offset + h * 128 * W_PIECES);
      Code::template decode<RAISED, WORDS>(X(), decoded, raw);
      if constexpr (LEVEL) level(decoded, Code::template bias<false>(X()) - (f32)now.zero[p][i][h][step * STEP / FLUSH]);
#pragma unroll
      for (int s = 0; s < WORDS; s++) a[s / 2][s % 2 * 2 + h] = decoded[s];
    }
  }

  TW_FN void level(u32 *numbers, f32 by) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) numbers[i] = tw_fma2(X(), numbers[i], tw_ones(X()), tw_both(X(), by));
  }

  // Sums of the decoded become sums of the numbers.
  TW_FN void flush(const tw_scales &now, int f) {
    constexpr f32 FACTOR = Code::factor(X()), BIAS = Code::template bias<RAISED>(X());
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          f32 scale = layer.number(now.scale[p][i][h][f]), shift = BIAS * scale;
          if constexpr (L::ZEROS && !LEVEL) shift -= scale * (f32)now.zero[p][i][h][f];
          if constexpr (L::OFFSETS) shift += now.offset[p][i][h][f];
#pragma unroll
          for (int j = 0; j < COLUMNS; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              f32 &to = scaled[p][i][j][2 * h + e];
              to += scale * FACTOR * sum(p, i, j, 2 * h + e);
              if constexpr (SHIFTED) to += shift * (f32)of_x[j][e];
            }
        }
    clear();
  }

  TW_FN f32 sum(int p, int i, int j, int e) {
    return (f32)(CHAINS == 1 ? sums[0][p][i][j][e] : sums[0][p][i][j][e] + sums[CHAINS - 1][p][i][j][e]);
  }
  TW_FN f32 total(int p, int i, int j, int e) {
    return L::GROUPED ? scaled[p][i][j][e] : Code::factor(X()) * sum(p, i, j, e);
  }

  // Through shared memory: so that neighbouring threads have neighbouring features, and teams add up.
  TW_FN void finish() {
    constexpr int SLAB = slab(ROUND) / 4, COUNT = 8 * ROUND * 16 * TILES, EACH = (COUNT + 32 * S::TEAMS - 1) / (32 * S::TEAMS);
    const f32 *first = (f32 *)tw_shared() + threadIdx.x / 32 % WARPS * SLAB;
    f32 *mine = (f32 *)tw_shared() + threadIdx.x / 32 * SLAB + lane % 4 * 2 * WIDE + lane / 4;
#pragma unroll
    for (int start = 0; start < COLUMNS; start += ROUND) {
#pragma unroll
      for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int j = 0; j < ROUND; j++)
#pragma unroll
          for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              mine[(8 * (p * ROUND + j) + e % 2) * WIDE + 16 * i + e / 2 * 8] = total(p, i, start + j, e);
      if constexpr (S::TEAMS == 1) __syncwarp();
      else __syncthreads();
      i64 m = row + 8 * (COLUMNS * down + start);
      int n = feature + 16 * TILES * across, there = (int)(rows - m < 8 * ROUND ? rows - m : 8 * ROUND);
#pragma unroll (EACH < 8 ? EACH : 8)
      for (int k = 0; k < EACH; k++) {
        int e = 32 * (team + k * S::TEAMS) + lane, r = e / (16 * TILES), c = e % (16 * TILES);
        if (r < there && (L::N % S::N == 0 || n + c < L::N)) write(m + r, n + c, first + r * WIDE + c);
      }
      if constexpr (S::TEAMS == 1) __syncwarp();
      else __syncthreads();
    }
  }

  TW_FN void write(i64 m, int n, const f32 *first) {
    constexpr int SLAB = slab(ROUND) / 4;
    f32 all[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      all[p] = first[8 * p * ROUND * WIDE];
#pragma unroll
      for (int i = 1; i < S::TEAMS; i++) all[p] += first[8 * p * ROUND * WIDE + i * WARPS * SLAB];
    }
    if (gridDim.z == 1) return layer.finish(m, n, all);
#pragma unroll
    for (int p = 0; p < PARTS; p++) layer.scratch()[((blockIdx.z * PARTS + p) * rows + m) * L::N + n] = all[p];
  }
};

template <class L, class S> TW_FN void tw_multiply(const L &layer) {
  constexpr u32 UNITS = (L::K + S::K - 1) / S::K;
  int first = 0, last = UNITS;
  if (gridDim.z > 1) first = UNITS * blockIdx.z / gridDim.z, last = UNITS * (blockIdx.z + 1) / gridDim.z;
  typedef tw_team<L, S> Team;
  Team team(layer, first);
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; i++) {
    if (team.unit + i * S::TEAMS < last) team.bring(i);
    tw_commit();
  }
  team.settle();
  for (int i = Team::WARPS == 1 ? team.unit : first; i < last;)
#pragma unroll (Team::COLUMNS == 1 ? S::STAGES : 1)
    for (int slot = 0; slot < S::STAGES && i < last; slot++, i += S::TEAMS, team.unit += S::TEAMS) {
      tw_wait<S::STAGES - 2>();
      team.sync();
      if (team.unit + (S::STAGES - 1) * S::TEAMS < last) team.bring(slot ? slot - 1 : S::STAGES - 1);
      tw_commit();
      if (Team::WARPS == 1 || team.unit < last) team.multiply(slot);
    }
  tw_wait<0>();
  __syncthreads();
  team.finish();
}

// Adds up what blocks along z have written, PARTS * SPLITS times [M, N].
template <class L, int SPLITS> TW_FN void tw_add_splits(const L &layer) {
  i64 rows = layer.rows(), at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= rows * L::N) return;
  f32 sum[L::PARTS];
#pragma unroll
  for (int p = 0; p < L::PARTS; p++) {
    sum[p] = 0;
#pragma unroll
    for (int z = 0; z < SPLITS; z++) sum[p] += layer.scratch()[(z * L::PARTS + p) * rows * L::N + at];
  }
  layer.finish(at / L::N, at % L::N, sum);
}
