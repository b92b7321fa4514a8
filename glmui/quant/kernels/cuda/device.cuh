/* What the kernels need of a card, in a few words: numbers of 16 bits, kernels and their shared memory, loads, sums
 * over a warp. None of CUDA's headers is here, for the compiler that comes with torch brings none.
 *
 * A source is compiled once for each type of activations T, float16 or (with -DGLMUI_BF16) bfloat16. It needs a card of
 * compute capability 7.5; bfloat16 is computed in float32 everywhere, so that it needs no newer one.
 *
 *     KERNEL(scale_rows, (const T *x, T *y, int size)) {   the kernel scale_rows_half or scale_rows_bf16; its second
 *         SHARED(float, sums, 32);                         argument is its whole list of parameters
 *         DYNAMIC_SHARED(uint4, stage);                    as large as its launch says
 *
 * KERNEL_IN_BLOCKS also says how many threads a block has at most, and how many blocks shall fit on a multiprocessor.
 *
 * Warps are whole: the first side of a block is a multiple of 32, and each warp function is for all of its lanes.
 * Only these, threadIdx and its like, __syncthreads, __syncwarp, __threadfence, atomicAdd and CUDA's functions of
 * numbers (fmaf, expf, rsqrtf, min, …) are used by the kernels, so that a processor can run them too: GLMUI_EMULATED
 * is then the file that stands in for CUDA. */
#pragma once

typedef unsigned int word; /* 32 bits */

struct half_t {
    unsigned short bits;
};
struct bf16_t {
    unsigned short bits;
};

#ifdef GLMUI_BF16
typedef bf16_t T;
#define NAMED(name) name##_bf16
#else
typedef half_t T;
#define NAMED(name) name##_half
#endif

#ifdef GLMUI_EMULATED
#include GLMUI_EMULATED
#else

#define KERNEL(name, parameters) extern "C" __global__ void NAMED(name) parameters
#define KERNEL_IN_BLOCKS(threads, blocks, name, parameters)                                                           \
    extern "C" __global__ void __launch_bounds__(threads, blocks) NAMED(name) parameters
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define INLINE __device__ __forceinline__

INLINE float as_float(word bits) { return __uint_as_float(bits); }
INLINE word as_word(float x) { return __float_as_uint(x); }

INLINE float from_half(half_t x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

INLINE half_t to_half(float x) {
    half_t narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
}

/* Some of the bits, then some turned round: one instruction, where the compiler takes two. */
INLINE word masked(word bits, word mask, word turned) {
    word result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(bits), "r"(mask), "r"(turned));
    return result;
}

/* 16 bytes that nobody needs again: read past the first cache, which is for what all blocks share. */
INLINE uint4 read_once(const uint4 *from) {
    uint4 read;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(read.x), "=r"(read.y), "=r"(read.z), "=r"(read.w)
        : "l"(from));
    return read;
}

/* The value of the lane whose number differs in these bits; of lane `from`. */
INLINE float lane_across(float x, int bits) { return __shfl_xor_sync(0xffffffffu, x, bits); }
INLINE float lane_at(float x, int from) { return __shfl_sync(0xffffffffu, x, from); }

#endif

/* bfloat16 is the upper half of a float. */
INLINE float from_bf16(bf16_t x) { return as_float((word)x.bits << 16); }

/* To the nearest, of two equally near ones to the even; what is no number stays none. */
INLINE bf16_t to_bf16(float x) {
    const word bits = as_word(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return bf16_t{(unsigned short)(x == x ? rounded >> 16 : 0x7fff)};
}

INLINE float widen(float x) { return x; }
INLINE float widen(half_t x) { return from_half(x); }
INLINE float widen(bf16_t x) { return from_bf16(x); }

INLINE T narrow(float x) {
#ifdef GLMUI_BF16
    return to_bf16(x);
#else
    return to_half(x);
#endif
}

/* Two numbers of type T lie in a word, the first in its lower half. */
INLINE float first_of(word pair) { return widen(T{(unsigned short)pair}); }
INLINE float second_of(word pair) { return widen(T{(unsigned short)(pair >> 16)}); }
INLINE word pair_of(float first, float second) { return narrow(first).bits | (word)narrow(second).bits << 16; }

/* Of all lanes of the warp, the same to the last bit in each. */
INLINE float warp_sum(float x) {
    for (int bits = 16; bits; bits /= 2) x += lane_across(x, bits);
    return x;
}

INLINE float warp_largest(float x) {
    for (int bits = 16; bits; bits /= 2) x = fmaxf(x, lane_across(x, bits));
    return x;
}
