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
};

enum { EXACT, BALANCED, FAST };

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

typedef struct {
    const char *name;
    int largest_tile; /* rows of x */
    void (*inputs_of)(void *linear, int first, int last); /* rows of x */
    void (*linear)(void *linear, int first, int last);    /* panels */
    void (*half)(void *half, int first, int last);        /* output rows */
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

#endif
