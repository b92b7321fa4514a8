/* Attention of one new token over a layer's cache: softmax(q k^T / sqrt(d)) v, all sums in float32, in one launch.
 *
 * A block looks for a few heads that share their keys (a tile) at a part of the tokens (a split). It turns its
 * queries by the token's place; the one whose split ends with the new token puts key and value into the cache
 * first. A few lanes, 8 numbers each, go through tokens of their own and keep the sum of values weighted by the
 * scores' exponentials beside the largest score so far (Milakov & Gimelshein, 2018). What lanes, warps and splits
 * have found is put together at the end, that of the splits by whichever block of the tile is the last. */

#include "eight.cuh"

#define WARPS 4
#define THREADS (32 * WARPS)
#define MOST_SIZE 256  /* numbers in a head: 8 for each lane of a warp */
#define USUAL_SIZE 128 /* of all published models */
#define AHEAD 4        /* tokens whose keys and values are asked for at once */
#define LEAST_CHUNK 64 /* tokens; a smaller split would not be worth its part in putting together */
#define LOWEST -1e30f  /* lower than any score, yet a number */
#define LOG2E 1.4426950408889634f

/* What query_key_value gave for the token. ChatGLM-6B (`beside`): a head's query, key and value side by side, both
 * halves of a head turned; ChatGLM2 and 3: all queries, all keys, all values, a head's first half turned. */
struct Row {
    const T *numbers, *cosine, *sine; /* the last two: of the token's place */
    int heads, groups, size, beside;

    __device__ const T *query(int head) const { return numbers + head * (beside ? 3 : 1) * size; }
    __device__ const T *key(int group) const {
        return numbers + (beside ? 3 * group + 1 : heads + group) * size;
    }
    __device__ const T *value(int group) const { return key(group) + (beside ? 1 : groups) * size; }
};

/* A layer's keys or values [groups, capacity, size], with a scale for each token where they are int8. */
template <typename Kept> struct Cache {
    Kept *numbers;
    half_t *scale;
    int capacity;

    __device__ size_t place(int group, int token) const { return (size_t)group * capacity + token; }
};

/* Number c of a query or key, turned (glm/rotary.py). */
INLINE float turned(const Row &row, const T *x, int c) {
    const int quarter = row.size / 4, inside = c % (2 * quarter);
    int angle, other;
    bool first;
    if (row.beside) {
        first = inside < quarter, other = first ? c + quarter : c - quarter;
        angle = c / (2 * quarter) * quarter + inside % quarter;
    } else {
        if (c >= 2 * quarter) return widen(x[c]);
        first = c % 2 == 0, other = c ^ 1, angle = c / 2;
    }
    const float across = widen(x[other]) * widen(row.sine[angle]);
    return widen(x[c]) * widen(row.cosine[angle]) + (first ? -across : across);
}

/* The new token's key, which is turned, or its value. */
struct Entry {
    const Row &row;
    const T *numbers;
    bool turns;

    __device__ T number(int c) const { return turns ? narrow(turned(row, numbers, c)) : numbers[c]; }
};

/* It goes into the cache, by a warp. */
INLINE void keep(const Cache<T> &to, size_t place, const Entry &x) {
    const int size = x.row.size;
    for (int c = threadIdx.x % 32; c < size; c += 32) to.numbers[place * size + c] = x.number(c);
}

/* The same in int8, as glm/cache.py does it: by max|x| / 127, rounded, and to even. */
INLINE void keep(const Cache<signed char> &to, size_t place, const Entry &x) {
    const int size = x.row.size, lane = threadIdx.x % 32;
    float most = 0;
    for (int c = lane; c < size; c += 32) most = fmaxf(most, fabsf(widen(x.number(c))));
    const half_t scale = to_half(warp_largest(most) / 127);
    const float divisor = from_half(scale) == 0 ? 1 : from_half(scale);
    if (lane == 0) to.scale[place] = scale;
    for (int c = lane; c < size; c += 32) {
        const float q = rintf(widen(x.number(c)) / divisor);
        to.numbers[place * size + c] = (signed char)fminf(fmaxf(q, -127.0f), 127.0f);
    }
}

/* The key by the first warp, the value by the second. Every tile of a group writes the same. */
template <typename Kept>
INLINE void keep_token(const Row &row, const Cache<Kept> &keys, const Cache<Kept> &values, int group, int token) {
    const int warp = threadIdx.x / 32;
    const size_t place = keys.place(group, token);
    if (warp == 0) keep(keys, place, Entry{row, row.key(group), true});
    if (warp == 1) keep(values, place, Entry{row, row.value(group), false});
}

INLINE float scale_at(const Cache<T> &, size_t) { return 1; }
INLINE float scale_at(const Cache<signed char> &cache, size_t place) { return from_half(cache.scale[place]); }

/* Tokens that a few lanes read at once: whether there is one, its value's 8 columns, and what scales the value. */
struct Values {
    bool there[AHEAD];
    Eight of[AHEAD];
    float scale[AHEAD];
};

/* Of one head: the largest score so far, the sum of the weights, and 8 columns of the weighted values. */
struct Found {
    float largest, sum, values[8];

    /* Go on with tokens that have these scores. */
    __device__ void add(const float (&scores)[AHEAD], const Values &seen) {
        float top = largest;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) top = seen.there[i] ? fmaxf(top, scores[i]) : top;
        shrink(exp2f(largest - top));
        largest = top;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float weight = seen.there[i] ? exp2f(scores[i] - top) : 0;
            sum += weight;
#pragma unroll
            for (int j = 0; j < 8; j++) values[j] += weight * seen.scale[i] * seen.of[i].of[j];
        }
    }

    /* Put together what the lanes of a warp have found that share these columns, `apart` and more numbers apart. */
    __device__ void join(int apart) {
        for (; apart < 32; apart *= 2) {
            const float other = lane_across(largest, apart), top = fmaxf(largest, other);
            shrink(exp2f(largest - top)); /* the other lane does the same with its own */
            largest = top;
            sum += lane_across(sum, apart);
#pragma unroll
            for (int j = 0; j < 8; j++) values[j] += lane_across(values[j], apart);
        }
    }

    __device__ void shrink(float by) {
        sum *= by;
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] *= by;
    }
};

INLINE float dot(const float (&q)[8], const Eight &key) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += q[j] * key.of[j];
    return sum;
}

/* Go through tokens first..end-1 of a group, each by as many lanes as a head has eights. */
template <int HEADS, typename Kept>
INLINE void look(const float *queries, const Cache<Kept> &keys, const Cache<Kept> &values, int group, int size,
                 int lanes, int first, int end, Found (&found)[HEADS]) {
    const int column = threadIdx.x % lanes * 8, own = threadIdx.x / lanes, step = THREADS / lanes;
    const bool mine = column < size;
    float q[HEADS][8], scores[HEADS][AHEAD];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        found[h] = Found{LOWEST, 0, {}};
#pragma unroll
        for (int j = 0; j < 8; j++) q[h][j] = mine ? queries[h * MOST_SIZE + column + j] : 0;
    }
    /* All lanes make the same number of turns: an exchange needs every one of them. */
    for (int token = first; token < end; token += AHEAD * step) {
        Values seen;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            seen.there[i] = token + i * step + own < end;
            const size_t place = keys.place(group, seen.there[i] ? token + i * step + own : end - 1);
            const size_t at = place * size + (mine ? column : 0);
            const Eight key = load_eight(keys.numbers + at);
            seen.of[i] = load_eight(values.numbers + at), seen.scale[i] = scale_at(values, place);
#pragma unroll
            for (int h = 0; h < HEADS; h++) scores[h][i] = dot(q[h], key) * scale_at(keys, place);
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                for (int apart = lanes / 2; apart; apart /= 2) scores[h][i] += lane_across(scores[h][i], apart);
            found[h].add(scores[h], seen);
        }
    }
}

/* Lay down what a warp has found for a head, as a part: the largest score, the sum of weights, all columns. */
INLINE void lay_down(Found &found, float *part, int size, int lanes) {
    const int column = threadIdx.x % 32 * 8;
    found.join(lanes);
    if (column >= size) return;
    part[0] = found.largest, part[1] = found.sum;
#pragma unroll
    for (int j = 0; j < 8; j++) part[2 + column + j] = found.values[j];
}

/* Of one head: the largest score, the sum of the weights, and one column. */
struct Column {
    float largest, sum, value;
};

/* Column c of `count` parts put together, `step` floats from one to the next. Volatile: other blocks wrote them. */
INLINE Column joined(const volatile float *parts, int step, int count, int c) {
    Column all = {LOWEST, 0, 0};
    for (int i = 0; i < count; i++) all.largest = fmaxf(all.largest, parts[i * step]);
    for (int i = 0; i < count; i++) {
        const float weight = exp2f(parts[i * step] - all.largest);
        all.sum += weight * parts[i * step + 1];
        all.value += weight * parts[i * step + 2 + c];
    }
    return all;
}

/* Whether this block is the last of its tile's `count` to come here, and sees what the others have written. */
INLINE bool is_last(int *tickets, int count) {
    SHARED(int, last, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(tickets + blockIdx.x, 1) == count - 1;
        if (*last) tickets[blockIdx.x] = 0; /* as the next launch wants it */
    }
    __syncthreads();
    __threadfence();
    return *last;
}

/* What a block looks at: query heads first_head.. of a group, tokens first..end-1 of `tokens` so far. */
template <int HEADS> struct Share {
    int group, first_head, heads, first, end, splits; /* splits: that there is something to do for */

    __device__ Share(const Row &row, int tokens) {
        const int sharing = row.heads / row.groups, tiles = (sharing + HEADS - 1) / HEADS; /* of one group */
        const int from = blockIdx.x % tiles * HEADS, wide = (tokens + gridDim.y - 1) / gridDim.y;
        const int chunk = max(wide, LEAST_CHUNK);
        group = blockIdx.x / tiles, first_head = group * sharing + from, heads = min(HEADS, sharing - from);
        splits = (tokens + chunk - 1) / chunk, first = blockIdx.y * chunk, end = min(first + chunk, tokens);
    }
};

/* parts: [heads, splits, 2 + size]. tickets: [tiles], all 0. grid: tiles, splits. */
template <int HEADS, typename Kept>
INLINE void attend(const Row &row, const Cache<Kept> &keys, const Cache<Kept> &values, int tokens, float *parts,
                   int *tickets, T *out) {
    SHARED(float, queries, HEADS * MOST_SIZE);
    SHARED(float, by_warp, WARPS * HEADS * (2 + MOST_SIZE));
    const Share<HEADS> share(row, tokens);
    if (share.first >= tokens) return;
    const int size = row.size, warp = threadIdx.x / 32;
    const float scale = LOG2E * rsqrtf((float)size);
    for (int at = threadIdx.x; at < HEADS * size; at += THREADS) {
        const int h = at / size, c = at % size;
        queries[h * MOST_SIZE + c] = h < share.heads ? turned(row, row.query(share.first_head + h), c) * scale : 0;
    }
    if (share.end == tokens) keep_token(row, keys, values, share.group, tokens - 1);
    __syncthreads();

    int lanes = 1;
    while (lanes * 8 < size) lanes *= 2;
    Found found[HEADS];
    look(queries, keys, values, share.group, size, lanes, share.first, share.end, found);
#pragma unroll
    for (int h = 0; h < HEADS; h++) lay_down(found[h], by_warp + (warp * HEADS + h) * (2 + MOST_SIZE), size, lanes);
    __syncthreads();

    const int stride = 2 + size; /* from split to split */
    float *of_tile = parts + (size_t)share.first_head * gridDim.y * stride;
    out += share.first_head * size;
    for (int at = threadIdx.x; at < share.heads * size; at += THREADS) {
        const int h = at / size, c = at % size;
        const Column all = joined(by_warp + h * (2 + MOST_SIZE), HEADS * (2 + MOST_SIZE), WARPS, c);
        float *part = of_tile + (h * gridDim.y + blockIdx.y) * stride;
        if (share.splits == 1) out[at] = narrow(all.value / all.sum);
        else part[0] = all.largest, part[1] = all.sum, part[2 + c] = all.value;
    }
    if (share.splits == 1 || !is_last(tickets, share.splits)) return;
    for (int at = threadIdx.x; at < share.heads * size; at += THREADS) {
        const Column all = joined(of_tile + at / size * gridDim.y * stride, stride, share.splits, at % size);
        out[at] = narrow(all.value / all.sum);
    }
}

#define ATTEND(name, HEADS, Kept)                                                                                    \
    KERNEL(name, (const T *numbers, const T *cosine, const T *sine, const int *place, int front, Kept *keys,         \
                  Kept *values, half_t *key_scale, half_t *value_scale, int capacity, int heads, int groups,         \
                  int size, int beside, float *parts, int *tickets, T *out)) {                                       \
        const int angles = *place * (beside ? size / 2 : size / 4), tokens = front + *place + 1;                     \
        const Cache<Kept> k = {keys, key_scale, capacity}, v = {values, value_scale, capacity};                      \
        Row row = {numbers, cosine + angles, sine + angles, heads, groups, USUAL_SIZE, beside};                      \
        if (size == USUAL_SIZE) { /* the same, with shifts for divisions */                                          \
            attend<HEADS>(row, k, v, tokens, parts, tickets, out);                                                   \
        } else {                                                                                                     \
            row.size = size;                                                                                         \
            attend<HEADS>(row, k, v, tokens, parts, tickets, out);                                                   \
        }                                                                                                            \
    }

/* One head of queries for each of keys (ChatGLM-6B), or several. */
ATTEND(attend, 1, T)
ATTEND(attend_int8, 1, signed char)
ATTEND(attend_shared, 4, T)
ATTEND(attend_shared_int8, 4, signed char)
