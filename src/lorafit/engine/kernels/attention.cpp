// Causal attention over rows that stand one after the other, forward and backward, in bfloat16.
//
// One row and one key/value head at a time: scores of six queries are summed in registers, made probabilities in float
// and multiplied with the values while they are in the cache. No score reaches memory beyond one core's; the backward
// pass computes them again (Dao et al. 2022, FlashAttention, section 3.1; whole rows of keys are at hand here, so the
// softmax needs no running maximum). A row may continue another one, its prefix, and sees all of it.
//
// Sums over rows that share a prefix are made in groups of rows, in a fixed order: results do not depend on threads.

#include "dot.h"

#if HAS_DOT

#include <cmath>
#include <vector>

namespace {

constexpr int64_t LINES = 96;  // queries of the backward pass at a time: a multiple of ROWS, and even
constexpr int64_t GROUP = 4;   // rows that share a prefix and one task

struct Row {
    int64_t start, length;
    int64_t prefix;  // which row it continues, or -1
};

// q: (tokens, heads, dim), k: (tokens, kv_heads, dim), v: (tokens, kv_heads, dim_v), each token's cells in one piece.
struct Shape {
    int64_t heads, kv_heads, dim, dim_v;
    int64_t window;  // most keys that a query sees, itself included; 0: all
    int64_t rows;
    int64_t q_stride, k_stride, v_stride, out_stride;
    int64_t gq_stride, gk_stride, gv_stride;
    float scale;

    int64_t group() const { return heads / kv_heads; }
};

inline int64_t up16(int64_t x) { return (x + LANES - 1) / LANES * LANES; }
inline int64_t down16(int64_t x) { return x / LANES * LANES; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

// Cells c .. c + 15 that lie in [from, to).
inline __mmask16 within(int64_t c, int64_t from, int64_t to) {
    const uint32_t below_to = (1u << clamp(to - c, 0, LANES)) - 1, below_from = (1u << clamp(from - c, 0, LANES)) - 1;
    return static_cast<__mmask16>(below_to & ~below_from);
}

// --- operands ---------------------------------------------------------------------------------------------------------

// Keys as columns, along dim: scores. x: `length` tokens, `stride` apart.
void pack_by_key(const bf16* x, int64_t stride, int64_t length, int64_t dim, bf16* operand) {
    for (int64_t block = 0; block < length; block += LANES)
        for (int64_t c = 0; c < LANES; ++c) {
            bf16* out = operand + block * dim + 2 * c;
            const bf16* row = x + (block + c) * stride;
            for (int64_t d = 0; d < dim; d += 2)
                if (block + c < length)
                    std::memcpy(out + d * LANES, row + d, 4);
                else
                    std::memset(out + d * LANES, 0, 4);
        }
}

// Cells of dim as columns, along rows: what probabilities or gradients of scores are multiplied with.
// row(i) is where row i's cells are, or null beyond the last; depth: rows, even.
template <typename F>
inline void pack_by_cell(F&& row, int64_t depth, int64_t dim, bf16* operand) {
    for (int64_t i = 0; i < depth; i += 2)
        for (int64_t c = 0; c < dim; c += LANES) {
            __m256i cells[2];
            for (int64_t t = 0; t < 2; ++t) {
                const bf16* at = row(i + t);
                cells[t] = at ? _mm256_loadu_si256((const __m256i*)(at + c)) : _mm256_setzero_si256();
            }
            _mm512_storeu_si512(operand + c * depth + i * LANES, pair_up(cells[0], cells[1]));
        }
}

// The rows of a batch with their operands: by key and by cell, a head at a time, every row padded to whole blocks.
struct Batch {
    const Shape& shape;
    const Row* rows;
    std::vector<int64_t> offset;  // of each row, in padded tokens
    int64_t tokens;               // padded, of all rows

    Batch(const Shape& s, const Row* r) : shape(s), rows(r), offset(s.rows), tokens(0) {
        for (int64_t i = 0; i < s.rows; ++i) {
            offset[i] = tokens;
            tokens += up16(r[i].length);
        }
    }
    int64_t place(int64_t row, int64_t head, int64_t dim) const { return (head * tokens + offset[row]) * dim; }
    int64_t longest() const {  // keys that a row sees, padded
        int64_t most = 0;
        for (int64_t i = 0; i < shape.rows; ++i) {
            const int64_t before = rows[i].prefix < 0 ? 0 : up16(rows[rows[i].prefix].length);
            const int64_t keys = before + up16(rows[i].length);
            most = keys > most ? keys : most;
        }
        return most;
    }
    void pack(const bf16* x, int64_t stride, int64_t dim, int64_t row, int64_t head, bf16* by_key,
              bf16* by_cell) const {
        const Row& at = rows[row];
        const bf16* first = x + at.start * stride + head * dim;
        if (by_key) pack_by_key(first, stride, at.length, dim, by_key + place(row, head, dim));
        if (!by_cell) return;
        const auto cells = [&](int64_t i) { return i < at.length ? first + i * stride : nullptr; };
        pack_by_cell(cells, up16(at.length), dim, by_cell + place(row, head, dim));
    }
};

// What six queries of a row see: keys [prefix_first, prefix) of its prefix and [own_first, own_end) of its own, in whole
// blocks. In scores, own keys stand behind all of the prefix's.
struct Tile {
    int64_t first, lines;  // of the row: line = token * group + head within the group
    int64_t prefix_first, prefix_end, own_first, own_end;

    // The key that token sees first, counted from the prefix's first.
    static int64_t oldest(const Shape& s, int64_t prefix, int64_t token) {
        return s.window > 0 ? clamp(prefix + token - s.window + 1, 0, prefix + token) : 0;
    }
    Tile(const Shape& s, int64_t prefix, int64_t length, int64_t line) : first(line) {
        const int64_t all = length * s.group();
        lines = all - line < ROWS ? all - line : ROWS;
        const int64_t begin = oldest(s, prefix, line / s.group()), last = (line + lines - 1) / s.group();
        prefix_end = up16(prefix);
        prefix_first = begin < prefix ? down16(begin) : prefix_end;
        own_first = begin > prefix ? down16(begin - prefix) : 0;
        own_end = up16(last + 1);
    }
};

// scores[line][key] = rows[line] . operand[key] for the keys of a tile.
inline void score_tile(const bf16* const (&rows)[ROWS], const bf16* prefix, const bf16* own, const Tile& at,
                       int64_t dim, float* scores, int64_t width) {
    const auto part = [&](const bf16* operand, int64_t first, int64_t end, float* out) {
        by_blocks(first, end, [&](auto v, int64_t c) __attribute__((always_inline)) {
            __m512 sums[ROWS][v];
            clear(sums);
            dot_bf16(sums, rows, operand + c * dim, LANES * dim, dim);
            repeat<ROWS>(EACH(r) {
                repeat<v>(EACH(w) { _mm512_storeu_ps(out + r * width + c + w * LANES, sums[r][w]); });
            });
        });
    };
    if (prefix) part(prefix, at.prefix_first, at.prefix_end, scores);
    part(own, at.own_first, at.own_end, scores + at.prefix_end);
}

// out[line][cell] = rows[line] . operand[cell] over the keys of a tile; store(line, c, sum) takes 16 cells.
template <typename F>
INLINE void weigh_tile(const bf16* const (&rows)[ROWS], const bf16* prefix, const bf16* own, const Tile& at,
                       int64_t own_depth, int64_t dim, F&& store) {
    const bf16* own_rows[ROWS];
    const bf16* prefix_rows[ROWS];
    repeat<ROWS>(EACH(r) {
        own_rows[r] = rows[r] + at.prefix_end + at.own_first;
        prefix_rows[r] = rows[r] + at.prefix_first;
    });
    by_blocks(0, dim, [&](auto v, int64_t c) __attribute__((always_inline)) {
        __m512 sums[ROWS][v];
        clear(sums);
        if (prefix)
            dot_bf16(sums, prefix_rows, prefix + c * at.prefix_end + at.prefix_first * LANES, LANES * at.prefix_end,
                     at.prefix_end - at.prefix_first);
        dot_bf16(sums, own_rows, own + c * own_depth + at.own_first * LANES, LANES * own_depth,
                 at.own_end - at.own_first);
        repeat<ROWS>(EACH(r) {
            if (r < at.lines) repeat<v>(EACH(w) { store(r, c + w * LANES, sums[r][w]); });
        });
    });
}

// The two stretches of a tile's score row: f(c, mask) for every block, mask: the keys that `token` sees.
template <typename F>
INLINE void seen(const Shape& s, const Tile& at, int64_t prefix, int64_t token, F&& f) {
    const int64_t begin = Tile::oldest(s, prefix, token);
    for (int64_t c = at.prefix_first; c < at.prefix_end; c += LANES) f(c, within(c, begin, prefix));
    for (int64_t c = at.own_first; c < at.own_end; c += LANES)
        f(at.prefix_end + c, within(c, begin > prefix ? begin - prefix : 0, token + 1));
}

template <typename T>
T* scratch(std::vector<T>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
}

// --- forward ----------------------------------------------------------------------------------------------------------

struct Forward {
    const bf16* q;
    const bf16 *keys, *values;  // by key, by cell
    bf16* out;
    float* log_sum;  // (tokens, heads)
};

void forward_tile(const Batch& batch, const Forward& f, int64_t row, int64_t head, int64_t line) {
    const Shape& s = batch.shape;
    const Row& at = batch.rows[row];
    const int64_t prefix = at.prefix < 0 ? 0 : batch.rows[at.prefix].length, group = s.group();
    const Tile tile(s, prefix, at.length, line);
    const int64_t width = tile.prefix_end + up16(at.length);
    static thread_local std::vector<float> score_memory;
    static thread_local std::vector<bf16> probability_memory;
    float* scores = scratch(score_memory, ROWS * width);
    bf16* probabilities = scratch(probability_memory, ROWS * width);

    const auto index = [&](int64_t r) { return tile.first + (r < tile.lines ? r : tile.lines - 1); };
    const bf16 *rows[ROWS], *weights[ROWS];
    float inverse[ROWS];
    repeat<ROWS>(EACH(r) {
        const int64_t i = index(r);
        rows[r] = f.q + (at.start + i / group) * s.q_stride + (head * group + i % group) * s.dim;
        weights[r] = probabilities + (r < tile.lines ? r : tile.lines - 1) * width;
    });
    const bf16* before = at.prefix < 0 ? nullptr : f.keys + batch.place(at.prefix, head, s.dim);
    score_tile(rows, before, f.keys + batch.place(row, head, s.dim), tile, s.dim, scores, width);
    for (int64_t r = 0; r < tile.lines; ++r) {
        const int64_t token = index(r) / group;
        const float* from = scores + r * width;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        seen(s, tile, prefix, token, [&](int64_t c, __mmask16 mask) {
            top = _mm512_mask_max_ps(top, mask, top, _mm512_loadu_ps(from + c));
        });
        const float shift = _mm512_reduce_max_ps(top) * s.scale;
        seen(s, tile, prefix, token, [&](int64_t c, __mmask16 mask) {
            const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(from + c), _mm512_set1_ps(s.scale), _mm512_set1_ps(shift));
            const __m512 e = _mm512_maskz_mov_ps(mask, exponential(x));
            sum = _mm512_add_ps(sum, e);
            narrow(probabilities + r * width + c, e);
        });
        const float whole = _mm512_reduce_add_ps(sum);
        inverse[r] = 1.0f / whole;
        f.log_sum[(at.start + token) * s.heads + head * group + index(r) % group] = shift + std::log(whole);
    }
    before = at.prefix < 0 ? nullptr : f.values + batch.place(at.prefix, head, s.dim_v);
    const bf16* own = f.values + batch.place(row, head, s.dim_v);
    weigh_tile(weights, before, own, tile, up16(at.length), s.dim_v, [&](int64_t r, int64_t c, __m512 sum) {
        const int64_t i = index(r);
        bf16* out = f.out + (at.start + i / group) * s.heads * s.dim_v + (head * group + i % group) * s.dim_v;
        narrow(out + c, _mm512_mul_ps(sum, _mm512_set1_ps(inverse[r])));
    });
}

// --- backward ---------------------------------------------------------------------------------------------------------

// Rows of one prefix, or one row without, and where the gradients of that prefix's keys and values are summed up.
struct Task {
    int64_t first, end;
    float* sums;  // of head 0: (prefix, dim), then (prefix, dim_v); the other heads' follow. Null without a prefix.
};

struct Backward {
    const bf16 *q, *g_out;
    const bf16 *keys, *key_cells, *values;
    const float* log_sum;
    bf16 *gq, *gk, *gv;
    float* const* own_sums;  // of each row that is a prefix, like Task::sums; null for the others
};

// A chunk of a row's queries: probabilities and gradients of scores, two queries' cells side by side.
struct Chunk {
    int64_t width;             // keys
    uint32_t *p, *g;           // (lines / 2, width)
    bf16 *q, *out;             // operands: queries and gradients of outputs by cell, along lines
    float *scores, *products;  // of one tile: (ROWS, width)
    bf16* rows;                // of one tile: gradients of scores, (ROWS, width)
};

void backward_tile(const Batch& batch, const Backward& b, const Chunk& chunk, int64_t row, int64_t head,
                   const Tile& tile, int64_t first_line) {
    const Shape& s = batch.shape;
    const Row& at = batch.rows[row];
    const int64_t prefix = at.prefix < 0 ? 0 : batch.rows[at.prefix].length, group = s.group(), width = chunk.width;
    const auto token = [&](int64_t r) { return (tile.first + r) / group; };
    const auto which = [&](int64_t r) { return head * group + (tile.first + r) % group; };
    const bf16 *queries[ROWS], *outs[ROWS], *gradients[ROWS];
    repeat<ROWS>(EACH(r) {
        const int64_t i = r < tile.lines ? r : tile.lines - 1;
        queries[r] = b.q + (at.start + token(i)) * s.q_stride + which(i) * s.dim;
        outs[r] = b.g_out + (at.start + token(i)) * s.out_stride + which(i) * s.dim_v;
        gradients[r] = chunk.rows + i * width;
    });
    const auto before = [&](const bf16* operand, int64_t dim) {
        return at.prefix < 0 ? nullptr : operand + batch.place(at.prefix, head, dim);
    };
    score_tile(queries, before(b.keys, s.dim), b.keys + batch.place(row, head, s.dim), tile, s.dim, chunk.scores, width);
    score_tile(outs, before(b.values, s.dim_v), b.values + batch.place(row, head, s.dim_v), tile, s.dim_v,
               chunk.products, width);
    for (int64_t r = 0; r < ROWS; ++r) {
        float *p = chunk.scores + r * width, *g = chunk.products + r * width;
        if (r >= tile.lines) {  // nothing stands in this line
            seen(s, tile, prefix, 0, [&](int64_t c, __mmask16) {
                _mm512_storeu_ps(p + c, _mm512_setzero_ps());
                _mm512_storeu_ps(g + c, _mm512_setzero_ps());
            });
            continue;
        }
        const __m512 shift = _mm512_set1_ps(b.log_sum[(at.start + token(r)) * s.heads + which(r)]);
        const __m512 scale = _mm512_set1_ps(s.scale);
        __m512 dot = _mm512_setzero_ps();
        seen(s, tile, prefix, token(r), [&](int64_t c, __mmask16 mask) {
            const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(p + c), scale, shift);
            const __m512 e = _mm512_maskz_mov_ps(mask, exponential(x));
            dot = _mm512_fmadd_ps(e, _mm512_loadu_ps(g + c), dot);
            _mm512_storeu_ps(p + c, e);
        });
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
        seen(s, tile, prefix, token(r), [&](int64_t c, __mmask16) {
            const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(scale, _mm512_loadu_ps(p + c)),
                                               _mm512_sub_ps(_mm512_loadu_ps(g + c), mean));
            _mm512_storeu_ps(g + c, slope);
            narrow(chunk.rows + r * width + c, slope);
        });
    }
    for (int64_t r = 0; r < ROWS; r += 2) {
        const int64_t line = (tile.first - first_line + r) / 2 * width;
        const float *p = chunk.scores + r * width, *g = chunk.products + r * width;
        seen(s, tile, prefix, 0, [&](int64_t c, __mmask16) {
            const auto pair = [&](const float* x) {
                return pair_up(round_cells(_mm512_loadu_ps(x + c)), round_cells(_mm512_loadu_ps(x + width + c)));
            };
            _mm512_storeu_si512(chunk.p + line + c, pair(p));
            _mm512_storeu_si512(chunk.g + line + c, pair(g));
        });
    }
    weigh_tile(gradients, before(b.key_cells, s.dim), b.key_cells + batch.place(row, head, s.dim), tile,
               up16(at.length), s.dim, [&](int64_t r, int64_t c, __m512 sum) {
                   narrow(b.gq + (at.start + token(r)) * s.gq_stride + which(r) * s.dim + c, sum);
               });
}

// sums[key][cell] += over lines: pairs[line][first + key] * operand[line][cell].
void sum_over_lines(const uint32_t* pairs, int64_t width, int64_t first, int64_t keys, const bf16* operand,
                    int64_t lines, int64_t dim, float* sums) {
    for (int64_t k = 0; k < keys; k += ROWS) {
        const bf16* rows[ROWS];
        row_pointers(rows, reinterpret_cast<const bf16*>(pairs + first), 2, k, keys);
        by_blocks(0, dim, [&](auto v, int64_t c) __attribute__((always_inline)) {
            __m512 tile[ROWS][v];
            repeat<ROWS>(EACH(r) {
                const float* at = sums + (k + r < keys ? k + r : keys - 1) * dim + c;
                repeat<v>(EACH(w) { tile[r][w] = _mm512_loadu_ps(at + w * LANES); });
            });
            dot_bf16(tile, rows, operand + c * lines, LANES * lines, lines, 2 * width);
            repeat<ROWS>(EACH(r) {
                if (k + r < keys)
                    repeat<v>(EACH(w) { _mm512_storeu_ps(sums + (k + r) * dim + c + w * LANES, tile[r][w]); });
            });
        });
    }
}

void backward_chunk(const Batch& batch, const Backward& b, Chunk chunk, int64_t row, int64_t head, int64_t first,
                    float* prefix_sums, float* own_sums) {
    const Shape& s = batch.shape;
    const Row& at = batch.rows[row];
    const int64_t prefix = at.prefix < 0 ? 0 : batch.rows[at.prefix].length, group = s.group();
    const int64_t end = at.length * group < first + LINES ? at.length * group : first + LINES;
    const int64_t lines = (end - first + ROWS - 1) / ROWS * ROWS;
    const Tile top(s, prefix, at.length, first), bottom(s, prefix, at.length, first + lines - ROWS);
    chunk.width = top.prefix_end + bottom.own_end;
    // Tiles see fewer keys than their chunk: what they leave out is zero.
    std::memset(chunk.p, 0, lines / 2 * chunk.width * 4);
    std::memset(chunk.g, 0, lines / 2 * chunk.width * 4);
    for (int64_t line = first; line < end; line += ROWS)
        backward_tile(batch, b, chunk, row, head, Tile(s, prefix, at.length, line), first);
    const auto cells = [&](const bf16* x, int64_t stride, int64_t dim) {
        return [=](int64_t i) -> const bf16* {
            const int64_t line = first + i;
            return line < end ? x + (at.start + line / group) * stride + (head * group + line % group) * dim : nullptr;
        };
    };
    pack_by_cell(cells(b.q, s.q_stride, s.dim), lines, s.dim, chunk.q);
    pack_by_cell(cells(b.g_out, s.out_stride, s.dim_v), lines, s.dim_v, chunk.out);
    const auto add = [&](int64_t place, int64_t keys, float* key_sums, float* value_sums) {
        sum_over_lines(chunk.g, chunk.width, place, keys, chunk.q, lines, s.dim, key_sums);
        sum_over_lines(chunk.p, chunk.width, place, keys, chunk.out, lines, s.dim_v, value_sums);
    };
    if (prefix > top.prefix_first)
        add(top.prefix_first, prefix - top.prefix_first, prefix_sums + top.prefix_first * s.dim,
            prefix_sums + prefix * s.dim + top.prefix_first * s.dim_v);
    const int64_t keys = (bottom.own_end < at.length ? bottom.own_end : at.length) - top.own_first;
    add(top.prefix_end + top.own_first, keys, own_sums + top.own_first * s.dim,
        own_sums + at.length * s.dim + top.own_first * s.dim_v);
}

// Rounds sums (length, dim) to the gradients of a row's keys or values.
void write_gradients(const float* sums, int64_t length, int64_t dim, bf16* g, int64_t stride) {
    for (int64_t i = 0; i < length; ++i)
        for (int64_t c = 0; c < dim; c += LANES) narrow(g + i * stride + c, _mm512_loadu_ps(sums + i * dim + c));
}

void write_row(const Batch& batch, const Backward& b, int64_t row, int64_t head, const float* sums) {
    const Shape& s = batch.shape;
    const Row& at = batch.rows[row];
    write_gradients(sums, at.length, s.dim, b.gk + at.start * s.gk_stride + head * s.dim, s.gk_stride);
    write_gradients(sums + at.length * s.dim, at.length, s.dim_v, b.gv + at.start * s.gv_stride + head * s.dim_v,
                    s.gv_stride);
}

void backward_task(const Batch& batch, const Backward& b, const Task& task, int64_t head) {
    const Shape& s = batch.shape;
    static thread_local std::vector<uint32_t> pair_memory;
    static thread_local std::vector<bf16> cell_memory;
    static thread_local std::vector<float> float_memory;
    const int64_t both = s.dim + s.dim_v, width = batch.longest();
    Chunk chunk;
    chunk.p = scratch(pair_memory, LINES * width);
    chunk.g = chunk.p + LINES / 2 * width;
    chunk.q = scratch(cell_memory, LINES * both + ROWS * width);
    chunk.out = chunk.q + LINES * s.dim;
    chunk.rows = chunk.out + LINES * s.dim_v;
    chunk.scores = scratch(float_memory, 2 * ROWS * width + width * both);
    chunk.products = chunk.scores + ROWS * width;
    float *own = chunk.products + ROWS * width, *prefix_sums = nullptr;
    if (task.sums) {
        const int64_t cells = batch.rows[batch.rows[task.first].prefix].length * both;
        prefix_sums = task.sums + head * cells;
        std::memset(prefix_sums, 0, cells * sizeof(float));
    }
    for (int64_t row = task.first; row < task.end; ++row) {
        const int64_t length = batch.rows[row].length;
        float* sums = b.own_sums[row] ? b.own_sums[row] + head * length * both : own;
        std::memset(sums, 0, length * both * sizeof(float));
        for (int64_t first = 0; first < length * s.group(); first += LINES)
            backward_chunk(batch, b, chunk, row, head, first, prefix_sums, sums);
        if (!b.own_sums[row]) write_row(batch, b, row, head, sums);
    }
}

// The tasks of a backward pass with their places for sums, in one piece of memory.
struct Tasks {
    std::vector<Task> all;
    std::vector<float*> own;  // see Backward::own_sums

    Tasks(const Batch& batch) : own(batch.shape.rows, nullptr) {
        const Shape& s = batch.shape;
        const auto cells = [&](int64_t row) { return batch.rows[row].length * (s.dim + s.dim_v) * s.kv_heads; };
        int64_t size = 0;
        std::vector<int64_t> places, own_places(s.rows, -1);
        for (int64_t row = 0, next; row < s.rows; row = next) {
            const int64_t prefix = batch.rows[row].prefix;
            next = row + 1;
            while (prefix >= 0 && next < s.rows && next < row + GROUP && batch.rows[next].prefix == prefix) ++next;
            all.push_back({row, next, nullptr});
            places.push_back(prefix < 0 ? -1 : size);
            if (prefix < 0) continue;
            size += cells(prefix);
            if (own_places[prefix] < 0) {
                own_places[prefix] = size;
                size += cells(prefix);
            }
        }
        static thread_local std::vector<float> memory;
        float* begin = scratch(memory, size);
        for (size_t i = 0; i < all.size(); ++i)
            if (places[i] >= 0) all[i].sums = begin + places[i];
        for (int64_t row = 0; row < s.rows; ++row)
            if (own_places[row] >= 0) own[row] = begin + own_places[row];
    }
};

// A prefix gets its own rows' share and that of every task, in their order.
void finish_prefix(const Batch& batch, const Backward& b, const Tasks& tasks, int64_t row, int64_t head) {
    const int64_t cells = batch.rows[row].length * (batch.shape.dim + batch.shape.dim_v);
    float* sums = tasks.own[row] + head * cells;
    for (const Task& task : tasks.all) {
        if (!task.sums || batch.rows[task.first].prefix != row) continue;
        const float* more = task.sums + head * cells;
#pragma omp simd
        for (int64_t j = 0; j < cells; ++j) sums[j] += more[j];
    }
    write_row(batch, b, row, head, sums);
}

}  // namespace

// Padded tokens of an operand: its cells are kv_heads * that * dim.
EXPORT int64_t attention_tokens(const Shape* shape, const Row* rows) { return Batch(*shape, rows).tokens; }

// out: (tokens, heads, dim_v), log_sum: (tokens, heads) float, both contiguous; tokens of no row are left as they are.
// keys, values: operands to work in.
EXPORT void attention_forward(const Shape* shape, const Row* rows, const bf16* q, const bf16* k, const bf16* v,
                              bf16* keys, bf16* values, bf16* out, float* log_sum) {
    const Shape& s = *shape;
    const Batch batch(s, rows);
    const Forward f{q, keys, values, out, log_sum};
    struct Piece {
        int64_t row, first;
    };
    std::vector<Piece> pieces;  // of LINES queries
    for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t first = 0; first < rows[row].length * s.group(); first += LINES) pieces.push_back({row, first});
    const int64_t count = static_cast<int64_t>(pieces.size());
#pragma omp parallel
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < s.kv_heads; ++head)
            for (int64_t row = 0; row < s.rows; ++row) {
                batch.pack(k, s.k_stride, s.dim, row, head, keys, nullptr);
                batch.pack(v, s.v_stride, s.dim_v, row, head, nullptr, values);
            }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < s.kv_heads; ++head)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t all = rows[pieces[i].row].length * s.group();
                for (int64_t line = pieces[i].first; line < all && line < pieces[i].first + LINES; line += ROWS)
                    forward_tile(batch, f, pieces[i].row, head, line);
            }
    }
}

// gq, gk, gv: like q, k, v; tokens of no row are left as they are. g_out: tokens out_stride apart.
// keys, key_cells, values: operands to work in.
EXPORT void attention_backward(const Shape* shape, const Row* rows, const bf16* q, const bf16* k, const bf16* v,
                               const bf16* g_out, const float* log_sum, bf16* keys, bf16* key_cells, bf16* values,
                               bf16* gq, bf16* gk, bf16* gv) {
    const Shape& s = *shape;
    const Batch batch(s, rows);
    const Tasks tasks(batch);
    const Backward b{q, g_out, keys, key_cells, values, log_sum, gq, gk, gv, tasks.own.data()};
    const int64_t count = static_cast<int64_t>(tasks.all.size());
#pragma omp parallel
    {
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < s.kv_heads; ++head)
            for (int64_t row = 0; row < s.rows; ++row) {
                batch.pack(k, s.k_stride, s.dim, row, head, keys, key_cells);
                batch.pack(v, s.v_stride, s.dim_v, row, head, values, nullptr);
            }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < s.kv_heads; ++head)
            for (int64_t i = 0; i < count; ++i) backward_task(batch, b, tasks.all[i], head);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < s.kv_heads; ++head)
            for (int64_t row = 0; row < s.rows; ++row)
                if (tasks.own[row]) finish_prefix(batch, b, tasks, row, head);
    }
}

#endif
