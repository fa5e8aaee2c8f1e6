// Behind the prelude, whose element types these need.
static float emu_pair(unsigned x, unsigned y, float (*f)(unsigned short)) { return f(x) * f(y) + f(x >> 16) * f(y >> 16); }
static float emu_bf16(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
static void tw_mma(bf16, float *d, const u32 *a, const u32 *b) { emu_mma(d, a, b, [](u32 x, u32 y) { return emu_pair(x, y, emu_bf16); }); }
static void tw_mma(f16, float *d, const u32 *a, const u32 *b) { emu_mma(d, a, b, [](u32 x, u32 y) { return emu_pair(x, y, tw_from_f16); }); }
static void tw_mma(i8, int *d, const u32 *a, const u32 *b) { emu_mma(d, a, b, [](u32 x, u32 y) { return __dp4a((int)x, (int)y, 0); }); }
static unsigned emu_fma2(u32 a, u32 b, u32 c, float (*f)(unsigned short), unsigned (*pack)(float, float)) {
  return pack(f(a) * f(b) + f(c), f(a >> 16) * f(b >> 16) + f(c >> 16));
}
static u32 tw_fma2(bf16, u32 a, u32 b, u32 c) { return emu_fma2(a, b, c, emu_bf16, tw_pack_bf16); }
static u32 tw_fma2(f16, u32 a, u32 b, u32 c) { return emu_fma2(a, b, c, tw_from_f16, tw_pack_f16); }
