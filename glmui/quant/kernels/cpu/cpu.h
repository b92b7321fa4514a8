/* What this processor, and the system on it, can run. */
#ifndef GLMUI_CPU_H
#define GLMUI_CPU_H

#include <stdbool.h>

typedef struct {
    bool any, avx2, avx_vnni, avx512, avx512_vnni, neon, neon_dot;
} Cpu;

#if defined(__x86_64__)
#include <cpuid.h>

static inline unsigned saved_registers(void) { /* XCR0: the registers the system keeps for each thread */
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static inline Cpu cpu_features(void) {
    Cpu cpu = {.any = true};
    unsigned a, b, c, d, b7 = 0, c7 = 0, a71 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) b7 = b, c7 = c;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
    const unsigned saved = osxsave ? saved_registers() : 0;
    const bool bw = b7 >> 30 & 1, vl = b7 >> 31 & 1, f = b7 >> 16 & 1, dq = b7 >> 17 & 1;
    cpu.avx2 = (saved & 0x06) == 0x06 && (b7 >> 5 & 1) && fma && f16c;
    cpu.avx_vnni = cpu.avx2 && (a71 >> 4 & 1);
    cpu.avx512 = (saved & 0xe6) == 0xe6 && cpu.avx2 && f && bw && dq && vl;
    cpu.avx512_vnni = cpu.avx512 && (c7 >> 11 & 1);
    return cpu;
}

#elif defined(__aarch64__)
#if defined(__APPLE__)
static inline bool has_dot(void) { return true; } /* every Apple silicon Mac */
#elif defined(_WIN32)
#include <windows.h>
static inline bool has_dot(void) { return IsProcessorFeaturePresent(43); } /* ARM_V82_DP */
#elif defined(__linux__)
#include <sys/auxv.h>
static inline bool has_dot(void) { return getauxval(AT_HWCAP) >> 20 & 1; } /* ASIMDDP */
#else
static inline bool has_dot(void) { return false; }
#endif

static inline Cpu cpu_features(void) {
    return (Cpu){.any = true, .neon = true, .neon_dot = has_dot()};
}

#else
static inline Cpu cpu_features(void) { return (Cpu){.any = true}; }
#endif

#endif
