// Matrix products of a frozen weight in int8, and the narrow ones of its low-rank update in bfloat16.
//
// Both accumulate in registers along the whole inner dimension: a tile of ROWS rows by 64 columns stays in 24 registers,
// a row's cell is broadcast against a packed operand. So a product's scaling and its low-rank sum cost no pass over
// memory of their own, and every sum has one fixed order, whatever the number of threads.
//
// Needs AVX-512 with VNNI and BF16 (`int8_products`, `low_rank_products` say what was compiled). With AMX, oneDNN's int8
// product is several times faster than VNNI can be, so then there is none here.

#include "dot.h"

#include <algorithm>
#include <cmath>
#include <omp.h>

#if HAS_DOT && !defined(__AMX_INT8__)
EXPORT int int8_products() { return 1; }
#else
EXPORT int int8_products() { return 0; }
#endif
EXPORT int low_rank_products() { return HAS_DOT; }

#if HAS_DOT

namespace {

constexpr int PANEL = LANES * VECTORS;
constexpr int64_t CHUNK_BYTES = 384 << 10;  // of quantized rows that stay in a core's L2 beside a panel of the weight

constexpr int64_t PIECES = 12;  // of a product for each thread, at least

// --- narrow products ------------------------------------------------------------------------------------------------

template <int R, int V>
void narrow_tile(const bf16* x, int64_t stride, int64_t n, int64_t depth, const bf16* operand, bf16* y,
                 int64_t y_stride) {
    const bf16* rows[R];
    row_pointers(rows, x, stride, 0, n);
    __m512 sums[R][V];
    clear(sums);
    dot_bf16(sums, rows, operand, depth * LANES, depth);
    repeat<R>(EACH(r) {
        if (r < n) repeat<V>(EACH(v) { narrow(y + r * y_stride + v * LANES, sums[r][v]); });
    });
}

// Layers whose update has columns of its own: [first_column, +columns) of y by [first_rank, +ranks) of h.
struct Span {
    int64_t first_column, columns, first_rank, ranks;
    int64_t offset;  // where its operand begins
};

// Adds h B^T to one tile of y, held in registers.
template <int R>
INLINE void add_update(__m512 (&y)[R][VECTORS], int64_t first_column, const bf16* const (&h)[R], const bf16* operand,
                       const Span* spans, int64_t count) {
    for (int64_t s = 0; s < count; ++s) {
        const Span& at = spans[s];
        const int64_t last = at.first_column + at.columns;
        if (first_column >= last || first_column + PANEL <= at.first_column) continue;
        const bf16* ranks[R];
        repeat<R>(EACH(r) { ranks[r] = h[r] + at.first_rank; });
        const int64_t block = at.ranks * LANES;
        const bf16* begin = operand + at.offset + (first_column - at.first_column) / LANES * block;
        if (first_column >= at.first_column && first_column + PANEL <= last) {
            dot_bf16<R, VECTORS>(y, ranks, begin, block, at.ranks);
            continue;
        }
        repeat<VECTORS>(EACH(v) {  // a panel that two layers share
            const int64_t column = first_column + v * LANES;
            if (column < at.first_column || column >= last) return;
            __m512 part[R][1];
            repeat<R>(EACH(r) { part[r][0] = y[r][v]; });
            dot_bf16<R, 1>(part, ranks, begin + v * block, block, at.ranks);
            repeat<R>(EACH(r) { y[r][v] = part[r][0]; });
        });
    }
}

// Rows `first` .. of a tile into y: (n, width), its columns from `column` on.
INLINE void write_tile(const __m512 (&out)[ROWS][VECTORS], bf16* y, int64_t stride, int64_t first, int64_t n,
                       int64_t column, int64_t width) {
    repeat<ROWS>(EACH(r) {
        if (first + r >= n) return;
        repeat<VECTORS>(EACH(v) {
            if (column + v * LANES < width) narrow(y + (first + r) * stride + column + v * LANES, out[r][v]);
        });
    });
}

// --- int8 -------------------------------------------------------------------------------------------------------------

// q = round(x * columns / scale), scale = max |x * columns| / 127; offset = 128 * the sum of q. A cell that is not a
// number, which no q can be, makes the scale, and so the whole row of the product, not a number.
inline void quantize_row(const bf16* x, const float* columns, int8_t* q, float* scale, int32_t* offset, int64_t width) {
    __m512 top = _mm512_setzero_ps();
    __mmask16 no_number = 0;
    for (int64_t j = 0; j < width; j += LANES) {
        __m512 cells = widen(x + j);
        if (columns) cells = _mm512_mul_ps(cells, _mm512_loadu_ps(columns + j));
        no_number |= _mm512_cmp_ps_mask(cells, cells, _CMP_UNORD_Q);
        top = _mm512_max_ps(top, _mm512_abs_ps(cells));
    }
    const float largest = _mm512_reduce_max_ps(top);
    *scale = no_number ? NAN : largest / 127.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < width; j += LANES) {
        __m512 cells = widen(x + j);
        if (columns) cells = _mm512_mul_ps(cells, _mm512_loadu_ps(columns + j));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(cells, inverse));
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128((__m128i*)(q + j), _mm512_cvtsepi32_epi8(whole));
    }
    *offset = 128 * _mm512_reduce_add_epi32(sum);
}

// sum += products of four unsigned bytes with four signed ones, in each 32-bit cell. By hand: of the intrinsic, GCC 12
// keeps copies of the sums, runs out of registers and halves the speed.
INLINE void add_products(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

// ROWS rows by one panel. The weight is stored as w + 128, unsigned, as the instruction wants one of the two to be.
INLINE void int8_tile(const int8_t* const (&rows)[ROWS], const uint8_t* panel, int64_t depth,
                      __m512i (&sums)[ROWS][VECTORS]) {
    for (int64_t d = 0; d < depth; d += 4, panel += 4 * PANEL) {
        __m512i columns[VECTORS];
        repeat<VECTORS>(EACH(v) { columns[v] = _mm512_loadu_si512(panel + v * 64); });
        repeat<ROWS>(EACH(r) {
            const __m512i cell = broadcast(rows[r] + d);
            repeat<VECTORS>(EACH(v) { add_products(sums[r][v], columns[v], cell); });
        });
    }
}

struct Quantized {
    const int8_t* q;
    const float* scales;
    const int32_t* offsets;
    int64_t n, depth;
};
struct Weight {
    const uint8_t* packed;
    const float* scales;  // (panels * 64,)
    int64_t columns;
};
struct Update {
    const bf16* h;
    int64_t stride;
    const bf16* operand;
    const Span* spans;
    int64_t count;
};

void product_tile(const Quantized& x, const Weight& weight, const Update& update, int64_t first, int64_t panel,
                  bf16* y, int64_t stride) {
    const int8_t* rows[ROWS];
    row_pointers(rows, x.q, x.depth, first, x.n);
    __m512i sums[ROWS][VECTORS];
    repeat<ROWS>(EACH(r) { repeat<VECTORS>(EACH(v) { sums[r][v] = _mm512_setzero_si512(); }); });
    int8_tile(rows, weight.packed + panel * PANEL * x.depth, x.depth, sums);
    const int64_t column = panel * PANEL;
    __m512 scales[VECTORS], out[ROWS][VECTORS];
    repeat<VECTORS>(EACH(v) { scales[v] = _mm512_loadu_ps(weight.scales + column + v * LANES); });
    repeat<ROWS>(EACH(r) {
        const int64_t i = first + r < x.n ? first + r : x.n - 1;
        const __m512i offset = _mm512_set1_epi32(x.offsets[i]);
        const __m512 scale = _mm512_set1_ps(x.scales[i]);
        repeat<VECTORS>(EACH(v) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][v], offset));
            out[r][v] = _mm512_mul_ps(sum, _mm512_mul_ps(scale, scales[v]));
        });
    });
    if (update.count) {
        const bf16* h[ROWS];
        row_pointers(h, update.h, update.stride, first, x.n);
        add_update<ROWS>(out, column, h, update.operand, update.spans, update.count);
    }
    write_tile(out, y, stride, first, x.n, column, weight.columns);
}

// A panel's place for the cell (d, column), d along the inner dimension: [panel][depth / 4][64 columns][4].
inline int64_t place(int64_t d, int64_t column, int64_t depth) {
    return column / PANEL * PANEL * depth + d / 4 * 4 * PANEL + column % PANEL * 4 + d % 4;
}

}  // namespace

// w: (outs, ins) contiguous, both multiples of 16. packed: panels * 64 * depth bytes, scales: panels * 64 floats, where
// panels = ceil(operand's columns / 64) and depth is the other dimension. What is beyond the columns must be zeroed.
//
// A scale for every row of w: the operand of x W^T.
EXPORT void pack_rows(const bf16* w, const float* columns, uint8_t* packed, float* scales, int64_t outs, int64_t ins) {
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < outs; ++o) {
        const bf16* row = w + o * ins;
        __m512 top = _mm512_setzero_ps();
        for (int64_t j = 0; j < ins; j += LANES) {
            __m512 cells = widen(row + j);
            if (columns) cells = _mm512_mul_ps(cells, _mm512_loadu_ps(columns + j));
            top = _mm512_max_ps(top, _mm512_abs_ps(cells));
        }
        const float largest = _mm512_reduce_max_ps(top);
        scales[o] = largest / 127.0f;
        const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
        for (int64_t j = 0; j < ins; j += LANES) {
            __m512 cells = widen(row + j);
            if (columns) cells = _mm512_mul_ps(cells, _mm512_loadu_ps(columns + j));
            alignas(16) uint8_t q[LANES];
            const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(cells, inverse)));
            _mm_store_si128((__m128i*)q, _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))));
            for (int64_t d = 0; d < LANES; d += 4) std::memcpy(packed + place(j + d, o, ins), q + d, 4);
        }
    }
}

// A scale for every column of w: the operand of g W.
EXPORT void pack_columns(const bf16* w, uint8_t* packed, float* scales, int64_t outs, int64_t ins) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < ins; j += LANES) {
        __m512 top = _mm512_setzero_ps();
        for (int64_t o = 0; o < outs; ++o) top = _mm512_max_ps(top, _mm512_abs_ps(widen(w + o * ins + j)));
        _mm512_storeu_ps(scales + j, _mm512_mul_ps(top, _mm512_set1_ps(1.0f / 127.0f)));
        const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(127.0f), top);
        for (int64_t o = 0; o < outs; o += 4) {
            __m512i cells = _mm512_setzero_si512();  // four outputs' bytes side by side, for each of 16 inputs
            for (int t = 0; t < 4; ++t) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(widen(w + (o + t) * ins + j), inverse));
                const __m512i byte = _mm512_and_si512(_mm512_add_epi32(whole, _mm512_set1_epi32(128)),
                                                      _mm512_set1_epi32(255));
                cells = _mm512_or_si512(cells, _mm512_sllv_epi32(byte, _mm512_set1_epi32(8 * t)));
            }
            _mm512_storeu_si512(packed + place(o, j, outs), cells);
        }
    }
}

// y = (x * columns) operand + h B^T. x: n rows of `depth`, `stride` apart. columns: (depth,) or null. y: (n, width).
// q: n * depth bytes, row_scales, offsets: n cells each, to work in. Without an update, spans is null and count 0.
EXPORT void int8_product(const bf16* x, int64_t stride, const float* columns, int8_t* q, float* row_scales,
                         int32_t* offsets, int64_t n, int64_t depth, const uint8_t* packed, const float* scales,
                         int64_t width, const bf16* h, int64_t ranks, const bf16* operand, const Span* spans,
                         int64_t count, bf16* y, int64_t y_stride) {
    if (n == 0) return;
    const Quantized rows{q, row_scales, offsets, n, depth};
    const Weight weight{packed, scales, width};
    const Update update{h, ranks, operand, spans, count};
    const int64_t panels = (width + PANEL - 1) / PANEL;
    int64_t chunk = CHUNK_BYTES / depth / ROWS * ROWS;
    if (chunk < ROWS) chunk = ROWS;
    // Enough pieces that the threads end together.
    const int64_t pieces = PIECES * omp_get_max_threads();
    const int64_t chunks = std::max((n + chunk - 1) / chunk, std::min((pieces + panels - 1) / panels, (n + ROWS - 1) / ROWS));
    chunk = ((n + chunks - 1) / chunks + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i)
            quantize_row(x + i * stride, columns, q + i * depth, row_scales + i, offsets + i, depth);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < panels; ++p)
            for (int64_t c = 0; c < chunks; ++c)
                for (int64_t first = c * chunk; first < n && first < (c + 1) * chunk; first += ROWS)
                    product_tile(rows, weight, update, first, p, y, y_stride);
    }
}

// --- the low-rank update ----------------------------------------------------------------------------------------------

namespace {

// One adapted layer of a group. A: (rank, width), B: (at.columns, rank), contiguous; at.ranks is rank padded to 16.
struct Factor {
    Span at;
    const float *A, *B;
    int64_t rank;
    float scale;
};

// Operand whose columns are the rows of `factor` (columns, depth): 16 of them from `block` on, 16 cells from d on.
inline void pack_rows_of(const float* factor, int64_t columns, int64_t depth, int64_t padded_depth, int64_t block,
                         int64_t d, float scale, bf16* operand) {
    for (int64_t c = 0; c < LANES; ++c) {
        const int64_t left = block + c < columns ? depth - d : 0;
        const __mmask16 some = left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __m512 cells = _mm512_maskz_loadu_ps(some, factor + (block + c) * depth + d);
        alignas(32) bf16 pairs[LANES];
        narrow(pairs, _mm512_mul_ps(cells, _mm512_set1_ps(scale)));
        bf16* out = operand + block * padded_depth + d * LANES + c * 2;
        for (int64_t j = 0; j < LANES; j += 2) std::memcpy(out + j * LANES, pairs + j, 4);
    }
}

// Operand whose columns are those of `factor` (depth, columns): its rows d and d + 1, up to `padded` columns. The operand
// is `whole_depth` deep and has this factor from `first` on.
inline void pack_columns_of(const float* factor, int64_t depth, int64_t columns, int64_t padded, int64_t d,
                            int64_t first, int64_t whole_depth, float scale, bf16* operand) {
    for (int64_t c = 0; c < padded; c += LANES) {
        const int64_t left = columns - c;
        const __mmask16 some = left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        __m256i cells[2];
        for (int64_t t = 0; t < 2; ++t) {
            const __mmask16 here = d + t < depth ? some : 0;
            const __m512 row = _mm512_maskz_loadu_ps(here, factor + (d + t) * columns + c);
            cells[t] = round_cells(_mm512_mul_ps(row, _mm512_set1_ps(scale)));
        }
        _mm512_storeu_si512(operand + c * whole_depth + (first + d) * LANES, pair_up(cells[0], cells[1]));
    }
}

constexpr int64_t TALL = 12;  // rows of a narrow product at a time: with one or two registers a row

// y = x operand, for TALL rows. y: `width` columns, a multiple of 16.
inline void narrow_rows(const bf16* x, int64_t stride, int64_t n, int64_t depth, const bf16* operand, int64_t width,
                        bf16* y, int64_t y_stride) {
    for (int64_t c = 0; c < width;) {
        const bf16* block = operand + c * depth;
        if (width - c >= 2 * LANES) {
            narrow_tile<TALL, 2>(x, stride, n, depth, block, y + c, y_stride);
            c += 2 * LANES;
        } else {
            narrow_tile<TALL, 1>(x, stride, n, depth, block, y + c, y_stride);
            c += LANES;
        }
    }
}

// Rows i and i + 1 of a (n, width) side by side, as products along n want them: ((n + 1) / 2, width, 2).
inline void pair_two(const bf16* a, int64_t n, int64_t width, int64_t i, bf16* pairs) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t j = 0; j < width; j += LANES) {
        const __m256i even = _mm256_loadu_si256((const __m256i*)(a + i * width + j));
        const __m256i odd = i + 1 < n ? _mm256_loadu_si256((const __m256i*)(a + (i + 1) * width + j)) : none;
        _mm512_storeu_si512(pairs + i * width + 2 * j, pair_up(even, odd));
    }
}

// out[r, c] = scale * sum over n of a[n, first + r] x[n, c] for 32 columns from c on. pairs: a's, `width_of_pairs` wide.
// out: `by_rank` apart along r, `by_column` along c.
inline void outer_columns(const bf16* pairs, int64_t width_of_pairs, int64_t first, int64_t ranks, const bf16* x,
                          int64_t stride, int64_t n, int64_t width, int64_t c, float scale, float* out,
                          int64_t by_rank, int64_t by_column) {
    constexpr int HIGH = 8, AHEAD = 16;
    const __mmask32 some = width - c >= 2 * LANES ? 0xffffffffu : 0xffffu;
    for (int64_t r = 0; r < ranks; r += HIGH) {
        __m512 sums[HIGH][2];
        clear(sums);
        for (int64_t i = 0; i < n; i += 2) {
            // A row further is a page further: no processor fetches that ahead by itself.
            _mm_prefetch((const char*)(x + (i + AHEAD) * stride + c), _MM_HINT_T0);
            _mm_prefetch((const char*)(x + (i + AHEAD + 1) * stride + c), _MM_HINT_T0);
            const __m512i even = _mm512_maskz_loadu_epi16(some, x + i * stride + c);
            const __m512i odd =
                i + 1 < n ? _mm512_maskz_loadu_epi16(some, x + (i + 1) * stride + c) : _mm512_setzero_si512();
            // Interleaving two rows leaves columns 0-3, 8-11, .. in one register and 4-7, 12-15, .. in the other.
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
            const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
            const bf16* cells = pairs + i * width_of_pairs + 2 * (first + r);
            repeat<HIGH>(EACH(t) {
                const __m512bh cell = (__m512bh)broadcast(cells + 2 * t);
                sums[t][0] = _mm512_dpbf16_ps(sums[t][0], cell, low);
                sums[t][1] = _mm512_dpbf16_ps(sums[t][1], cell, high);
            });
        }
        repeat<HIGH>(EACH(t) {
            if (r + t >= ranks) return;
            alignas(64) float cells[2][LANES];
            repeat<2>(EACH(v) { _mm512_store_ps(cells[v], _mm512_mul_ps(sums[t][v], _mm512_set1_ps(scale))); });
            for (int64_t j = 0; j < 2 * LANES && c + j < width; ++j)
                out[(r + t) * by_rank + (c + j) * by_column] = cells[j / 4 % 2][j / 8 * 4 + j % 4];
        });
    }
}

}  // namespace

// h = x A^T, for all layers: (n, ranks). up: the operand of h B^T, written here, layer by layer at their offsets; null
// where it is not wanted. down: ranks * width cells to work in. x: (n, width), rows `stride` apart.
EXPORT void update_down(const Factor* factors, int64_t count, int64_t width, int64_t ranks, const bf16* x,
                        int64_t stride, int64_t n, bf16* down, bf16* up, bf16* h) {
#pragma omp parallel
    {
        for (const Factor* f = factors; f < factors + count; ++f) {
#pragma omp for schedule(dynamic) collapse(2) nowait
            for (int64_t block = 0; block < f->at.ranks; block += LANES)
                for (int64_t d = 0; d < width; d += LANES)
                    pack_rows_of(f->A, f->rank, width, width, block, d, 1.0f, down + f->at.first_rank * width);
            if (!up) continue;
#pragma omp for schedule(dynamic) collapse(2) nowait
            for (int64_t block = 0; block < f->at.columns; block += LANES)
                for (int64_t d = 0; d < f->at.ranks; d += LANES)
                    pack_rows_of(f->B, f->at.columns, f->rank, f->at.ranks, block, d, f->scale, up + f->at.offset);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += TALL)
            narrow_rows(x + i * stride, stride, n - i, width, down, ranks, h + i * ranks, ranks);
    }
}

// gh = g B: (n, ranks). up: the operand of gh A, written here: ranks * width cells. down: the layers' columns * ranks
// cells to work in. g: rows `stride` apart.
EXPORT void update_down_backward(const Factor* factors, int64_t count, int64_t width, int64_t ranks, const bf16* g,
                                 int64_t stride, int64_t n, bf16* down, bf16* up, bf16* gh) {
#pragma omp parallel
    {
        for (const Factor* f = factors; f < factors + count; ++f) {
            const Span& at = f->at;
#pragma omp for schedule(static) nowait
            for (int64_t d = 0; d < at.columns; d += 2)
                pack_columns_of(f->B, at.columns, f->rank, at.ranks, d, 0, at.columns, f->scale, down + at.offset);
#pragma omp for schedule(static) nowait
            for (int64_t d = 0; d < at.ranks; d += 2)
                pack_columns_of(f->A, f->rank, width, width, d, at.first_rank, ranks, 1.0f, up);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += TALL)
            for (const Factor* f = factors; f < factors + count; ++f)
                narrow_rows(g + i * stride + f->at.first_column, stride, n - i, f->at.columns, down + f->at.offset,
                            f->at.ranks, gh + i * ranks + f->at.first_rank, ranks);
    }
}

// gradients: of A (rank, width) and of B (columns, rank) for each layer in turn. pairs: 2 * (n + 1) * ranks cells to
// work in.
EXPORT void update_gradients(const Factor* factors, int64_t count, int64_t width, int64_t ranks, const bf16* x,
                             int64_t x_stride, const bf16* h, const bf16* g, int64_t g_stride, const bf16* gh,
                             int64_t n, bf16* pairs, float* const* gradients) {
    bf16* by_h = pairs + (n + 1) / 2 * 2 * ranks;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i += 2) {
            pair_two(gh, n, ranks, i, pairs);
            pair_two(h, n, ranks, i, by_h);
        }
        for (int64_t k = 0; k < count; ++k) {
            const Factor& f = factors[k];
#pragma omp for schedule(dynamic) nowait
            for (int64_t c = 0; c < width; c += 2 * LANES)
                outer_columns(pairs, ranks, f.at.first_rank, f.rank, x, x_stride, n, width, c, 1.0f,
                              gradients[2 * k], width, 1);
#pragma omp for schedule(dynamic) nowait
            for (int64_t c = 0; c < f.at.columns; c += 2 * LANES)
                outer_columns(by_h, ranks, f.at.first_rank, f.rank, g + f.at.first_column, g_stride, n, f.at.columns,
                              c, f.scale, gradients[2 * k + 1], 1, f.rank);
        }
    }
}

// y += h B^T. y: n rows of `width`, `stride` apart.
EXPORT void add_low_rank(const bf16* h, int64_t ranks, const bf16* operand, const Span* spans, int64_t count, bf16* y,
                         int64_t stride, int64_t n, int64_t width) {
    const int64_t panels = (width + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += ROWS) {
        const bf16* rows[ROWS];
        row_pointers(rows, h, ranks, first, n);
        for (int64_t p = 0; p < panels; ++p) {
            __m512 out[ROWS][VECTORS];
            const int64_t column = p * PANEL;
            repeat<ROWS>(EACH(r) {
                repeat<VECTORS>(EACH(v) {
                    const bool inside = first + r < n && column + v * LANES < width;
                    out[r][v] = inside ? widen(y + (first + r) * stride + column + v * LANES) : _mm512_setzero_ps();
                });
            });
            add_update<ROWS>(out, column, rows, operand, spans, count);
            write_tile(out, y, stride, first, n, column, width);
        }
    }
}

#endif
