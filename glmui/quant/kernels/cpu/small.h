/* A block's small operations, in place: activation and rotary positions. Included by template.h for each target;
 * plain loops, which the compiler makes vectors of. */

/* x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU in its tanh form. Items are BLOCK values. */
static void gelu_blocks(void *argument, int first, int last) {
    const Gelu *g = argument;
    const size_t end = (size_t)last * BLOCK < g->count ? (size_t)last * BLOCK : g->count;
    for (size_t i = (size_t)first * BLOCK; i < end; i++) {
        const float x = g->values[i];
        g->values[i] = x / (1 + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    }
}

/* Rows of heads, each turned by its position's angles: `parts` parts of a head, in each of which a number of
 * the first half turns together with its counterpart in the second. */
static void rotate_rows(void *argument, int first, int last) {
    const Rotation *r = argument;
    const int pairs = r->pairs;
    for (int row = first; row < last; row++) {
        for (int i = 0; i < r->heads * r->parts; i++) {
            const size_t turn = ((size_t)row * r->parts + i % r->parts) * pairs;
            float *a = r->values + row * r->row_stride + i / r->parts * r->head_stride + i % r->parts * 2 * pairs;
            const float *cosine = r->cosine + turn, *sine = r->sine + turn;
            for (int k = 0; k < pairs; k++) {
                const float x = a[k], y = a[k + pairs];
                a[k] = x * cosine[k] - y * sine[k];
                a[k + pairs] = y * cosine[k] + x * sine[k];
            }
        }
    }
}
