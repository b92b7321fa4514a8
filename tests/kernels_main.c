/* Every kernel of every target this processor runs, over awkward shapes, against plain sums in double.
 * Every array is its own allocation of just the right size, so a sanitiser sees any step too far.
 * Prints one line for each target and ends with the number of results that are off. */
#include "kernels.c"

#include <stdio.h>

static uint32_t state = 1;

static int number(int limit) { /* -limit..limit */
    state = state * 1664525u + 1013904223u;
    return (int)((state >> 8) % (2u * (unsigned)limit + 1)) - limit;
}

static float *floats(size_t count) {
    float *values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = (float)number(1000) / 500;
    return values;
}

static bool is_off(const float *y, const double *wanted, size_t count, double tolerance) {
    double distance = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        distance += (y[i] - wanted[i]) * (y[i] - wanted[i]);
        norm += wanted[i] * wanted[i];
    }
    return !(distance <= tolerance * tolerance * norm);
}

static int linear_is_off(Kernels *k, int bits, int rows, int columns, int outputs, int groups) {
    const int limit = bits == 4 ? 7 : 127, width = bits == 4 ? (columns + 1) / 2 : columns;
    const int panels = ceil_div(outputs, PANEL);
    const size_t results = (size_t)rows * outputs;
    float *x = floats((size_t)rows * columns), *bias = floats(outputs), *y = malloc(results * sizeof *y);
    float *scale = floats((size_t)panels * groups * PANEL);
    uint8_t *stored = calloc(outputs, width), *packed = malloc(panels * panel_bytes(bits, columns));
    double *wanted = malloc(results * sizeof *wanted);
    for (size_t i = 0; i < results; i++) wanted[i] = bias[i % outputs];
    for (int n = 0; n < outputs; n++) {
        for (int c = 0; c < columns; c++) {
            const int q = number(limit), group = c / (columns / groups);
            const double w = q * (double)scale[((size_t)n / PANEL * groups + group) * PANEL + n % PANEL];
            if (bits == 8) stored[(size_t)n * width + c] = (uint8_t)q;
            else stored[(size_t)n * width + c / 2] |= c % 2 ? q & 15 : (q & 15) << 4;
            for (int r = 0; r < rows; r++) wanted[(size_t)r * outputs + n] += w * x[(size_t)r * columns + c];
        }
    }
    glmui_pack(k, bits, outputs, columns, stored, packed);
    int off = 0;
    for (int numerics = EXACT; numerics <= FAST; numerics++) {
        const double tolerance = numerics == EXACT ? 1e-5 : numerics == BALANCED ? 1e-3 : 5e-2;
        off += glmui_linear(k, bits, numerics, rows, columns, outputs, x, packed, scale, groups, bias, y);
        off += is_off(y, wanted, results, tolerance);
    }
    free(x), free(bias), free(y), free(scale), free(stored), free(packed), free(wanted);
    return off;
}

static int half_is_off(Kernels *k, int rows, int columns, int outputs) {
    const size_t results = (size_t)rows * outputs;
    float *x = floats((size_t)rows * columns), *y = malloc(results * sizeof *y);
    uint16_t *weight = malloc((size_t)outputs * columns * sizeof *weight);
    double *wanted = calloc(results, sizeof *wanted);
    for (int n = 0; n < outputs; n++) {
        for (int c = 0; c < columns; c++) {
            const int exponent = 12 + number(2), sign = number(1) < 0; /* powers of two about 1 / 8 */
            weight[(size_t)n * columns + c] = (uint16_t)(sign << 15 | exponent << 10);
            const double w = ldexp(sign ? -1 : 1, exponent - 15);
            for (int r = 0; r < rows; r++) wanted[(size_t)r * outputs + n] += w * x[(size_t)r * columns + c];
        }
    }
    glmui_half(k, rows, columns, outputs, x, weight, NULL, y);
    const int off = is_off(y, wanted, results, 1e-5);
    free(x), free(y), free(weight), free(wanted);
    return off;
}

/* Keys and values of whole numbers, which every dtype holds; the last row sees only its last token. */
static int attention_is_off(Kernels *k, int kind, int rows, int groups, int heads, int size, int length) {
    const size_t kept = (size_t)2 * groups * length * size, asked = (size_t)2 * rows * groups * heads * size;
    float *queries = floats(asked), *out = malloc(asked * sizeof *out);
    uint8_t *visible = malloc((size_t)2 * rows * length);
    const size_t width = kind == F32 ? 4 : 2;
    float *numbers[2] = {malloc(kept * sizeof(float)), malloc(kept * sizeof(float))};
    void *stored[2] = {malloc(kept * width), malloc(kept * width)};
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < kept; i++) {
            const int sign = number(1) < 0;
            const uint32_t bits = (uint32_t)sign << 31 | 0x3f800000; /* 1 or -1 */
            const uint16_t half = (uint16_t)(sign << 15 | 0x3c00), brain = (uint16_t)(bits >> 16);
            numbers[side][i] = sign ? -1 : 1;
            memcpy((char *)stored[side] + i * width,
                   kind == F32 ? (const void *)&bits : kind == F16 ? (const void *)&half : &brain, width);
        }
    }
    for (int i = 0; i < 2 * rows * length; i++) visible[i] = i % length == length - 1 || number(1) == 0;
    const float scale = 1 / sqrtf((float)size);
    const size_t head = (size_t)length * size;
    int off = glmui_attend(k, kind, 2, rows, groups, heads, size, length, queries, stored[0], stored[1], groups * head,
                           head, visible, scale, out);
    double *wanted = calloc(asked, sizeof *wanted), *weights = malloc(length * sizeof *weights);
    for (size_t query = 0; query < asked / size; query++) {
        const size_t row = query / (groups * heads), group = query / heads % groups;
        const size_t from = (row / rows * groups + group) * head;
        double sum = 0;
        for (int t = 0; t < length; t++) {
            double score = 0;
            for (int c = 0; c < size; c++) score += queries[query * size + c] * (double)numbers[0][from + t * size + c];
            weights[t] = visible[row * length + t] ? exp(score * scale) : 0;
            sum += weights[t];
        }
        for (int t = 0; t < length; t++)
            for (int c = 0; c < size; c++)
                wanted[query * size + c] += weights[t] / sum * numbers[1][from + t * size + c];
    }
    off += is_off(out, wanted, asked, 1e-5);
    free(queries), free(out), free(visible), free(wanted), free(weights);
    for (int side = 0; side < 2; side++) free(numbers[side]), free(stored[side]);
    return off;
}

static int small_is_off(Kernels *k, int rows, int heads, int parts, int pairs) {
    const size_t count = (size_t)rows * heads * parts * 2 * pairs, turns = (size_t)rows * parts * pairs;
    float *x = floats(count), *cosine = floats(turns), *sine = floats(turns);
    double *wanted = calloc(count, sizeof *wanted);
    for (size_t i = 0; i < count; i++) {
        const size_t pair = i % pairs, second = i / pairs % 2, part = i / pairs / 2 % parts;
        const size_t turn = (i / (2 * (size_t)pairs * parts * heads) * parts + part) * pairs + pair;
        const double other = second ? x[i - pairs] : -x[i + pairs];
        wanted[i] = x[i] * (double)cosine[turn] + other * sine[turn];
    }
    const size_t head = (size_t)parts * 2 * pairs;
    glmui_rotate(k, x, rows, heads * head, heads, head, parts, pairs, cosine, sine);
    int off = is_off(x, wanted, count, 1e-5);
    for (size_t i = 0; i < count; i++) {
        const double v = x[i], u = 0.7978845608 * (v + 0.044715 * v * v * v);
        wanted[i] = 0.5 * v * (1 + tanh(u));
    }
    glmui_gelu(k, x, count);
    off += is_off(x, wanted, count, 1e-5);
    free(x), free(cosine), free(sine), free(wanted);
    return off;
}

int main(void) {
    static const int shapes[][3] = {{1, 1, 1},    {7, 33, 1},   {300, 70, 1},
                                    {513, 31, 1}, {192, 40, 2}, {768, 35, 3}};
    static const int counts[] = {0, 1, 2, 3, 4, 9, 130};
    int off = 0;
    for (int target = 0; glmui_target(target); target++) {
        int here = 0;
        if (!*glmui_target(target)) continue;
        for (int threads = 1; threads <= 3; threads += 2) {
            Kernels *k = glmui_open(target, threads);
            for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
                const int columns = shapes[s][0], outputs = shapes[s][1], groups = shapes[s][2];
                for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
                    here += linear_is_off(k, 4, counts[c], columns, outputs, groups);
                    here += linear_is_off(k, 8, counts[c], columns, outputs, groups);
                    here += half_is_off(k, counts[c], columns, outputs);
                }
            }
            for (int kind = F32; kind <= BF16; kind++) {
                here += attention_is_off(k, kind, 1, 2, 1, 16, 1);
                here += attention_is_off(k, kind, 3, 2, 3, 48, 67);
                here += attention_is_off(k, kind, 1, 1, 2, 160, 200);
            }
            here += small_is_off(k, 1, 1, 1, 1) + small_is_off(k, 5, 3, 2, 4) + small_is_off(k, 40, 4, 2, 33);
            glmui_set_threads(k, 2);
            uint8_t *memory = calloc(3, PAGE);
            memory[5000] = 1;
            here += glmui_read(k, memory, 3 * PAGE) == 0;
            free(memory);
            glmui_close(k);
        }
        printf("%s %d\n", glmui_target(target), here);
        off += here;
    }
    return off;
}
