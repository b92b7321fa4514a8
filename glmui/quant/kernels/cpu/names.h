/* One source, many processors: template.h is included once for each target, and every name below then
 * stands for that target's own function: `dot4` is dot4_avx2 while SUFFIX is avx2. */
#ifndef GLMUI_NAMES_H
#define GLMUI_NAMES_H

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(x) PASTE(x, SUFFIX)
#define STRING_(...) #__VA_ARGS__
#define STRING(x) STRING_(x)

/* Operations every vec_*.h defines on VF (LANES floats) and VI (LANES 32-bit integers). */
#define load_f NAME(load_f)     /* const float *           -> VF                                    */
#define store_f NAME(store_f)   /* float *, VF                                                      */
#define load_i NAME(load_i)     /* const void *            -> VI                                    */
#define load_h NAME(load_h)     /* const uint16_t *        -> VF, out of IEEE half precision        */
#define load_b NAME(load_b)     /* const uint16_t *        -> VF, out of bfloat16                   */
#define set_f NAME(set_f)       /* float                   -> VF, the same in each lane             */
#define set_i NAME(set_i)       /* int32_t                 -> VI                                    */
#define mul_f NAME(mul_f)       /* VF, VF                  -> VF                                    */
#define add_f NAME(add_f)       /* VF, VF                  -> VF                                    */
#define fma_f NAME(fma_f)       /* VF a, b, c              -> a * b + c                             */
#define sum_f NAME(sum_f)       /* VF                      -> float, the lanes' sum                 */
#define to_f NAME(to_f)         /* VI                      -> VF                                    */
#define add_i NAME(add_i)       /* VI, VI                  -> VI                                    */
#define sum_i NAME(sum_i)       /* VI                      -> int32_t, the lanes' sum               */
#define weight4 NAME(weight4)   /* VI w, int k             -> VF, the k-th of 8 INT4 in each lane   */
#define weight8 NAME(weight8)   /* VI w, int k             -> VF, the k-th of 4 INT8 in each lane   */
#define low_nibbles NAME(low_nibbles)   /* VI -> VI, the bytes of columns 0-3 of INT4 + 8             */
#define high_nibbles NAME(high_nibbles) /* VI -> VI, those of columns 4-7                           */
#define add_products NAME(add_products)
#define dot4 NAME(dot4) /* VI acc, low, high, x 0-3, x 4-7 -> acc + 8 products a lane, INT4 + 8     */
#define dot8 NAME(dot8) /* VI acc, w, x                    -> acc + 4 products a lane, INT8 + BIAS8 */

/* Functions template.h defines with them. */
#define tile_exact NAME(tile_exact)
#define tile_quantized NAME(tile_quantized)
#define tile NAME(tile)
#define tiles NAME(tiles)
#define multiply NAME(multiply)
#define write_rows NAME(write_rows)
#define quantize_block NAME(quantize_block)
#define whole_numbers NAME(whole_numbers)
#define prepare NAME(prepare)
#define half_tile NAME(half_tile)
#define half_rows NAME(half_rows)
#define read_all NAME(read_all)

/* Functions attention.h defines with them. */
#define load_kept NAME(load_kept)
#define look_ahead_kept NAME(look_ahead_kept)
#define score NAME(score)
#define add_columns NAME(add_columns)
#define add_values NAME(add_values)
#define weigh NAME(weigh)
#define look NAME(look)
#define attend_to_chunk NAME(attend_to_chunk)
#define attend_chunks NAME(attend_chunks)

/* Functions small.h defines. */
#define gelu_blocks NAME(gelu_blocks)
#define rotate_rows NAME(rotate_rows)

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 32")

/* Compile what stands between for a processor that has `features`, whatever the compiler's own default. */
#if defined(__clang__)
#define BEGIN_TARGET(features) \
    _Pragma(STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(features) _Pragma("GCC push_options") _Pragma(STRING(GCC target(features)))
#define END_TARGET _Pragma("GCC pop_options")
#endif

#endif
