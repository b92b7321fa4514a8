/* Linear layers with INT4 and INT8 weights on the CPU:  y = x W^T * scale + bias,  x and y float32.
 *
 * Three numerics: exact (float32 activations), balanced (16-bit activations as two INT8 planes) and fast (INT8
 * activations). Decoding reads every weight once for each token, so memory is the limit there and the layout
 * (job.h) is made for reading in order; prefill is bound by arithmetic, and works in blocks that stay in the
 * caches (template.h). What a block computes between them is in attention.h and small.h. This file compiles the
 * template for each target and chooses one at run time.
 */
#include "job.h"
#include "cpu.h"
#include "names.h"
#include "pool.h"

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { PAGE = 4096, CHUNKS = 32 }; /* chunks of tokens that attention is shared out in, at least */

typedef struct {
    const uint8_t *bytes;
    atomic_uint sum;
} Reading;

#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define SUFFIX avx512_vnni
#define HAVE_VNNI 1
#define LARGEST_TILE 8
#define PARTS_AT_ONCE 2
#include "vec_avx512.h"
#include "template.h"
#undef HAVE_VNNI
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define SUFFIX avx512
#define HAVE_VNNI 0
#define LARGEST_TILE 8
#define PARTS_AT_ONCE 2
#include "vec_avx512.h"
#include "template.h"
#undef HAVE_VNNI
END_TARGET

BEGIN_TARGET("avxvnni,avx2,fma,f16c")
#define SUFFIX avx_vnni
#define HAVE_VNNI 1
#define LARGEST_TILE 4
#define PARTS_AT_ONCE 2
#include "vec_avx2.h"
#include "template.h"
#undef HAVE_VNNI
END_TARGET

BEGIN_TARGET("avx2,fma,f16c")
#define SUFFIX avx2
#define HAVE_VNNI 0
#define LARGEST_TILE 4
#define PARTS_AT_ONCE 2
#include "vec_avx2.h"
#include "template.h"
#undef HAVE_VNNI
END_TARGET

#elif defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
BEGIN_TARGET("dotprod")
#else
BEGIN_TARGET("arch=armv8.2-a+dotprod")
#endif
#define SUFFIX neon_dot
#define HAVE_DOT 1
#define LARGEST_TILE 4
#define PARTS_AT_ONCE 4
#include "vec_neon.h"
#include "template.h"
#undef HAVE_DOT
END_TARGET

#define SUFFIX neon
#define HAVE_DOT 0
#define LARGEST_TILE 4
#define PARTS_AT_ONCE 4
#include "vec_neon.h"
#include "template.h"
#undef HAVE_DOT
#endif

#define SUFFIX portable
#define LARGEST_TILE 4
#define PARTS_AT_ONCE 2
#include "vec_portable.h"
#include "template.h"

/* The target number `index`, best first, or NULL past the last; NULL too where this processor lacks it. */
static const Target *usable_target(int index, bool *exists) {
    const Cpu cpu = cpu_features();
    const struct {
        const Target *target;
        bool usable;
    } all[] = {
#if defined(__x86_64__)
        {&PASTE(target, avx512_vnni), cpu.avx512_vnni},
        {&PASTE(target, avx512), cpu.avx512},
        {&PASTE(target, avx_vnni), cpu.avx_vnni},
        {&PASTE(target, avx2), cpu.avx2},
#elif defined(__aarch64__)
        {&PASTE(target, neon_dot), cpu.neon_dot},
        {&PASTE(target, neon), cpu.neon},
#endif
        {&PASTE(target, portable), cpu.any},
    };
    *exists = index >= 0 && index < (int)(sizeof all / sizeof all[0]);
    return *exists && all[index].usable ? all[index].target : NULL;
}

typedef struct {
    Mutex mutex; /* one call at a time, whatever thread it comes from */
    Pool pool;
    const Target *target;
    void *memory; /* grows to the largest need of any call */
    size_t size;
} Kernels;

/* The name of target number `index` (0 is the best) when this processor runs it, "" when not, NULL past the
 * last. */
EXPORT const char *glmui_target(int index) {
    bool exists;
    const Target *target = usable_target(index, &exists);
    return target ? target->name : exists ? "" : NULL;
}

/* Kernels of that target on so many threads, or NULL when the target or memory is not there. */
EXPORT Kernels *glmui_open(int index, int threads) {
    bool exists;
    const Target *target = usable_target(index, &exists);
    Kernels *k = target ? calloc(1, sizeof *k) : NULL;
    if (!k) return NULL;
    k->target = target;
    mutex_init(&k->mutex);
    pool_init(&k->pool);
    pool_resize(&k->pool, threads);
    return k;
}

EXPORT void glmui_close(Kernels *k) {
    pool_end(&k->pool);
    mutex_end(&k->mutex);
    free(k->memory);
    free(k);
}

/* Returns how many threads there are now. */
EXPORT int glmui_set_threads(Kernels *k, int threads) {
    mutex_lock(&k->mutex);
    pool_resize(&k->pool, threads);
    const int now = k->pool.helpers + 1;
    mutex_unlock(&k->mutex);
    return now;
}

typedef struct {
    int bits, rows, columns;
    const uint8_t *stored; /* as published: INT4 has the even column in the high nibble */
    uint8_t *packed;
} Packing;

/* 8 INT4 of a row, from the published order to the panel's, each plus 8. */
static uint32_t pack_int4(const uint8_t *b) {
    const uint32_t bytes[4] = {(b[0] >> 4) | (b[2] & 0xf0), (b[0] & 15) | (b[2] & 15) << 4,
                               (b[1] >> 4) | (b[3] & 0xf0), (b[1] & 15) | (b[3] & 15) << 4};
    return (bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24) ^ 0x88888888;
}

static void pack_panels(void *argument, int first, int last) {
    const Packing *job = argument;
    const int steps = ceil_div(job->columns, STEP), bytes = job->bits; /* of a row in a step */
    const int stored = job->bits == 8 ? job->columns : ceil_div(job->columns, 2); /* bytes of a row */
    for (int panel = first; panel < last; panel++) {
        uint8_t *out = job->packed + (size_t)panel * panel_bytes(job->bits, job->columns);
        for (int step = 0; step < steps; step++, out += PANEL * bytes) {
            for (int r = 0; r < PANEL; r++) {
                const int row = panel * PANEL + r, left = stored - step * bytes;
                uint8_t b[STEP] = {0};
                if (row < job->rows)
                    memcpy(b, job->stored + (size_t)row * stored + step * bytes, left < bytes ? left : bytes);
                const uint32_t low = pack_int4(b);
                memcpy(out + 4 * r, job->bits == 4 ? (const void *)&low : b, 4);
                if (job->bits == 8) memcpy(out + 4 * PANEL + 4 * r, b + 4, 4);
            }
        }
    }
}

/* A published matrix, [rows][columns] INT8 or [rows][(columns + 1) / 2] INT4, into panels (job.h). */
EXPORT void glmui_pack(Kernels *k, int bits, int rows, int columns, const void *stored, void *packed) {
    Packing job = {bits, rows, columns, stored, packed};
    mutex_lock(&k->mutex);
    pool_run(&k->pool, pack_panels, &job, ceil_div(rows, PANEL), 1);
    mutex_unlock(&k->mutex);
}

static void *aligned_memory(Kernels *k, size_t size) {
    if (size + 64 > k->size) {
        free(k->memory);
        k->memory = malloc(size + 64);
        k->size = k->memory ? size + 64 : 0;
    }
    return k->memory ? (void *)(((uintptr_t)k->memory + 63) & ~(uintptr_t)63) : NULL;
}

/* How many planes of bytes serve so many rows best; 0 is floats. */
static int planes_for(int numerics, int rows) {
    if (numerics == EXACT) return rows == 1 ? 3 : 0;
    return numerics == BALANCED ? 2 : 1;
}

/* Rows filled up to whole tiles: the last has 1, 2, 3 or 4 rows, or as many as the largest. */
static int whole_tiles(int rows, int largest) {
    const int last = rows % largest;
    return rows - last + (last <= 4 ? last : largest);
}

static bool lay_out_inputs(Kernels *k, Linear *l, int planes) {
    Inputs *in = &l->in;
    in->planes = planes;
    in->rows = whole_tiles(planes ? planes * l->rows : l->rows, k->target->largest_tile);
    in->block = block_columns(l->columns, l->groups);
    in->blocks = ceil_div(l->columns, in->block);
    const size_t cells = (size_t)in->rows * in->blocks;
    const size_t each = planes ? sizeof(int8_t) : sizeof(float);
    uint8_t *memory = aligned_memory(k, cells * (BLOCK * each + sizeof(float) + sizeof(int32_t)));
    if (!memory) return false;
    in->values = (float *)memory, in->bytes = (int8_t *)memory;
    in->units = (float *)(memory + cells * BLOCK * each);
    in->sums = (int32_t *)(in->units + cells);
    return true;
}

/* y [rows][outputs] = x [rows][columns] times the packed weight, plus bias (NULL for none).
 * Returns 0, or 1 when memory ran out. */
EXPORT int glmui_linear(Kernels *k, int bits, int numerics, int rows, int columns, int outputs, const float *x,
                        const void *weight, const float *scale, int groups, const float *bias, float *y) {
    bool enough = true;
    mutex_lock(&k->mutex);
    for (int first = 0; first < rows && enough; first += PIECE) {
        Linear l = {.bits = bits, .columns = columns, .outputs = outputs,
                    .rows = rows - first < PIECE ? rows - first : PIECE,
                    .x = x + (size_t)first * columns, .weight = weight, .scale = scale, .groups = groups,
                    .bias = bias, .y = y + (size_t)first * outputs};
        const int planes = planes_for(numerics, rows);
        enough = lay_out_inputs(k, &l, planes);
        if (!enough) break;
        pool_run(&k->pool, k->target->inputs_of, &l, planes ? l.in.rows / planes : l.in.rows, 8);
        const size_t work = panel_bytes(bits, columns) * l.rows;
        const int grain = work < 65536 ? (int)(65536 / work) : 1; /* less is not worth sharing */
        pool_run(&k->pool, k->target->linear, &l, ceil_div(outputs, PANEL), grain);
    }
    mutex_unlock(&k->mutex);
    return enough ? 0 : 1;
}

/* The same with a half-precision weight [outputs][columns], read where it lies. */
EXPORT void glmui_half(Kernels *k, int rows, int columns, int outputs, const float *x, const void *weight,
                       const float *bias, float *y) {
    Half half = {rows, columns, outputs, x, weight, bias, y};
    mutex_lock(&k->mutex);
    pool_run(&k->pool, k->target->half, &half, outputs, 1 + (1 << 16) / (1 + 2 * columns));
    mutex_unlock(&k->mutex);
}

/* Rows first..last-1 of `out`, each from what it found in all chunks. */
static void merge(void *argument, int first, int last) {
    const Attention *a = argument;
    for (int row = first; row < last; row++) {
        const int head = row % a->heads, group = row / a->heads % a->groups;
        const int place = row / (a->heads * a->groups), batch = place / a->rows;
        const int query = place % a->rows * a->heads + head, item = (batch * a->groups + group) * a->chunks;
        float largest = found_at(a, item, query)->largest, total = 0;
        for (int chunk = 1; chunk < a->chunks; chunk++) {
            const float here = found_at(a, item + chunk, query)->largest;
            largest = here > largest ? here : largest;
        }
        float *out = a->out + (size_t)row * a->size;
        memset(out, 0, (size_t)a->size * sizeof *out);
        for (int chunk = 0; chunk < a->chunks; chunk++) {
            const Found *f = found_at(a, item + chunk, query);
            const float part = exponential(f->largest - largest);
            total += part * f->sum;
            for (int i = 0; i < a->size; i++) out[i] += part * f->values[i];
        }
        for (int i = 0; i < a->size; i++) out[i] /= total;
    }
}

/* Attention of a few rows of queries; the arguments as in job.h. `size` must be a multiple of 16.
 * Few heads of keys have their tokens shared out in more chunks. Returns 0, or 1 when memory ran out. */
EXPORT int glmui_attend(Kernels *k, int kind, int batch, int rows, int groups, int heads, int size, int length,
                        const float *queries, const void *keys, const void *values, size_t batch_stride,
                        size_t head_stride, const uint8_t *visible, float scale, float *out) {
    const int spans = ceil_div(length, SPAN), wanted = ceil_div(CHUNKS, batch * groups);
    const int chunk = ceil_div(spans, wanted < spans ? wanted : spans) * SPAN;
    Attention a = {kind, batch, rows, groups, heads, size, length, queries, keys, values, batch_stride, head_stride,
                   visible, scale, out, chunk, ceil_div(length, chunk), NULL};
    const int items = batch * groups * a.chunks;
    mutex_lock(&k->mutex);
    a.found = aligned_memory(k, (size_t)items * rows * heads * (size + 2) * sizeof(float));
    if (a.found) {
        pool_run(&k->pool, k->target->attend, &a, items, 1);
        pool_run(&k->pool, merge, &a, batch * rows * groups * heads, 1 + 16384 / (size * a.chunks));
    }
    mutex_unlock(&k->mutex);
    return a.found ? 0 : 1;
}

/* GELU, tanh form, in place. */
EXPORT void glmui_gelu(Kernels *k, float *values, size_t count) {
    Gelu gelu = {values, count};
    mutex_lock(&k->mutex);
    pool_run(&k->pool, k->target->gelu, &gelu, (int)((count + BLOCK - 1) / BLOCK), 32);
    mutex_unlock(&k->mutex);
}

/* Rotary positions, in place; the arguments as in job.h. */
EXPORT void glmui_rotate(Kernels *k, float *values, int rows, size_t row_stride, int heads, size_t head_stride,
                         int parts, int pairs, const float *cosine, const float *sine) {
    Rotation rotation = {values, row_stride, head_stride, heads, parts, pairs, cosine, sine};
    mutex_lock(&k->mutex);
    pool_run(&k->pool, k->target->rotate, &rotation, rows, 1 + 8192 / (heads * parts * pairs));
    mutex_unlock(&k->mutex);
}

/* Read `size` bytes from memory, in whole pages of 4096: what decoding cannot go faster than. */
EXPORT unsigned glmui_read(Kernels *k, const void *bytes, size_t size) {
    Reading reading = {.bytes = bytes};
    mutex_lock(&k->mutex);
    pool_run(&k->pool, k->target->read, &reading, (int)(size / PAGE), 16);
    mutex_unlock(&k->mutex);
    return atomic_load(&reading.sum);
}
