// Rows of a cache as codes: a warp has a row, lane l its elements l, l + 32 and so on. As ir/ops/kv_codes.py says.

TW_FN float tw_largest(f32) { return 3.402823466e+38f; }
TW_FN float tw_largest(f16) { return 65504.0f; }
// A number as it is stored; given back as what it is then.
template <class S> TW_FN float tw_hold(S &to, float x) {
  float most = tw_largest(S());
  tw_store(&to, fminf(fmaxf(x, -most), most));
  return tw_load(&to);
}
// A scale: 1 where all numbers are alike.
template <class S> TW_FN float tw_hold_scale(S &to, float x) { return tw_hold(to, x) > 0.0f ? tw_load(&to) : tw_hold(to, 1.0f); }

// Codes of four bits: eight lanes have a word. A row has room for a whole number of warps.
TW_FN void tw_put_code4(u8 *row, int d, u32 code) {
  u32 word = code << 4 * (d % 8);
#pragma unroll
  for (int step = 1; step < 8; step *= 2) word |= __shfl_xor_sync(~0u, word, step);
  if (d % 8 == 0) ((u32 *)row)[d / 8] = word;
}

template <int BITS, int SIZE, class S> TW_FN void tw_encode(u8 *row, S *scales, const float (&x)[(SIZE + 31) / 32]) {
  constexpr int EACH = (SIZE + 31) / 32;
  int lane = threadIdx.x % 32;
  float low = x[0], high = x[0];
#pragma unroll
  for (int n = 1; n < EACH; n++) low = fminf(low, x[n]), high = fmaxf(high, x[n]);
  low = tw_warp<tw_least>(low), high = tw_warp<tw_most>(high);
  S scale, zero;
  float by, from = 0.0f;
  if (BITS == 8) by = tw_hold_scale(scale, fmaxf(high, -low) / 127.0f);
  else from = tw_hold(zero, low), by = tw_hold_scale(scale, (high - low) / 15.0f);
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    int d = n * 32 + lane;
    float code = rintf((x[n] - from) / by);
    if (BITS == 4) tw_put_code4(row, d, d < SIZE ? (u32)fminf(fmaxf(code, 0.0f), 15.0f) : 0);
    else if (d < SIZE) row[d] = (u8)(i8)fminf(fmaxf(code, -127.0f), 127.0f);
  }
  if (lane) return;
  scales[0] = scale;
  if (BITS < 8) scales[1] = zero;
}
