// Codes in tensor cores, as the integers that they are: what their scales and zeros do to scores and weights.

// The sums of the queries' elements, which the zeros of keys are multiplied with.
template <class P> TW_FN void tw_sum_queries(tw_row_sums<P> &totals, const typename P::Tile *q, int lane) {
#pragma unroll
  for (int step = 0; step < P::WIDTH / 16; step++) {
    tw_queries<P> a;
    tw_read_queries<P>(a, q, step, lane);
#pragma unroll
    for (int r = 0; r < P::TILES; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        typename P::Tile low = {(unsigned short)a[r][i]}, high = {(unsigned short)(a[r][i] >> 16)};
        totals[r][i % 2] += tw_load(&low) + tw_load(&high);
      }
  }
#pragma unroll
  for (int r = 0; r < P::TILES; r++) totals[r][0] = tw_of_four(totals[r][0]), totals[r][1] = tw_of_four(totals[r][1]);
}

// Scores of integers as those of the numbers that they stand for.
template <class P>
TW_FN void tw_scale_scores(tw_scores<P> &scores, const tw_row_sums<P> &totals, const u8 *stage, int lane) {
#pragma unroll
  for (int j = 0; j < P::KEYS / 8; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      tw_scale by = tw_scale_of_integers<P>(stage, false, 8 * j + lane % 4 * 2 + i);
#pragma unroll
      for (int r = 0; r < P::TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float &x = scores[r][j][2 * half + i];
          x = P::ZEROS ? fmaf(x, by.scale, totals[r][half] * by.zero) : x * by.scale;
        }
    }
}

// Weights times the scales of the values, for integers in their place; of `count` keys.
template <class P>
TW_FN void tw_scale_weights(tw_rows<P> &rows, tw_scores<P> &scores, const u8 *stage, int count, int lane) {
#pragma unroll
  for (int j = 0; j < P::KEYS / 8; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int at = 8 * j + lane % 4 * 2 + i;
      tw_scale by = tw_scale_of_integers<P>(stage, true, at);
      if (at >= count) by = {0.0f, 0.0f};  // what lies there may be anything
#pragma unroll
      for (int r = 0; r < P::TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float &x = scores[r][j][2 * half + i];
          if (P::ZEROS) rows.zeros[r][half] = fmaf(x, by.zero, rows.zeros[r][half]);
          x *= by.scale;
        }
    }
}
