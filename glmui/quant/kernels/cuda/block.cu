/* What stands between the linear layers of a block, besides attention: norms with the residual, activations.
 * Everything is computed in float32; only the ends are rounded. */

#include "eight.cuh"

/* The sum of x over all threads of the block, for each of them. */
INLINE float block_sum(float x) {
    SHARED(float, sums, 32);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_sum(x);
    __syncthreads(); /* the last sum has been read */
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < (int)blockDim.x / 32 ? sums[lane] : 0);
}

/* out = norm(x + alpha residual) of a row [columns], a block for each row, 8 columns for each thread. With a bias
 * LayerNorm, without one RMSNorm. residual may be null; sum, where it is not, gets x + alpha residual. Any of the
 * outputs may be any of the inputs. */
KERNEL(norm, (T *out, T *sum, const T *x, const T *residual, float alpha, const T *weight, const T *bias,
              int columns, float eps)) {
    const int c = threadIdx.x * 8;
    const size_t at = (size_t)blockIdx.x * columns + c;
    const bool mine = c < columns;
    Eight all = {};
    if (mine) {
        all = load_eight(x + at);
        if (residual) {
            const Eight r = load_eight(residual + at);
#pragma unroll
            for (int j = 0; j < 8; j++) all.of[j] += alpha * r.of[j];
        }
        if (sum) store_eight(sum + at, all);
    }
    float total = 0, squares = 0;
    if (bias) {
#pragma unroll
        for (int j = 0; j < 8; j++) total += all.of[j];
        total = block_sum(total);
    }
    const float mean = total / columns;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        all.of[j] = mine ? all.of[j] - mean : 0;
        squares += all.of[j] * all.of[j];
    }
    const float scale = rsqrtf(block_sum(squares) / columns + eps);
    if (!mine) return;
    const Eight w = load_eight(weight + c);
    Eight b = {};
    if (bias) b = load_eight(bias + c);
#pragma unroll
    for (int j = 0; j < 8; j++) all.of[j] = all.of[j] * scale * w.of[j] + b.of[j];
    store_eight(out + at, all);
}

/* GELU in its tanh form. out may be x. */
KERNEL(gelu, (T *out, const T *x, int count)) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float v = widen(x[i]);
    out[i] = narrow(0.5f * v * (1 + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v))));
}

/* silu of a row's first half times its second: x [rows, 2 columns] to out [rows, columns]; grid: columns, rows. */
KERNEL(swiglu, (T *out, const T *x, int columns)) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= columns) return;
    const T *row = x + (size_t)blockIdx.y * 2 * columns;
    const float gate = widen(row[c]);
    out[(size_t)blockIdx.y * columns + c] = narrow(gate / (1 + expf(-gate)) * widen(row[columns + c]));
}
