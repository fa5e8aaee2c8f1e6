// Codes of a cache, which lie in a stage of shared memory: keys [KEYS, KEY_ROW], values [KEYS, VALUE_ROW], the keys' scales
// [KEYS, SCALE_BYTES], the values' scales. A scale of codes of four bits has its zero behind it.
//
// In f32 a code becomes the number that it stands for. In 16 bits it stays an integer, which is exact: scales and zeros of
// keys meet the scores, those of values the weights. There codes of four bits are taken from the middle of their range on, so
// that little cancels.

template <class P> TW_FN constexpr int tw_scales_at(bool values) {
  return P::KEYS * (P::KEY_ROW + P::VALUE_ROW + (values ? P::SCALE_BYTES : 0));
}

// Zeros beyond the `end`, 16 bytes at once.
template <class P, int THREADS> TW_FN void tw_fetch_scales(const P &p, const tw_work &w, u8 *stage, int key, int thread) {
  constexpr int EACH = 16 / P::SCALE_BYTES, PIECES = P::KEYS / EACH;
  for (int n = thread; n < 2 * PIECES; n += THREADS) {
    bool values = n >= PIECES;
    int at = key + n % PIECES * EACH, last = (w.end - 1) / EACH * EACH;
    u8 *to = stage + tw_scales_at<P>(false) + 16 * n;
    if (values) p.value_scales(to, w.b, min(at, last), w.head, at < w.end);
    else p.key_scales(to, w.b, min(at, last), w.head, at < w.end);
  }
}

struct tw_scale { float scale, zero; };
// Of key (or value) i of a stage, the zero for codes as they are stored.
template <class P> TW_FN tw_scale tw_scale_of(const u8 *stage, bool values, int i) {
  typename P::Scale found[P::ZEROS + 1];
  const u8 *from = stage + tw_scales_at<P>(values) + i * P::SCALE_BYTES;
  if constexpr (P::SCALE_BYTES == 2) *(unsigned short *)found = *(const unsigned short *)from;
  if constexpr (P::SCALE_BYTES == 4) *(u32 *)found = *(const u32 *)from;
  if constexpr (P::SCALE_BYTES == 8) *(uint2 *)found = *(const uint2 *)from;
  return {tw_load(found), P::ZEROS ? tw_load(found + P::ZEROS) : 0.0f};
}

// For integers of `tw_decode8`.
template <class P> TW_FN tw_scale tw_scale_of_integers(const u8 *stage, bool values, int i) {
  tw_scale by = tw_scale_of<P>(stage, values, i);
  if (P::ZEROS) by.zero = fmaf(8.0f, by.scale, by.zero);
  return by;
}

// Eight codes of a row as integers of 16-bit floats, those of four bits less 8.
template <int BITS, class T> TW_FN void tw_decode8(T *to, const u8 *from, tw_scale, bool) {
  union { uint2 all; u32 word[2]; } raw;
  if constexpr (BITS == 8) raw.all = *(const uint2 *)from;
  else raw.word[0] = *(const u32 *)from ^ 0x88888888;
  union { uint4 all; u32 pair[4]; } out;
  tw_integers<BITS, true>::template decode<false, 4>(T(), out.pair, raw.word);
  *(uint4 *)to = out.all;
}
// As numbers, zeros where not `on`.
template <int BITS> TW_FN void tw_decode8(float *to, const u8 *from, tw_scale by, bool on) {
  union { float4 all[2]; float number[8]; } out;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float code = BITS == 8 ? (float)(i8)from[i] : (float)tw_code<4>(from, i);
    out.number[i] = on ? fmaf(code, by.scale, by.zero) : 0.0f;
  }
  ((float4 *)to)[0] = out.all[0], ((float4 *)to)[1] = out.all[1];
}

// The tile of a stage, by the threads that read it. All of them come here, and have waited for the stage.
template <class P, int THREADS>
TW_FN const typename P::Tile *tw_expand(const tw_work &w, const u8 *stage, typename P::Tile *tile, int key, int thread) {
  typename P::Values *values = (typename P::Values *)(tile + P::KEYS * P::KEY_STRIDE);
  tw_deal<P::KEYS, P::WIDTH, 8, THREADS>(thread, [&](int i, int d) {
    tw_decode8<P::CODE_BITS>(tile + i * P::KEY_STRIDE + d, stage + i * P::KEY_ROW + d * P::CODE_BITS / 8,
                             tw_scale_of<P>(stage, false, i), key + i < w.end);
  });
  tw_deal<P::KEYS, P::VALUE_WIDTH, 8, THREADS>(thread, [&](int i, int d) {
    tw_decode8<P::CODE_BITS>(values + i * P::VALUE_STRIDE + d,
                             stage + P::KEYS * P::KEY_ROW + i * P::VALUE_ROW + d * P::CODE_BITS / 8,
                             tw_scale_of<P>(stage, true, i), key + i < w.end);
  });
  if (THREADS == 32) __syncwarp();
  else __syncthreads();
  return tile;
}
