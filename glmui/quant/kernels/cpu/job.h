/* The data every target works on.
 *
 * A packed weight, [panels][steps][bytes]: a panel is 32 output rows, a step is 8 columns of them.
 *
 *   INT4  128 bytes  for each row 4 bytes; byte j holds column j in its low nibble and column 4 + j in its
 *                    high one, each as q + 8, so unsigned
 *   INT8  256 bytes  for each row 4 bytes, columns 0-3 as they are; then for each row columns 4-7
 *
 * So one load brings weights of many rows that all meet the same activations, and a panel is read in order
 * from end to end. Rows are filled up to whole panels and columns to whole steps, with zeros. Scales stand
 * beside, [panels][groups][32] floats.
 */
#ifndef GLMUI_JOB_H
#define GLMUI_JOB_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    PANEL = 32,           /* output rows side by side */
    STEP = 8,             /* columns that a panel advances by */
    BLOCK = 256,          /* columns at most that share an activation scale, and that stay in the first cache */
    PIECE = 128,          /* rows of x taken at a time */
    MAX_ROWS = 2 * PIECE, /* of planes */
    MAX_TILE = 8,         /* rows that one tile holds in registers, at most */
    BASE = 252,           /* of the planes: with 254 a rounding error could make a byte of 128 */
    AHEAD = 8192,         /* bytes of weights asked for before they are needed */
    KEPT_AHEAD = 8192,    /* the same of keys and values */
    SPAN = 64,            /* tokens whose keys and values stay in the first cache */
};

enum { EXACT, BALANCED, FAST };
enum { F32, F16, BF16 }; /* what keys and values are kept in */

#define NIBBLE_SHIFT(k) ((k) < 4 ? 8 * (k) : 8 * (k) - 28)

/* Activations, ready for the tiles: floats, or whole numbers of a unit in planes of INT8, high ones first.
 * Each plane is a row to the tiles, which know of nothing else. One plane is the fast numerics and two are the
 * balanced ones; three hold 24 bits, as many as a float32, and are how exact ones are decoded: memory is the
 * limit there, and bytes leave it the more time. With more rows the floats themselves are faster. */
typedef struct {
    int planes;    /* 0 for floats */
    int rows;      /* rows as the tiles see them, filled up with zeros */
    int blocks;    /* blocks of columns */
    int block;     /* columns in each block; the last may have fewer */
    float *values; /* [blocks][rows][BLOCK], floats */
    int8_t *bytes; /* [blocks][rows][BLOCK], planes */
    int32_t *sums; /* [blocks][rows], of the bytes */
    float *units;  /* [blocks][rows], what one step of a byte is worth */
} Inputs;

typedef struct {
    int bits; /* 4 or 8 */
    int rows, columns, outputs;
    const float *x; /* [rows][columns] */
    const uint8_t *weight;
    const float *scale;
    int groups;        /* scales in each output row */
    const float *bias; /* [outputs], or NULL */
    float *y;          /* [rows][outputs] */
    Inputs in;
} Linear;

typedef struct {
    int rows, columns, outputs;
    const float *x;         /* [rows][columns] */
    const uint16_t *weight; /* [outputs][columns], IEEE half precision */
    const float *bias;      /* [outputs], or NULL */
    float *y;               /* [rows][outputs] */
} Half;

/* softmax(q k^T * scale) v. Tokens of one head of keys lie behind one another; strides count numbers. */
typedef struct {
    int kind;
    int batch, rows, groups, heads, size; /* heads: of queries, for each of the `groups` heads of keys */
    int length;                           /* tokens to look at */
    const float *queries;                 /* [batch][rows][groups][heads][size] */
    const void *keys, *values;            /* [batch][groups][length][size] */
    size_t batch_stride, head_stride;
    const uint8_t *visible; /* [batch][rows][length], or NULL */
    float scale;
    float *out; /* as queries */
    int chunk, chunks;
    float *found; /* [batch][groups][chunks][rows][heads] of Found */
} Attention;

/* What a query found in a chunk: the values, weighted by e^(score - largest), and the weights' sum. */
typedef struct {
    float largest, sum;
    float values[];
} Found;

typedef struct {
    float *values;
    size_t count;
} Gelu;

typedef struct {
    float *values; /* [rows][heads][parts][2][pairs], of which rows and heads lie so many numbers apart: */
    size_t row_stride, head_stride;
    int heads, parts, pairs;
    const float *cosine, *sine; /* [rows][parts][pairs] */
} Rotation;

typedef struct {
    const char *name;
    int largest_tile; /* rows of x */
    void (*inputs_of)(void *linear, int first, int last); /* rows of x */
    void (*linear)(void *linear, int first, int last);    /* panels */
    void (*half)(void *half, int first, int last);        /* output rows */
    void (*attend)(void *attention, int first, int last); /* chunks of tokens of heads */
    void (*gelu)(void *gelu, int first, int last);        /* blocks of BLOCK values */
    void (*rotate)(void *rotation, int first, int last);  /* rows */
    void (*read)(void *reading, int first, int last);     /* pages */
} Target;

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

static inline size_t panel_bytes(int bits, int columns) {
    return (size_t)ceil_div(columns, STEP) * PANEL * (size_t)bits;
}

/* Columns in a block: no block may straddle two groups of scales. */
static inline int block_columns(int columns, int groups) {
    int a = BLOCK, b = groups > 1 ? columns / groups : BLOCK;
    while (b) {
        const int rest = a % b;
        a = b, b = rest;
    }
    return a;
}

/* Ask for the weights of a later step: a panel is read in order, and the next one lies behind it. */
static inline __attribute__((always_inline)) void look_ahead(const uint8_t *place, int bits) {
    __builtin_prefetch(place + AHEAD);
    __builtin_prefetch(place + AHEAD + 64);
    if (bits == 8) {
        __builtin_prefetch(place + AHEAD + 128);
        __builtin_prefetch(place + AHEAD + 192);
    }
}

static inline int32_t read_i32(const void *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline Found *found_at(const Attention *a, int item, int row) {
    return (Found *)(a->found + ((size_t)item * a->rows * a->heads + row) * (a->size + 2));
}

/* e^x within 2e-7 of it; 0 below -87, and NaN for NaN. Written so that a compiler can do many at once: x is
 * n ln 2 + r, and e^r a polynomial (Cephes, Moshier 1989). */
static inline __attribute__((always_inline)) float exponential(float x) {
    const float within = x < -87 ? -87 : x > 88 ? 88 : x;
    const float shifted = within * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f; /* adding this rounds */
    const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const int32_t bits = (int32_t)((uint32_t)(read_i32(&shifted) - 0x4b400000 + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87 ? 0 : p * power;
}

#endif
