/* Quantised matrices on a card:  y = x W^T * scale + bias  for a few rows of x, and W * scale in 16 bits.
 *
 * W lies as packing.py tells: a row's columns behind one another, in bytes or (4 bits) two in a byte. One token reads
 * each weight once, so memory is the limit, and everything here is for keeping it busy: a lane reads 16 bytes at a time
 * ("a piece": 32 or 16 columns) of four rows, and is two such steps ahead of what it computes. Nothing is packed anew;
 * what would be the packing's work is done by where x lies in shared memory.
 *
 * A weight costs 3.8 instructions in 4 bits and 4.2 in 8, counted in the machine code for one row of x: three to set
 * its bits into a float (value), less what the float has too much, times x; the rest is for x, addresses and the loop.
 * While a weight of 4 bits comes from memory, an H100 has time for 4.4, cards with 6 GB for 8 and more. Eight rows of x
 * cost 17 a weight: by calculation, less than half the time in which a widened W is written and read for cuBLAS.
 * Nothing is rounded but the sums, in float32. */
#include "device.cuh"

enum { OCTET = 8 /* columns: their x is 16 bytes */, THREADS = 256 };

/* The signed number of so many bits at a place below bit 16. Set into the lowest bits of a float with the exponent that
 * makes these bits whole numbers, its sign bit turned round, it counts from the lowest number up. */
template <int BITS> INLINE float value(word bits, int place) {
    const word mask = ((1u << BITS) - 1) << place;
    const word zero = (word)(150 - place) << 23 | (1u << (BITS - 1)) << place; /* the float that stands for 0 */
    return as_float(masked(bits, mask, zero)) - as_float(zero);
}

/* Column c of an octet. 4 bits: in a word, the even one of two in the upper half of a byte. 8 bits: in two words. */
template <int BITS> INLINE float column_of(const word *octet, int c) {
    const int place = BITS == 4 ? 4 * (c ^ 1) : 8 * (c % 4);
    return value<BITS>(octet[BITS == 4 ? 0 : c / 4] >> place / 16 * 16, place % 16);
}

/* Column c of a row, in the simple way. */
INLINE float column_at(const unsigned char *row, word c, word bits) {
    if (bits == 8) return (signed char)row[c];
    return (signed char)(c % 2 ? row[c / 2] << 4 : row[c / 2]) >> 4;
}

/* x [count, columns], W [rows, columns] and scale [rows, groups], y [count, rows]. bias: [rows] or null. */
struct Job {
    const T *x;
    const uint4 *weight;
    const half_t *scale;
    const T *bias;
    T *y;
    word count, columns, rows, groups;
    word chunk; /* pieces of a row of x in shared memory at a time: all, or a multiple of 64 * blockDim.y */
};

/* Where in shared memory the octets of x lie: as in x, but each 128 bytes turned about, so that eight lanes, whose
 * octets are a piece apart, find theirs in different banks. */
template <int OCTETS> INLINE word seat(word octet) { return octet ^ octet / 8 % OCTETS; }

/* A piece of each of a lane's rows, and their scales where a row has several. */
template <int ROWS> struct Pieces {
    word words[ROWS][4];
    half_t scales[ROWS];
};

/* A lane's part of M rows of x times some rows of W. */
template <int BITS, int M> struct Products {
    static constexpr int OCTETS = 128 / BITS / OCTET; /* in a piece */
    static constexpr int ROWS = M == 1 ? 4 : 2;       /* that x is read once for; more take too many registers */

    const Job &job;
    const word pieces, width; /* of a row, of a group */
    word rows[ROWS];          /* the last one again, where there are no more */
    float sums[ROWS][M] = {};

    INLINE Products(const Job &job, word first_row)
        : job(job), pieces(job.columns / (OCTETS * OCTET)), width(pieces / job.groups) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) rows[r] = min(first_row + r, job.rows - 1);
    }

    INLINE void fetch(Pieces<ROWS> &to, word piece) const {
        if (piece >= pieces) return;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint4 read = read_once(job.weight + (rows[r] * pieces + piece));
            to.words[r][0] = read.x, to.words[r][1] = read.y, to.words[r][2] = read.z, to.words[r][3] = read.w;
        }
        if (job.groups == 1) return;
        const word group = piece / width;
#pragma unroll
        for (int r = 0; r < ROWS; r++) to.scales[r] = job.scale[rows[r] * job.groups + group];
    }

    /* x: octets in shared memory, the next row of it `step` further. piece: counted from where they begin. */
    INLINE void multiply(const Pieces<ROWS> &with, const uint4 *x, word step, word piece) {
        float parts[ROWS][M] = {};
        const word first = piece * OCTETS, turn = seat<OCTETS>(first) - first;
#pragma unroll
        for (int i = 0; i < OCTETS; i++) {
            float w[ROWS][OCTET];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < OCTET; c++) w[r][c] = column_of<BITS>(with.words[r] + i * BITS / 4, c);
#pragma unroll
            for (int m = 0; m < M; m++) {
                const uint4 octet = x[m * step + first + (i ^ turn)];
                const word pairs[4] = {octet.x, octet.y, octet.z, octet.w};
#pragma unroll
                for (int c = 0; c < OCTET; c++) {
                    const float number = c % 2 ? second_of(pairs[c / 2]) : first_of(pairs[c / 2]);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) parts[r][m] = fmaf(w[r][c], number, parts[r][m]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float factor = job.groups == 1 ? 1 : widen(with.scales[r]);
#pragma unroll
            for (int m = 0; m < M; m++) sums[r][m] = fmaf(factor, parts[r][m], sums[r][m]);
        }
    }
};

/* A chunk of M rows of x into shared memory, by the whole block; zeros for rows that x does not have. */
template <int OCTETS, int M>
INLINE void bring(const Job &job, uint4 *stage, word first_piece, word pieces, word thread, word threads) {
    for (word m = 0; m < M; m++) {
        const uint4 *const from = (const uint4 *)(job.x + m * job.columns) + first_piece * OCTETS;
        uint4 *const to = stage + m * job.chunk * OCTETS;
        for (word octet = thread; octet < pieces * OCTETS; octet += threads)
            to[seat<OCTETS>(octet)] = m < job.count ? from[octet] : uint4{0, 0, 0, 0};
    }
}

/* A block's rows, from what each of the warps along a row has: totals [row, m, warp]. */
template <int M> INLINE void finish(const Job &job, const float *totals, word first_row, word rows, word thread) {
    for (word i = thread; i < rows * M; i += THREADS) {
        const word row = first_row + i / M, m = i % M;
        if (row >= job.rows || m >= job.count) continue;
        float total = 0;
        for (word warp = 0; warp < blockDim.y; warp++) total += totals[i * blockDim.y + warp];
        if (job.groups == 1) total *= widen(job.scale[row]);
        job.y[m * job.rows + row] = narrow(job.bias ? total + widen(job.bias[row]) : total);
    }
}

/* A block is 32 lanes, warps that share a row's columns (y) and warps with rows of their own (z). count <= M; groups
 * are whole pieces, and x and W begin at a multiple of 16 bytes. */
template <int BITS, int M> INLINE void linear(const Job &job) {
    typedef Products<BITS, M> Mine;
    DYNAMIC_SHARED(uint4, stage);
    const word lane = threadIdx.x, along = blockDim.y, across = blockDim.z, warp = threadIdx.y + along * threadIdx.z;
    const word first_row = blockIdx.x * across * Mine::ROWS, thread = 32 * warp + lane, threads = 32 * along * across;
    const word stride = 32 * along;
    Mine mine(job, first_row + threadIdx.z * Mine::ROWS);
    Pieces<Mine::ROWS> ahead[2];
    word piece = 32 * threadIdx.y + lane;
    mine.fetch(ahead[0], piece);
    mine.fetch(ahead[1], piece + stride);

    for (word start = 0; start < mine.pieces; start += job.chunk) {
        const word end = min(start + job.chunk, mine.pieces);
        if (start) __syncthreads();
        bring<Mine::OCTETS, M>(job, stage, start, end - start, thread, threads);
        __syncthreads();
        while (piece < end) {
#pragma unroll
            for (int k = 0; k < 2; k++, piece += stride) {
                if (piece < end) mine.multiply(ahead[k], stage, job.chunk * Mine::OCTETS, piece - start);
                mine.fetch(ahead[k], piece + 2 * stride);
            }
        }
    }

    __syncthreads();
    float *const totals = (float *)stage;
#pragma unroll
    for (int r = 0; r < Mine::ROWS; r++)
#pragma unroll
        for (int m = 0; m < M; m++) {
            const float total = warp_sum(mine.sums[r][m]);
            if (lane == 0) totals[((threadIdx.z * Mine::ROWS + r) * M + m) * along + threadIdx.y] = total;
        }
    __syncthreads();
    finish<M>(job, totals, first_row, across * Mine::ROWS, thread);
}

#define LINEAR(bits, m, blocks)                                                                                        \
    KERNEL_IN_BLOCKS(THREADS, blocks, linear_##bits##_##m,                                                             \
                     (const T *x, const uint4 *weight, const half_t *scale, const T *bias, T *y, word count,           \
                      word columns, word rows, word groups, word chunk)) {                                             \
        linear<bits, m>(Job{x, weight, scale, bias, y, count, columns, rows, groups, chunk});                          \
    }
LINEAR(4, 1, 3)
LINEAR(4, 2, 3)
LINEAR(4, 4, 2)
LINEAR(4, 8, 2)
LINEAR(8, 1, 3)
LINEAR(8, 2, 3)
LINEAR(8, 4, 2)
LINEAR(8, 8, 2)

/* The same for any shape, a warp for each row. */
KERNEL(linear_any, (const T *x, const unsigned char *weight, const half_t *scale, const T *bias, T *y, word count,
                    word columns, word rows, word groups, word bits)) {
    const word row = blockIdx.x * blockDim.y + threadIdx.y, width = columns / groups;
    if (row >= rows) return;
    const unsigned char *const mine = weight + (size_t)row * (bits == 8 ? columns : (columns + 1) / 2);
    for (word m = 0; m < count; m++) {
        float sum = 0;
        for (word c = threadIdx.x; c < columns; c += 32) {
            const float w = column_at(mine, c, bits) * widen(scale[row * groups + c / width]);
            sum = fmaf(w, widen(x[m * columns + c]), sum);
        }
        sum = warp_sum(sum);
        if (threadIdx.x == 0) y[m * rows + row] = narrow(bias ? sum + widen(bias[row]) : sum);
    }
}

/* W * scale in T, an octet for each thread. Blocks: a row each (x), parts of it (y). Groups are whole octets. */
template <int BITS>
INLINE void widen_octet(const word *weight, const half_t *scale, uint4 *out, word columns, word groups) {
    const word row = blockIdx.x, octets = columns / OCTET, octet = blockIdx.y * blockDim.x + threadIdx.x;
    if (octet >= octets) return;
    const size_t place = (size_t)row * octets + octet;
    const float factor = widen(scale[row * groups + octet / (octets / groups)]);
    word words[BITS / 4], pairs[4];
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) words[i] = weight[place * (BITS / 4) + i];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = pair_of(factor * column_of<BITS>(words, 2 * i), factor * column_of<BITS>(words, 2 * i + 1));
    out[place] = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

#define WIDEN(bits)                                                                                                    \
    KERNEL(widen_##bits, (const word *weight, const half_t *scale, uint4 *out, word columns, word groups)) {           \
        widen_octet<bits>(weight, scale, out, columns, groups);                                                        \
    }
WIDEN(4)
WIDEN(8)

/* The same for any shape, a column for each thread. */
KERNEL(widen_any, (const unsigned char *weight, const half_t *scale, T *out, word columns, word groups, word bits)) {
    const word row = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= columns) return;
    const unsigned char *const mine = weight + (size_t)row * (bits == 8 ? columns : (columns + 1) / 2);
    const float factor = widen(scale[row * groups + c / (columns / groups)]);
    out[(size_t)row * columns + c] = narrow(factor * column_at(mine, c, bits));
}
