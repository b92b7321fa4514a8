/* 4 lanes in the compiler's own vectors: any processor, SSE2 on a plain x86-64. */
typedef float NAME(VF) __attribute__((vector_size(16)));
typedef int32_t NAME(VI) __attribute__((vector_size(16)));
typedef int16_t NAME(VS) __attribute__((vector_size(16)));
#define LANES 4
#define VF NAME(VF)
#define VI NAME(VI)
#define VS NAME(VS)
#define BIAS8 0

INLINE VF load_f(const float *p) { VF v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_f(float *p, VF v) { memcpy(p, &v, sizeof v); }
INLINE VI load_i(const void *p) { VI v; memcpy(&v, p, sizeof v); return v; }
INLINE VF set_f(float a) { return (VF){a, a, a, a}; }
INLINE VI set_i(int32_t a) { return (VI){a, a, a, a}; }
INLINE VF mul_f(VF a, VF b) { return a * b; }
INLINE VF add_f(VF a, VF b) { return a + b; }
INLINE VF fma_f(VF a, VF b, VF c) { return a * b + c; }
INLINE float sum_f(VF v) { return (v[0] + v[1]) + (v[2] + v[3]); }
INLINE VF to_f(VI v) { return __builtin_convertvector(v, VF); }
INLINE VI add_i(VI a, VI b) { return a + b; }
INLINE int32_t sum_i(VI v) { return (v[0] + v[1]) + (v[2] + v[3]); }

INLINE VF load_h(const uint16_t *p) {
    const VI h = {p[0], p[1], p[2], p[3]};
    const VI special = (h & 0x7c00) == 0x7c00; /* infinity and NaN */
    /* The bits moved to their place in a float stand for the number times 2^-112. */
    const VF value = (VF)((h & 0x7fff) << 13) * 0x1p112f;
    return (VF)(((VI)value | (special & 0x7f800000)) | ((h & 0x8000) << 16));
}

INLINE VF load_b(const uint16_t *p) {
    const VI wide = {p[0], p[1], p[2], p[3]};
    return (VF)(wide << 16);
}

INLINE VF weight4(VI w, int k) { return to_f(((w >> NIBBLE_SHIFT(k)) & 15) - 8); }
INLINE VF weight8(VI w, int k) { return to_f((w << (24 - 8 * k)) >> 24); }

INLINE VI low_nibbles(VI w) { return w & 0x0f0f0f0f; }
INLINE VI high_nibbles(VI w) { return low_nibbles(w >> 4); }

/* Products in 16-bit lanes, first of the even bytes, then of the odd ones: 2 * 128 * 127 at most. */
INLINE VI dot8(VI acc, VI w, VI x) {
    const VS a = (VS)w, b = (VS)x;
    const VI pairs = (VI)(((a << 8) >> 8) * ((b << 8) >> 8) + (a >> 8) * (b >> 8));
    return acc + ((pairs << 16) >> 16) + (pairs >> 16);
}

INLINE VI dot4(VI acc, VI low, VI high, VI first, VI second) {
    return dot8(dot8(acc, low, first), high, second);
}
