/* 8 lanes. HAVE_VNNI is AVX-VNNI: the same instruction as in AVX-512 VNNI, on half the width. */
#define LANES 8
#define VF __m256
#define VI __m256i
#define BIAS8 128 * HAVE_VNNI

INLINE VF load_f(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store_f(float *p, VF v) { _mm256_storeu_ps(p, v); }
INLINE VI load_i(const void *p) { return _mm256_loadu_si256(p); }
INLINE VF load_h(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE VF load_b(const uint16_t *p) {
    const VI wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE VF set_f(float a) { return _mm256_set1_ps(a); }
INLINE VI set_i(int32_t a) { return _mm256_set1_epi32(a); }
INLINE VF mul_f(VF a, VF b) { return _mm256_mul_ps(a, b); }
INLINE VF add_f(VF a, VF b) { return _mm256_add_ps(a, b); }
INLINE VF fma_f(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
INLINE VF to_f(VI v) { return _mm256_cvtepi32_ps(v); }
INLINE VI add_i(VI a, VI b) { return _mm256_add_epi32(a, b); }

INLINE int32_t sum_i(VI v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(s) + _mm_extract_epi32(s, 1);
}

INLINE float sum_f(VF v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE VF weight4(VI w, int k) {
    /* q + 8 with its top bit turned is q in two's complement; the shifts carry its sign down. */
    const VI q = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x88));
    return to_f(_mm256_srai_epi32(_mm256_slli_epi32(q, 28 - NIBBLE_SHIFT(k)), 28));
}

INLINE VF weight8(VI w, int k) {
    return to_f(_mm256_srai_epi32(_mm256_slli_epi32(w, 24 - 8 * k), 24));
}

INLINE VI low_nibbles(VI w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
INLINE VI high_nibbles(VI w) { return low_nibbles(_mm256_srli_epi32(w, 4)); }

#if HAVE_VNNI
INLINE VI add_products(VI acc, VI w, VI x) { /* see vec_avx512.h */
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
    return acc;
}

INLINE VI dot4(VI acc, VI low, VI high, VI first, VI second) {
    return add_products(add_products(acc, low, first), high, second);
}

INLINE VI dot8(VI acc, VI w, VI x) {
    return add_products(acc, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x);
}
#else
INLINE VI dot4(VI acc, VI low, VI high, VI first, VI second) {
    const VI pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
    return add_i(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE VI dot8(VI acc, VI w, VI x) {
    /* |w| times x with w's sign: 128 * 127 * 2 is the most that 16 bits then have to hold. */
    const VI pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return add_i(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
