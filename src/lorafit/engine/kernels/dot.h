// What products in bfloat16 and int8 share: registers, and the tile that sums along the inner dimension.
//
// HAS_DOT: whether the processor has AVX-512 with VNNI and BF16.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define HAS_DOT 1

namespace {

using bf16 = uint16_t;

constexpr int LANES = 16;             // 32-bit cells of a register
constexpr int ROWS = 6, VECTORS = 4;  // a tile: 24 of the 32 registers hold its sums

#define INLINE inline __attribute__((always_inline))

// repeat<N>(EACH(i) { .. }): the body for i = 0 .. N - 1, each a constant, so that the arrays it indexes live in registers.
// An unrolled loop is not enough: GCC decides which arrays do before it unrolls.
#define EACH(i) [&](auto i) __attribute__((always_inline))
template <int N, typename F>
INLINE void repeat(F&& f) {
    if constexpr (N > 0) {
        repeat<N - 1>(f);
        f(std::integral_constant<int, N - 1>{});
    }
}

INLINE __m512 widen(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE __m256i round_cells(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE void narrow(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, round_cells(x)); }
INLINE __m512i broadcast(const void* cell) {
    int32_t value;
    std::memcpy(&value, cell, 4);
    return _mm512_set1_epi32(value);
}

// e^x to 6e-6 relative, for x in -87 .. 88: for results in bfloat16, whose steps are 4e-3. As 2^k 2^r, r in -1/2 .. 1/2,
// with the polynomial of degree 4 whose largest relative error is least, 2.6e-6; the rest is the rounding of x log2(e).
constexpr float POLY[] = {0.999999261f, 0.693121815f, 0.240247449f, 0.0559178621f, 0.00957010164f};
INLINE __m512 exponential(__m512 x) {
    // Of two operands one of which is not a number, these give the second.
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    const __m512 k = _mm512_roundscale_ps(t, 0), r = _mm512_sub_ps(t, k);
    __m512 p = _mm512_set1_ps(POLY[4]);
    for (int i = 3; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(POLY[i]));
    return _mm512_scalef_ps(p, k);
}

// 1 / (1 + e^-x), by a reciprocal of 14 bits.
INLINE __m512 sigmoid(__m512 x) {
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Two rows' cells side by side, as a product along their dimension wants them: 16 pairs.
INLINE __m512i pair_up(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// The operand of a product along `depth`: blocks of 16 columns, each [depth / 2][16 columns][2], so that one register
// holds 16 columns' pairs of neighbours along depth. `block`: elements from one block to the next.
//
// sums[row][vector] += rows[row][0 .. depth) . operand. step: elements from one pair of a row to the next.
template <int R, int V>
INLINE void dot_bf16(__m512 (&sums)[R][V], const bf16* const (&rows)[R], const bf16* operand, int64_t block,
                     int64_t depth, int64_t step = 2) {
    for (int64_t d = 0, at = 0; d < depth; d += 2, at += step) {
        __m512i columns[V];
        repeat<V>(EACH(v) { columns[v] = _mm512_loadu_si512(operand + v * block + d * LANES); });
        repeat<R>(EACH(r) {
            const __m512bh cell = (__m512bh)broadcast(rows[r] + at);
            repeat<V>(EACH(v) { sums[r][v] = _mm512_dpbf16_ps(sums[r][v], cell, (__m512bh)columns[v]); });
        });
    }
}

template <int R, int V>
INLINE void clear(__m512 (&sums)[R][V]) {
    repeat<R>(EACH(r) { repeat<V>(EACH(v) { sums[r][v] = _mm512_setzero_ps(); }); });
}

// work(v, c) for blocks of 16 columns from `first` to `end`, v of them at a time: 4 while they last, then 2, then 1.
template <typename F>
INLINE void by_blocks(int64_t first, int64_t end, F&& work) {
    int64_t c = first;
    for (; c + 4 * LANES <= end; c += 4 * LANES) work(std::integral_constant<int, 4>{}, c);
    for (; c + 2 * LANES <= end; c += 2 * LANES) work(std::integral_constant<int, 2>{}, c);
    for (; c < end; c += LANES) work(std::integral_constant<int, 1>{}, c);
}

// Rows first, first + 1, .. of x; where there are fewer than R, the last one again.
template <typename T, int R>
INLINE void row_pointers(const T* (&rows)[R], const T* x, int64_t stride, int64_t first, int64_t n) {
    repeat<R>(EACH(r) { rows[r] = x + (first + r < n ? first + r : n - 1) * stride; });
}

}  // namespace

#else
#define HAS_DOT 0
#endif
