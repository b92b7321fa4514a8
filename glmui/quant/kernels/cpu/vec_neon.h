/* 4 lanes, 64-bit ARM. HAVE_DOT is the dot-product extension (2018 and later). */
#define LANES 4
#define VF float32x4_t
#define VI int32x4_t
#define BIAS8 0

INLINE VF load_f(const float *p) { return vld1q_f32(p); }
INLINE void store_f(float *p, VF v) { vst1q_f32(p, v); }
INLINE VI load_i(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
INLINE VF load_h(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE VF load_b(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE VF set_f(float a) { return vdupq_n_f32(a); }
INLINE VI set_i(int32_t a) { return vdupq_n_s32(a); }
INLINE VF mul_f(VF a, VF b) { return vmulq_f32(a, b); }
INLINE VF add_f(VF a, VF b) { return vaddq_f32(a, b); }
INLINE VF fma_f(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
INLINE float sum_f(VF v) { return vaddvq_f32(v); }
INLINE VF to_f(VI v) { return vcvtq_f32_s32(v); }
INLINE VI add_i(VI a, VI b) { return vaddq_s32(a, b); }
INLINE int32_t sum_i(VI v) { return vaddvq_s32(v); }

INLINE VF weight4(VI w, int k) {
    /* q + 8 with its top bit turned is q in two's complement; the shifts carry its sign down. */
    const VI q = veorq_s32(w, vdupq_n_s32((int32_t)0x88888888));
    return to_f(vshrq_n_s32(vshlq_s32(q, vdupq_n_s32(28 - NIBBLE_SHIFT(k))), 28));
}

INLINE VF weight8(VI w, int k) {
    return to_f(vshrq_n_s32(vshlq_s32(w, vdupq_n_s32(24 - 8 * k)), 24));
}

INLINE VI low_nibbles(VI w) { return vandq_s32(w, vdupq_n_s32(0x0f0f0f0f)); }
INLINE VI high_nibbles(VI w) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(w), 4)); }

INLINE VI dot8(VI acc, VI w, VI x) {
    const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#if HAVE_DOT
    return vdotq_s32(acc, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(acc, vpaddq_s16(low, high)); /* 128 * 127 * 2 fits 16 bits */
#endif
}

INLINE VI dot4(VI acc, VI low, VI high, VI first, VI second) {
    return dot8(dot8(acc, low, first), high, second);
}
