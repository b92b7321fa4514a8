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
