/* The kernels of one target, written with the operations of its vec_*.h. No include guard: see names.h.
 *
 * Activations are quantised in blocks of columns, so an outlier spoils the precision of its own block only.
 * A tile is a block of columns of a panel (or of half of it, where registers are few) times a few rows of x;
 * its loops have constant bounds, so that the compiler unrolls them and keeps `acc` in registers.
 */
#define PARTS (PANEL / LANES) /* vectors that hold one value for each row of a panel */

typedef struct {
    const uint8_t *weight;
    int steps;
    const float *scale;
    const float *values;
    const int8_t *bytes;
    const int32_t *sums;
    const float *units;
    float (*out)[PANEL]; /* the sums so far, for each row of x */
} NAME(Tile);
#define Tile NAME(Tile)

INLINE void tile_quantized(const Tile *t, int bits, int rows, int parts) {
    VI acc[MAX_TILE][PARTS];
    UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < parts; v++)
        acc[r][v] = set_i(-(bits == 4 ? 8 : BIAS8) * t->sums[r]); /* what the bias in w adds too much */

    const uint8_t *w = t->weight;
    const int8_t *x = t->bytes;
    for (const uint8_t *end = w + (size_t)t->steps * PANEL * bits; w < end; w += PANEL * bits, x += STEP) {
        VI low[PARTS], high[PARTS]; /* bytes of columns 0-3 and 4-7 */
        look_ahead(w, bits);
        UNROLL for (int v = 0; v < parts; v++) {
            const VI loaded = load_i(w + 4 * LANES * v);
            low[v] = bits == 4 ? low_nibbles(loaded) : loaded;
            high[v] = bits == 4 ? high_nibbles(loaded) : load_i(w + 4 * (PANEL + LANES * v));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const VI first = set_i(read_i32(x + r * BLOCK)), second = set_i(read_i32(x + r * BLOCK + 4));
            UNROLL for (int v = 0; v < parts; v++)
                acc[r][v] = bits == 4 ? dot4(acc[r][v], low[v], high[v], first, second)
                                      : dot8(dot8(acc[r][v], low[v], first), high[v], second);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < parts; v++) {
        float *out = t->out[r] + v * LANES;
        const VF scale = mul_f(load_f(t->scale + v * LANES), set_f(t->units[r]));
        store_f(out, fma_f(to_f(acc[r][v]), scale, load_f(out)));
    }
}

INLINE void tile_exact(const Tile *t, int bits, int rows, int parts) {
    /* Sums that do not wait for each other. */
    const int chains = rows * parts < 4 ? 4 : rows * parts < 8 ? 2 : 1;
    VF acc[MAX_TILE][PARTS];
    UNROLL for (int r = 0; r < rows * chains; r++)
    UNROLL for (int v = 0; v < parts; v++) acc[r][v] = set_f(0);

    const uint8_t *w = t->weight;
    const float *x = t->values;
    for (int step = 0; step < t->steps; step++, w += PANEL * bits, x += STEP) {
        VI low[PARTS], high[PARTS];
        look_ahead(w, bits);
        UNROLL for (int v = 0; v < parts; v++) {
            low[v] = load_i(w + 4 * LANES * v);
            high[v] = bits == 8 ? load_i(w + 4 * (PANEL + LANES * v)) : low[v];
        }
        UNROLL for (int k = 0; k < STEP; k++)
        UNROLL for (int v = 0; v < parts; v++) {
            const VF weight = bits == 4 ? weight4(low[v], k) : weight8(k < 4 ? low[v] : high[v], k % 4);
            UNROLL for (int r = 0; r < rows; r++) {
                VF *a = &acc[r * chains + k % chains][v];
                *a = fma_f(weight, set_f(x[r * BLOCK + k]), *a);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < parts; v++) {
        VF sum = acc[r * chains][v];
        UNROLL for (int c = 1; c < chains; c++) sum = add_f(sum, acc[r * chains + c][v]);
        float *out = t->out[r] + v * LANES;
        store_f(out, fma_f(sum, load_f(t->scale + v * LANES), load_f(out)));
    }
}

INLINE void tile(const Linear *l, Tile t, int rows) {
    const int parts = rows > 2 ? PARTS_AT_ONCE : PARTS;
    for (int v = 0; v < PARTS; v += parts) {
        if (l->in.planes == 0) {
            if (l->bits == 4) tile_exact(&t, 4, rows, parts);
            else tile_exact(&t, 8, rows, parts);
        } else {
            if (l->bits == 4) tile_quantized(&t, 4, rows, parts);
            else tile_quantized(&t, 8, rows, parts);
        }
        t.weight += 4 * LANES * parts, t.scale += LANES * parts;
        t.out = (float(*)[PANEL])(t.out[0] + LANES * parts);
    }
}

/* All rows of x times one block of columns of a panel, added to `out`. */
INLINE void tiles(const Linear *l, int panel, int block, float (*out)[PANEL]) {
    const Inputs *in = &l->in;
    const int from = block * in->block, left = l->columns - from;
    const size_t row = (size_t)block * in->rows;
    const size_t group = (size_t)panel * l->groups + from / (l->columns / l->groups);
    Tile t = {
        .weight = l->weight + panel * panel_bytes(l->bits, l->columns) + (size_t)from / STEP * PANEL * l->bits,
        .steps = ceil_div(left < in->block ? left : in->block, STEP),
        .scale = l->scale + group * PANEL,
        .values = in->values + row * BLOCK,
        .bytes = in->bytes + row * BLOCK,
        .sums = in->sums + row,
        .units = in->units + row,
        .out = out,
    };
    for (int r = 0, count; r < in->rows; r += count) {
        const int rest = in->rows - r;
        count = rest >= LARGEST_TILE ? LARGEST_TILE : rest;
        if (count == LARGEST_TILE) tile(l, t, LARGEST_TILE);
        else if (count == 4) tile(l, t, 4);
        else if (count == 3) tile(l, t, 3);
        else if (count == 2) tile(l, t, 2);
        else tile(l, t, 1);
        t.sums += count, t.units += count, t.out += count;
        t.values += count * BLOCK, t.bytes += count * BLOCK;
    }
}

/* The finished sums of a panel, the planes of each row added up, with the bias, into y. */
static void write_rows(const Linear *l, int panel, float (*out)[PANEL]) {
    const int first = panel * PANEL, left = l->outputs - first, count = left < PANEL ? left : PANEL;
    const int rows_each = l->in.planes ? l->in.planes : 1;
    for (int r = 0; r < l->rows; r++, out += rows_each) {
        float *y = l->y + (size_t)r * l->outputs + first;
        for (int i = 0; i < count; i++) {
            float sum = out[0][i];
            for (int plane = 1; plane < rows_each; plane++) sum += out[plane][i];
            y[i] = sum + (l->bias ? l->bias[first + i] : 0);
        }
    }
}

/* Panels first..last-1, for all rows: a block of columns of the panel stays in the first cache meanwhile. */
static void multiply(void *argument, int first, int last) {
    const Linear *l = argument;
    _Alignas(64) float out[MAX_ROWS][PANEL];
    for (int panel = first; panel < last; panel++) {
        memset(out, 0, (size_t)l->in.rows * sizeof out[0]);
        for (int block = 0; block < l->in.blocks; block++) tiles(l, panel, block, out);
        write_rows(l, panel, out);
    }
}

/* x[0..n-1] as whole numbers of a unit, which is returned; the largest is `limit`. Where x has an infinity or
 * a NaN the unit is NaN, and so is all that comes of it. */
INLINE float whole_numbers(const float *x, int n, int limit, int32_t *q) {
    int32_t largest = 0; /* floats without their sign are in the order of their bits */
    for (int i = 0; i < n; i++) {
        const int32_t bits = read_i32(x + i) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float reach;
    memcpy(&reach, &largest, sizeof reach);
    if (largest >= 0x7f800000) return NAN;
    if (reach < 1e-30f) return 0;
    const float per_unit = (float)limit / reach;
    for (int i = 0; i < n; i++) {
        const float exact = x[i] * per_unit;
        q[i] = (int32_t)(exact + (exact < 0 ? -0.5f : 0.5f));
    }
    return reach / (float)limit;
}

/* A block of a row of x as planes: q = high * BASE^2 + middle * BASE + low, as far as there are planes. */
static void quantize_block(Inputs *in, size_t row, const float *x, int n) {
    int32_t q[BLOCK] = {0}, limit = in->planes == 1 ? 127 : 126;
    for (int i = 1; i < in->planes; i++) limit *= BASE;
    float unit = whole_numbers(x, n, limit, q);
    for (size_t plane = row + in->planes - 1;; plane--, unit *= BASE) { /* the lowest first */
        int8_t *bytes = in->bytes + plane * BLOCK;
        const bool last = plane == row;
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; i++) {
            const float shifted = (float)q[i] * (1.0f / BASE) + 0x1.8p23f; /* adding this rounds */
            const int32_t above = last ? 0 : read_i32(&shifted) - 0x4b400000;
            const int32_t here = q[i] - BASE * above;
            bytes[i] = (int8_t)here, sum += here, q[i] = above;
        }
        in->sums[plane] = sum, in->units[plane] = unit;
        if (last) return;
    }
}

/* Rows first..last-1 of x, rows past its end being zeros, as the tiles want them. */
static void prepare(void *argument, int first, int last) {
    Linear *l = argument;
    Inputs *in = &l->in;
    const int rows_each = in->planes ? in->planes : 1;
    for (int r = first; r < last; r++) {
        for (int block = 0; block < in->blocks; block++) {
            const int from = block * in->block, left = l->columns - from;
            const int n = r >= l->rows ? 0 : left < in->block ? left : in->block;
            const float *x = r >= l->rows ? NULL : l->x + (size_t)r * l->columns + from;
            const size_t row = (size_t)block * in->rows + r * rows_each;
            if (in->planes) {
                quantize_block(in, row, x, n);
            } else {
                float *values = in->values + row * BLOCK;
                for (int i = 0; i < BLOCK; i++) values[i] = i < n ? x[i] : 0;
            }
        }
    }
}

/* One row of a half-precision matrix times a few rows of x. */
INLINE void half_tile(const Half *h, const float *x, int rows, const uint16_t *w, float *out) {
    const int chains = 4 / rows, columns = h->columns;
    VF acc[4][4];
    UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int c = 0; c < chains; c++) acc[r][c] = set_f(0);
    int k = 0;
    for (; k + chains * LANES <= columns; k += chains * LANES) {
        UNROLL for (int c = 0; c < chains; c++) {
            const VF weight = load_h(w + k + c * LANES);
            UNROLL for (int r = 0; r < rows; r++)
                acc[r][c] = fma_f(weight, load_f(x + (size_t)r * columns + k + c * LANES), acc[r][c]);
        }
    }
    for (; k < columns; k += LANES) { /* what is left, filled up with zeros */
        const int n = columns - k < LANES ? columns - k : LANES;
        uint16_t rest[LANES] = {0};
        memcpy(rest, w + k, n * sizeof *w);
        UNROLL for (int r = 0; r < rows; r++) {
            float values[LANES] = {0};
            memcpy(values, x + (size_t)r * columns + k, n * sizeof *x);
            acc[r][0] = fma_f(load_h(rest), load_f(values), acc[r][0]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int c = 1; c < chains; c++) acc[r][0] = add_f(acc[r][0], acc[r][c]);
        out[r] = sum_f(acc[r][0]);
    }
}

/* Output rows first..last-1 of a half-precision layer; a row stays in the first cache for all of x. */
static void half_rows(void *argument, int first, int last) {
    const Half *h = argument;
    for (int n = first; n < last; n++) {
        const uint16_t *w = h->weight + (size_t)n * h->columns;
        for (int m = 0, count; m < h->rows; m += count) {
            const float *x = h->x + (size_t)m * h->columns;
            float out[4];
            count = h->rows - m >= 4 ? 4 : 1;
            if (count == 4) half_tile(h, x, 4, w, out);
            else half_tile(h, x, 1, w, out);
            for (int r = 0; r < count; r++)
                h->y[(size_t)(m + r) * h->outputs + n] = out[r] + (h->bias ? h->bias[n] : 0);
        }
    }
}

static void read_all(void *argument, int first, int last) {
    Reading *reading = argument;
    VI sums[8];
    UNROLL for (int i = 0; i < 8; i++) sums[i] = set_i(0);
    for (const uint8_t *p = reading->bytes + (size_t)first * PAGE, *end = reading->bytes + (size_t)last * PAGE;
         p < end; p += 8 * 4 * LANES) {
        UNROLL for (int i = 0; i < 8; i++) sums[i] = add_i(sums[i], load_i(p + i * 4 * LANES));
    }
    UNROLL for (int i = 1; i < 8; i++) sums[0] = add_i(sums[0], sums[i]);
    atomic_fetch_add(&reading->sum, (unsigned)sum_i(sums[0]));
}

#include "attention.h"
#include "small.h"

static const Target NAME(target) = {STRING(SUFFIX), LARGEST_TILE, prepare,     multiply, half_rows,
                                    attend_chunks,  gelu_blocks,  rotate_rows, read_all};

#undef Tile
#undef PARTS
#undef LANES
#undef VF
#undef VI
#undef BIAS8
#undef SUFFIX
#undef LARGEST_TILE
#undef PARTS_AT_ONCE
