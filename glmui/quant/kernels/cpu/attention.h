/* Attention over the KV cache for a few new tokens: softmax(q k^T * scale) v, all sums in float32. Included by
 * template.h for each target.
 *
 * A job's item is a chunk of the tokens of one head of keys, with all rows and heads of queries that look at
 * it. It goes through its tokens in spans that stay in the first cache: first the scores of a span, then its
 * values, weighted by the scores' exponentials beside the largest score so far (Milakov & Gimelshein, 2018). */

INLINE VF load_kept(const void *kept, size_t place, int kind) {
    if (kind == F32) return load_f((const float *)kept + place);
    if (kind == F16) return load_h((const uint16_t *)kept + place);
    return load_b((const uint16_t *)kept + place);
}

/* Ask for `count` numbers that are needed later: a head's tokens lie behind one another. */
INLINE void look_ahead_kept(const void *kept, size_t place, int count, int kind) {
    const int width = kind == F32 ? 4 : 2;
    const char *from = (const char *)kept + place * width + KEPT_AHEAD;
    for (int line = 0; line < count * width; line += 64) __builtin_prefetch(from + line);
}

/* scores[i] = q . key i */
INLINE void score(const Attention *a, const float *q, size_t key, int count, int kind, float *scores) {
    const int size = a->size;
    int i = 0;
    for (; i + 4 <= count; i += 4, key += 4 * (size_t)size) {
        VF sum[4];
        look_ahead_kept(a->keys, key, 4 * size, kind);
        UNROLL for (int j = 0; j < 4; j++) sum[j] = set_f(0);
        for (int c = 0; c < size; c += LANES) {
            const VF x = load_f(q + c);
            UNROLL for (int j = 0; j < 4; j++)
                sum[j] = fma_f(x, load_kept(a->keys, key + (size_t)j * size + c, kind), sum[j]);
        }
        UNROLL for (int j = 0; j < 4; j++) scores[i + j] = sum_f(sum[j]);
    }
    for (; i < count; i++, key += size) {
        VF sum = set_f(0);
        for (int c = 0; c < size; c += LANES)
            sum = fma_f(load_f(q + c), load_kept(a->keys, key + c, kind), sum);
        scores[i] = sum_f(sum);
    }
}

/* A few vectors of columns: found = found * kept + the weighted values. */
INLINE void add_columns(const Attention *a, const float *weights, size_t value, int count, int kind, int vectors,
                        float kept, float *found) {
    VF sum[8];
    UNROLL for (int v = 0; v < vectors; v++) sum[v] = mul_f(load_f(found + v * LANES), set_f(kept));
    for (int i = 0; i < count; i++, value += a->size) {
        const VF weight = set_f(weights[i]);
        look_ahead_kept(a->values, value, vectors * LANES, kind);
        UNROLL for (int v = 0; v < vectors; v++)
            sum[v] = fma_f(weight, load_kept(a->values, value + v * LANES, kind), sum[v]);
    }
    UNROLL for (int v = 0; v < vectors; v++) store_f(found + v * LANES, sum[v]);
}

INLINE void add_values(const Attention *a, const float *weights, size_t value, int count, int kind, float kept,
                       float *found) {
    int c = 0;
    for (; c + 8 * LANES <= a->size; c += 8 * LANES)
        add_columns(a, weights, value + c, count, kind, 8, kept, found + c);
    for (; c < a->size; c += LANES) add_columns(a, weights, value + c, count, kind, 1, kept, found + c);
}

/* Scores into weights, in place: e^(score - largest). Returns their sum. */
static float weigh(float *scores, float largest) {
    float sums[16] = {0}, sum = 0;
    for (int i = 0; i < SPAN; i += 16)
        for (int j = 0; j < 16; j++) {
            scores[i + j] = exponential(scores[i + j] - largest);
            sums[j] += scores[i + j];
        }
    for (int j = 0; j < 16; j++) sum += sums[j];
    return sum;
}

/* One row of queries and a span of tokens, `key` being the place of the first. */
INLINE void look(const Attention *a, const float *q, const uint8_t *visible, size_t key, int count, int kind,
                 Found *f) {
    _Alignas(64) float scores[SPAN];
    score(a, q, key, count, kind, scores);
    for (int i = count; i < SPAN; i++) scores[i] = -INFINITY;
    float largest[16], top = f->largest;
    for (int j = 0; j < 16; j++) largest[j] = -INFINITY;
    for (int i = 0; i < SPAN; i++) scores[i] *= a->scale;
    if (visible)
        for (int i = 0; i < count; i++) scores[i] = visible[i] ? scores[i] : -INFINITY;
    for (int i = 0; i < SPAN; i += 16)
        for (int j = 0; j < 16; j++) largest[j] = scores[i + j] > largest[j] ? scores[i + j] : largest[j];
    for (int j = 0; j < 16; j++) top = largest[j] > top ? largest[j] : top;
    const float kept = exponential(f->largest - top);
    f->sum = f->sum * kept + weigh(scores, top);
    f->largest = top;
    add_values(a, scores, key, count, kind, kept, f->values);
}

INLINE void attend_to_chunk(const Attention *a, int item, int kind) {
    const int head = item / a->chunks, from = item % a->chunks * a->chunk, left = a->length - from;
    const int end = from + (left < a->chunk ? left : a->chunk), rows = a->rows * a->heads;
    const int batch = head / a->groups, group = head % a->groups;
    const size_t keys = (size_t)batch * a->batch_stride + (size_t)group * a->head_stride;
    for (int r = 0; r < rows; r++) {
        Found *f = found_at(a, item, r);
        f->largest = -1e30f, f->sum = 0; /* lower than any score, yet a number */
        memset(f->values, 0, (size_t)a->size * sizeof(float));
    }
    for (int token = from; token < end; token += SPAN) {
        const int count = end - token < SPAN ? end - token : SPAN;
        for (int r = 0; r < rows; r++) {
            const size_t row = (size_t)batch * a->rows + r / a->heads;
            const float *q = a->queries + ((row * a->groups + group) * a->heads + r % a->heads) * a->size;
            const uint8_t *visible = a->visible ? a->visible + row * a->length + token : NULL;
            look(a, q, visible, keys + (size_t)token * a->size, count, kind, found_at(a, item, r));
        }
    }
}

static void attend_chunks(void *argument, int first, int last) {
    const Attention *a = argument;
    for (int item = first; item < last; item++) {
        if (a->kind == F32) attend_to_chunk(a, item, F32);
        else if (a->kind == F16) attend_to_chunk(a, item, F16);
        else attend_to_chunk(a, item, BF16);
    }
}
