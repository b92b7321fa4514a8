/* Eight neighbouring numbers, in float32: what a thread reads and writes at once. They begin at a multiple of eight. */
#pragma once

#include "device.cuh"

struct Eight {
    float of[8];
};

INLINE Eight load_eight(const T *from) {
    const uint4 read = *(const uint4 *)from;
    return Eight{first_of(read.x), second_of(read.x), first_of(read.y), second_of(read.y),
                 first_of(read.z), second_of(read.z), first_of(read.w), second_of(read.w)};
}

INLINE Eight load_eight(const signed char *from) {
    const unsigned long long read = *(const unsigned long long *)from;
    Eight wide;
#pragma unroll
    for (int j = 0; j < 8; j++) wide.of[j] = (signed char)(read >> 8 * j);
    return wide;
}

INLINE void store_eight(T *to, const Eight &x) {
    uint4 pairs;
    pairs.x = pair_of(x.of[0], x.of[1]), pairs.y = pair_of(x.of[2], x.of[3]);
    pairs.z = pair_of(x.of[4], x.of[5]), pairs.w = pair_of(x.of[6], x.of[7]);
    *(uint4 *)to = pairs;
}
