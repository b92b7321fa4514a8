/* 16 lanes. With HAVE_VNNI one instruction does four byte products a lane, without it three do. */
#define LANES 16
#define VF __m512
#define VI __m512i
#define BIAS8 128 * HAVE_VNNI

INLINE VF load_f(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_f(float *p, VF v) { _mm512_storeu_ps(p, v); }
INLINE VI load_i(const void *p) { return _mm512_loadu_si512(p); }
INLINE VF load_h(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE VF load_b(const uint16_t *p) {
    const VI wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE VF set_f(float a) { return _mm512_set1_ps(a); }
INLINE VI set_i(int32_t a) { return _mm512_set1_epi32(a); }
INLINE VF mul_f(VF a, VF b) { return _mm512_mul_ps(a, b); }
INLINE VF add_f(VF a, VF b) { return _mm512_add_ps(a, b); }
INLINE VF fma_f(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum_f(VF v) { return _mm512_reduce_add_ps(v); }
INLINE VF to_f(VI v) { return _mm512_cvtepi32_ps(v); }
INLINE VI add_i(VI a, VI b) { return _mm512_add_epi32(a, b); }
INLINE int32_t sum_i(VI v) { return _mm512_reduce_add_epi32(v); }

INLINE VF weight4(VI w, int k) {
    /* A table look-up reads the low four bits of each lane, so a shift brings the nibble, no mask needed. */
    const VF table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(w, NIBBLE_SHIFT(k)), table);
}

INLINE VF weight8(VI w, int k) {
    return to_f(_mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * k), 24));
}

INLINE VI low_nibbles(VI w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE VI high_nibbles(VI w) { return low_nibbles(_mm512_srli_epi32(w, 4)); }

#if HAVE_VNNI
/* acc + 4 products of bytes a lane. Said in assembly, for gcc copies registers about around its intrinsic. */
INLINE VI add_products(VI acc, VI w, VI x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}

INLINE VI dot4(VI acc, VI low, VI high, VI first, VI second) {
    return add_products(add_products(acc, low, first), high, second);
}

INLINE VI dot8(VI acc, VI w, VI x) {
    return add_products(acc, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x); /* w + 128 is unsigned */
}
#else
INLINE VI dot4(VI acc, VI low, VI high, VI first, VI second) {
    const VI pairs = _mm512_add_epi16(_mm512_maddubs_epi16(low, first), _mm512_maddubs_epi16(high, second));
    return add_i(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

INLINE VI dot8(VI acc, VI w, VI x) {
    /* |w| times x with w's sign: 128 * 127 * 2 is the most that 16 bits then have to hold. */
    const VI turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    const VI pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), turned);
    return add_i(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif
