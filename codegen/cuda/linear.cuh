// Weights as what tensor cores multiply: 16-bit floats or bytes, made from the codes that they are stored as.
//
// A number that a code stands for is decoded * factor + bias, then come the scale and its like. Codes keep their order.

template <class X> struct tw_float; // of 16 bits: the size of the fraction, the exponent's bias
template <> struct tw_float<bf16> { static constexpr u32 FRACTION = 7, BIAS = 127; };
template <> struct tw_float<f16> { static constexpr u32 FRACTION = 10, BIAS = 15; };

// (a & mask) ^ bits, in one instruction.
#ifdef TW_EMULATED
TW_FN u32 tw_and_xor(u32 a, u32 mask, u32 bits) { return a & mask ^ bits; }
#else
TW_FN u32 tw_and_xor(u32 a, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
#endif

constexpr u32 tw_twice(u32 half) { return half | half << 16; }
// The float 2^n. That of 2^FRACTION has a last bit that counts 1: or an integer into it, and subtract.
template <class X> constexpr u32 tw_power(int n) { return (tw_float<X>::BIAS + n) << tw_float<X>::FRACTION; }
template <class X> constexpr u32 tw_large() { return tw_power<X>(tw_float<X>::FRACTION); }

// Codes 2 i and 2 i + 1 in the low bits of the halves of a word, with others above them where BITS < 8.
template <int BITS> TW_FN u32 tw_pair(const u32 *raw, int i) {
  if constexpr (BITS == 8) return __byte_perm(raw[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
  constexpr int BYTE = 8 / BITS;
  int byte = 2 * i / BYTE, shift = 2 * i % BYTE * BITS;
  return __byte_perm(raw[0] >> shift, raw[0] >> (shift + BITS), 0x4400 + 0x1111 * byte);
}

struct tw_plain {
  static constexpr int BITS = 16;
  template <class X> static constexpr bool raised(X) { return false; }
  template <class X> static constexpr f32 factor(X) { return 1; }
  template <bool RAISED, int WORDS, class X> static TW_FN void decode(X, u32 *to, const u32 *raw) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = raw[i];
  }
};

// RAISED: with the large number left on that takes a code into a float, one instruction less for two codes.
template <int BITS_, bool SIGNED> struct tw_integers {
  static constexpr int BITS = BITS_;
  static constexpr u32 HALF = SIGNED ? 1 << (BITS - 1) : 0;
  static constexpr bool IN_HIGH_BITS = SIGNED && BITS < 8; // as bytes
  template <class X> static constexpr f32 factor(X) {
    return sizeof(X) == 1 && IN_HIGH_BITS ? 1.0f / (1 << (8 - BITS)) : 1.0f;
  }
  template <bool RAISED> static constexpr f32 bias(f16) { return 0; }
  template <bool RAISED> static constexpr f32 bias(i8) { return BITS == 8 && !SIGNED ? 128 : 0; }
  template <bool RAISED> static constexpr f32 bias(bf16) {
    return RAISED ? -128.0f - HALF : BITS == 8 && !SIGNED ? 128 : 0;
  }
  template <class X> static constexpr bool raised(X) { return false; }
  static constexpr bool raised(bf16) { return BITS < 8; }

  template <bool RAISED, int WORDS, class X> static TW_FN void decode(X x, u32 *to, const u32 *raw) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = pair<RAISED>(x, tw_pair<BITS>(raw, i));
  }
  template <bool RAISED, class X> static TW_FN u32 pair(X x, u32 p) {
    constexpr u32 LARGE = tw_large<X>() + HALF, ONE = tw_power<X>(0);
    u32 raised = tw_and_xor(p, tw_twice((1 << BITS) - 1), tw_twice(LARGE));
    return RAISED ? raised : tw_fma2(x, raised, tw_twice(ONE), tw_twice(LARGE | 0x8000));
  }
  template <bool RAISED> static TW_FN u32 pair(bf16 x, u32 p) {
    if constexpr (BITS < 8) return pair<RAISED, bf16>(x, p);
    u32 low = tw_and_xor(p, 0x007f007f, 0x43004300), sign = tw_and_xor(p, 0x00800080, SIGNED ? 0x43004300 : 0x43804380);
    return tw_fma2(x, sign, tw_twice(0x8000 | tw_power<bf16>(0)), low);
  }

  template <bool RAISED, int WORDS> static TW_FN void decode(i8, u32 *to, const u32 *raw) {
    u32 part[8 / BITS];
#pragma unroll
    for (int i = 0; i < (WORDS * BITS + 7) / 8; i++) {
#pragma unroll
      for (int j = 0; j < 8 / BITS; j++) part[j] = bytes(raw[i], j);
      if constexpr (BITS == 8) to[i] = part[0];
      if constexpr (BITS == 4) {
        to[2 * i] = __byte_perm(part[0], part[1], 0x5140);
        to[2 * i + 1] = __byte_perm(part[0], part[1], 0x7362);
      }
      if constexpr (BITS == 2)
#pragma unroll
        for (int j = 0; j < WORDS; j += 2) {
          u32 which = j ? 0x7362 : 0x5140;
          u32 even = __byte_perm(part[0], part[1], which), odd = __byte_perm(part[2], part[3], which);
          to[j] = __byte_perm(even, odd, 0x5410), to[j + 1] = __byte_perm(even, odd, 0x7632);
        }
    }
  }
  // Code j of each byte.
  static TW_FN u32 bytes(u32 raw, int j) {
    if constexpr (BITS == 8) return SIGNED ? raw : raw ^ 0x80808080;
    constexpr u32 MASK = 0x01010101u * ((1u << BITS) - 1), HIGH = MASK << (8 - BITS);
    return SIGNED ? raw << (8 - BITS - BITS * j) & HIGH : raw >> BITS * j & MASK;
  }
};

// Floats of 8 and 4 bits, sign first; no infinities, no NaN.
template <int BITS_, int FRACTION, int EXPONENT_BIAS> struct tw_floats {
  static constexpr int BITS = BITS_;
  template <class X> static constexpr f32 factor(X) { return 1; }
  template <bool RAISED, class X> static constexpr f32 bias(X) { return 0; }
  template <class X> static constexpr bool raised(X) { return false; }

  template <bool RAISED, int WORDS, class X> static TW_FN void decode(X x, u32 *to, const u32 *raw) {
    constexpr u32 SIGN = 1 << (BITS - 1), FACTOR = tw_power<X>(tw_float<X>::BIAS - EXPONENT_BIAS);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      u32 p = tw_pair<BITS>(raw, i);
      u32 number = (p & tw_twice(SIGN - 1)) << (tw_float<X>::FRACTION - FRACTION) | (p & tw_twice(SIGN)) << (16 - BITS);
      to[i] = tw_fma2(x, number, tw_twice(FACTOR), 0x80008000);
    }
  }
};
