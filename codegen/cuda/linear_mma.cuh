// Linear layers on tensor cores: 16-bit floats with sums in f32, or bytes with sums in i32.
//
// Features are the rows of mma's first factor, rows of x the columns of its second: a tile of sums is [16, 8]. Both factors lie
// in shared memory row by row, as they come, in pieces of 16 bytes whose order in a row depends on the row, so that neither
// copies nor reads meet in a bank. Lane t of the four that share a row takes LANE bytes of x, one read; what mma thinks are
// columns 2 t, 2 t + 1, 2 t + 8 ... are LANE / 2 neighbours, equally in both factors, for sums do not depend on the order of k.
//
// The warps of a team share a tile of ACROSS * DOWN times [16 TILES features, 8 COLUMNS rows]; teams of a block, and blocks
// along z, divide K. A team of one warp waits for nobody but itself. `L` is the layer, `S` the shape:
// N features and M rows of a team (M of 1, 2, 4: no more rows are there), K of a stage, STAGES of which are under way.

template <int N_, int M_, int K_, int ACROSS_, int DOWN_, int TEAMS_, int STAGES_> struct tw_shape {
  static constexpr int N = N_, M = M_, K = K_, ACROSS = ACROSS_, DOWN = DOWN_, TEAMS = TEAMS_, STAGES = STAGES_;
};

template <class X> struct tw_sum_of { typedef f32 type; };
template <> struct tw_sum_of<i8> { typedef i32 type; };
TW_FN u32 tw_ones(bf16) { return tw_twice(tw_power<bf16>(0)); }
TW_FN u32 tw_ones(f16) { return tw_twice(tw_power<f16>(0)); }
TW_FN u32 tw_ones(i8) { return 0x01010101; }

constexpr int tw_gcd(int a, int b) { return b ? tw_gcd(b, a % b) : a; }

// Where a piece of a row of PIECES lies.
template <int PIECES> TW_FN int tw_piece(int row, int piece) {
  constexpr int MASK = (PIECES < 8 ? PIECES : 8) - 1;
  return row * PIECES + (piece ^ ((row & 1) << 2 | (row & 2) | (row >> 2 & 1)) & MASK);
}

// BYTES of a row, from byte `at` on.
template <int BYTES, int PIECES> TW_FN void tw_fetch(u32 *to, const u8 *tile, int row, int at) {
  const u8 *from = tile + 16 * tw_piece<PIECES>(row, at / 16) + at % 16;
  if constexpr (BYTES == 16) {
    uint4 all = *(const uint4 *)from;
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
  } else if constexpr (BYTES == 8) {
    uint2 all = *(const uint2 *)from;
    to[0] = all.x, to[1] = all.y;
  } else if constexpr (BYTES == 4) to[0] = *(const u32 *)from;
  else to[0] = *(const unsigned short *)from;
}

// Copies ROWS rows of PIECES to a tile; what is beyond `rows` and `pieces` becomes zero.
template <int ROWS, int PIECES, int THREADS>
TW_FN void tw_bring(u8 *tile, const u8 *from, i64 pitch, i64 rows, int pieces, int thread) {
#pragma unroll
  for (int n = 0; n < (ROWS * PIECES + THREADS - 1) / THREADS; n++) {
    int i = thread + n * THREADS, row = i / PIECES, piece = i % PIECES;
    if (ROWS * PIECES % THREADS == 0 || i < ROWS * PIECES)
      tw_copy16(tile + 16 * tw_piece<PIECES>(row, piece), from + row * pitch + 16 * piece, row < rows && piece < pieces);
  }
}

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
  static constexpr bool SHIFTED = L::ZEROS || L::OFFSETS;
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
  int lane, team, across, down, feature, thread;
  i64 row, rows;
  u8 *memory;
  Sum sums[PARTS][TILES][COLUMNS][4], of_x[COLUMNS][4];
  f32 scaled[PARTS][TILES][COLUMNS][4];
  tw_scales next;

  TW_FN tw_team(const L &l) : layer(l) {
    int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32, team = warp / WARPS, across = warp % S::ACROSS, down = warp / S::ACROSS % S::DOWN;
    thread = threadIdx.x % THREADS, row = (i64)blockIdx.x * S::M, feature = blockIdx.y * S::N, rows = l.rows();
    memory = tw_shared() + team * S::STAGES * STAGE;
    clear();
#pragma unroll
    for (int i = 0; i < PARTS * TILES * COLUMNS * 4; i++) (&scaled[0][0][0][0])[i] = 0;
  }

  TW_FN void clear() {
#pragma unroll
    for (int i = 0; i < PARTS * TILES * COLUMNS * 4; i++) (&sums[0][0][0][0])[i] = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS * 4; i++) (&of_x[0][0])[i] = 0;
  }

  TW_FN void sync() {
    if constexpr (WARPS == 1) __syncwarp();
    else __syncthreads();
  }

  TW_FN void bring(int unit, int slot) {
    u8 *to = memory + slot * STAGE;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
      tw_bring<S::N, W_PIECES, THREADS>(to + p * W_BYTES, layer.weight(p) + (i64)feature * W_PITCH + unit * W_PIECES * 16, W_PITCH,
                                        L::N - feature, W_PITCH / 16 - unit * W_PIECES, thread);
    tw_bring<S::M, X_PIECES, THREADS>(to + PARTS * W_BYTES, layer.x() + row * X_PITCH + unit * X_PIECES * 16, X_PITCH, rows - row,
                                      X_PITCH / 16 - unit * X_PIECES, thread);
  }

  // The scales of a stage, asked for long before they are used.
  TW_FN void ask(int unit) {
    constexpr int GROUPS = L::K / L::GROUP;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++)
#pragma unroll
        for (int f = 0; f < FLUSHES; f++) {
          int n = feature + 16 * TILES * across + 8 * i + lane / 4, group = (unit * S::K + f * FLUSH) / L::GROUP;
          i64 at = (i64)min(n, L::N - 1) * GROUPS + min(group, GROUPS - 1);
          next.scale[p][i / 2][i % 2][f] = layer.scale(p)[at];
          if constexpr (L::ZEROS) next.zero[p][i / 2][i % 2][f] = layer.zero(p)[at];
          if constexpr (L::OFFSETS) next.offset[p][i / 2][i % 2][f] = layer.offset(p)[at];
        }
  }

  TW_FN void multiply(int unit, int slot) {
    const u8 *w = memory + slot * STAGE, *x = w + PARTS * W_BYTES;
    tw_scales now = next;
    if constexpr (L::GROUPED) ask(unit + S::TEAMS);
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 b[COLUMNS][WORDS];
#pragma unroll
      for (int j = 0; j < COLUMNS; j++)
        tw_fetch<L::LANE, X_PIECES>(b[j], x, S::M < 8 ? g % S::M : 8 * (COLUMNS * down + j) + g, (4 * step + t) * L::LANE);
#pragma unroll
      for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          u32 raw[2][4], a[2][WORDS];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            int n = 16 * (TILES * across + i) + 8 * h + g;
            tw_fetch<W_LANE, W_PIECES>(raw[h], w + p * W_BYTES, n, (4 * step + t) * W_LANE);
            Code::template decode<WORDS>(X(), a[h], raw[h]);
          }
#pragma unroll
          for (int s = 0; s < WORDS; s += 2) {
            u32 both[4] = {a[0][s], a[1][s], a[0][s + 1], a[1][s + 1]};
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) tw_mma(X(), sums[p][i][j], both, b[j] + s);
          }
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

  // Sums of the decoded become sums of the numbers.
  TW_FN void flush(const tw_scales &now, int f) {
    constexpr f32 FACTOR = Code::factor(X()), BIAS = Code::bias(X());
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          f32 scale = layer.number(now.scale[p][i][h][f]), shift = BIAS * scale;
          if constexpr (L::ZEROS) shift -= scale * (f32)now.zero[p][i][h][f];
          if constexpr (L::OFFSETS) shift += now.offset[p][i][h][f];
#pragma unroll
          for (int j = 0; j < COLUMNS; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              f32 &to = scaled[p][i][j][2 * h + e];
              to += scale * FACTOR * (f32)sums[p][i][j][2 * h + e];
              if constexpr (SHIFTED) to += shift * (f32)of_x[j][e];
            }
        }
    clear();
  }

  TW_FN f32 total(int p, int i, int j, int e) {
    return L::GROUPED ? scaled[p][i][j][e] : Code::factor(X()) * (f32)sums[p][i][j][e];
  }

  // Through shared memory: so that neighbouring threads have neighbouring features, and teams add up.
  TW_FN void finish() {
    constexpr int SLAB = slab(ROUND) / 4, COUNT = 8 * ROUND * 16 * TILES, EACH = (COUNT + 32 * S::TEAMS - 1) / (32 * S::TEAMS);
    f32 *all = (f32 *)tw_shared(), *mine = all + threadIdx.x / 32 * SLAB, *first = all + threadIdx.x / 32 % WARPS * SLAB;
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
              mine[(8 * (p * ROUND + j) + 2 * (lane % 4) + e % 2) * WIDE + 16 * i + lane / 4 + e / 2 * 8] = total(p, i, start + j, e);
      if constexpr (S::TEAMS == 1) __syncwarp();
      else __syncthreads();
#pragma unroll (EACH < 8 ? EACH : 8)
      for (int k = 0; k < EACH; k++) {
        int e = 32 * (team + k * S::TEAMS) + lane, r = e / (16 * TILES), c = e % (16 * TILES);
        i64 m = row + 8 * (COLUMNS * down + start) + r;
        int n = feature + 16 * TILES * across + c;
        if (e < COUNT && m < rows && n < L::N) write(m, n, first + r * WIDE + c);
      }
      if constexpr (S::TEAMS == 1) __syncwarp();
      else __syncthreads();
    }
  }

  TW_FN void write(i64 m, int n, const f32 *first) {
    constexpr int SLAB = slab(ROUND) / 4;
    f32 sum[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      sum[p] = first[8 * p * ROUND * WIDE];
#pragma unroll
      for (int i = 1; i < S::TEAMS; i++) sum[p] += first[8 * p * ROUND * WIDE + i * WARPS * SLAB];
    }
    if (gridDim.z == 1) return layer.finish(m, n, sum);
#pragma unroll
    for (int p = 0; p < PARTS; p++) layer.scratch()[((blockIdx.z * PARTS + p) * rows + m) * L::N + n] = sum[p];
  }
};

template <class L, class S> TW_FN void tw_multiply(const L &layer) {
  typedef tw_team<L, S> Team;
  constexpr int UNITS = (L::K + S::K - 1) / S::K;
  Team team(layer);
  int first = (int)((i64)UNITS * blockIdx.z / gridDim.z), last = (int)((i64)UNITS * (blockIdx.z + 1) / gridDim.z);
  int unit = first + team.team, rounds = (last - first + S::TEAMS - 1) / S::TEAMS, slot = 0;
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; i++) {
    if (unit + i * S::TEAMS < last) team.bring(unit + i * S::TEAMS, i);
    tw_commit();
  }
  if constexpr (L::GROUPED) team.ask(unit);
  for (int i = 0; i < rounds; i++, unit += S::TEAMS) {
    tw_wait<S::STAGES - 2>();
    team.sync();
    int ahead = unit + (S::STAGES - 1) * S::TEAMS;
    if (ahead < last) team.bring(ahead, slot ? slot - 1 : S::STAGES - 1);
    tw_commit();
    if (unit < last) team.multiply(unit, slot);
    slot = slot + 1 == S::STAGES ? 0 : slot + 1;
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
