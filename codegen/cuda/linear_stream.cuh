// Rows of memory in pieces of 16 bytes, brought to tiles in shared memory while others are worked on, and read from there.
//
// The order of pieces in a row of a tile depends on the row, so that neither copies nor reads meet in a bank: reads of one
// piece of 8 rows, and reads of 2, 4, 8 or 16 bytes by lanes of which four share a row.

// Where a piece of a row of PIECES lies.
template <int PIECES> TW_FN int tw_piece(int row, int piece) {
  constexpr int MASK = (PIECES < 8 ? PIECES : 8) - 1;
  return row * PIECES + (piece ^ ((row & 1) << 2 | (row & 2) | (row >> 2 & 1)) & MASK);
}

// Shared memory by address. `tw_keep` keeps a value in a register that would be computed anew in each turn of a loop;
// `tw_fetch` reads BYTES, a power of two up to 16.
#ifdef TW_EMULATED
typedef u8 *tw_at;
TW_FN tw_at tw_at_of(u8 *p) { return p; }
template <class T> TW_FN void tw_keep(T &) {}
template <int BYTES> TW_FN void tw_fetch(u32 *to, tw_at from) { to[0] = 0, memcpy(to, from, BYTES); }
#else
typedef u32 tw_at;
TW_FN tw_at tw_at_of(u8 *p) { return tw_shared_address(p); }
template <class T> TW_FN void tw_keep(T &x) { asm volatile("" : "+r"(x)); }
template <int BYTES> TW_FN void tw_fetch(u32 *to, tw_at from) {
  if constexpr (BYTES == 16)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
  if constexpr (BYTES == 8)
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
  if constexpr (BYTES == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
  if constexpr (BYTES == 2) asm volatile("ld.shared.u16 %0, [%1];" : "=r"(to[0]) : "r"(from) : "memory");
}
#endif

// A thread's part of copying ROWS rows of PIECES to a tile, stage after stage; what is not there becomes zero.
// ALL: the rows are surely there. Threads beyond the last piece copy the first ones once more.
template <int ROWS, int PIECES, int THREADS, int PITCH, bool ALL> struct tw_stream {
  static constexpr int COUNT = (ROWS * PIECES + THREADS - 1) / THREADS;
  static constexpr bool RAGGED = PITCH / 16 % PIECES != 0;
  static constexpr int down(int n) { return n * THREADS / PIECES; }
  static constexpr int across(int n) { return n * THREADS % PIECES; }
  const u8 *from;
  tw_at place[COUNT];
  int rows, pieces;

  TW_FN void start(tw_at tile, const u8 *first, i64 there, int unit, int thread) {
    int row = thread / PIECES % ROWS, piece = thread % PIECES;
    from = first + (i64)row * PITCH + (unit * PIECES + piece) * 16;
    rows = (there < ROWS ? (int)there : ROWS) - row, pieces = PITCH / 16 - unit * PIECES - piece;
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      place[n] = tile + 16 * tw_piece<PIECES>(row + down(n), piece + across(n));
      tw_keep(place[n]);
    }
    tw_keep(rows);
  }
  TW_FN void bring(int offset, int units) {
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      bool there = (ALL || down(n) < rows) && (!RAGGED || across(n) < pieces);
      tw_copy16(place[n] + offset, from + down(n) * PITCH + across(n) * 16, there);
    }
    from += units * PIECES * 16, pieces -= units * PIECES;
  }
};
