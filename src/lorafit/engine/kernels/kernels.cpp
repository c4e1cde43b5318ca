// The elementwise work of a training step, each pass over memory done once. Matrix products are not here: oneDNN's are.
//
// Every function exists for float and bfloat16 storage (suffix _f32, _bf16) and computes in float. Rows are split
// among OpenMP threads and every row is summed by one thread in a fixed order, so results do not depend on scheduling.
// n counts rows (tokens); strides count elements. Called through ctypes: plain C types only.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bf16.h"

namespace {

template <typename T>
inline float rounded(float value) {
    T cell;
    store(&cell, value);
    return load(&cell);
}

// e^x to about 1e-7 relative: 2^k by the exponent's bits, the rest by a polynomial (Cephes expf's coefficients).
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const float k = shifted - 12582912.0f;
    float r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const int32_t power = (bits - 0x4b400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}
inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

template <typename T>
inline void add_to(T* x, const T* more, int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) store(x + j, load(x + j) + load(more + j));
}

// --- RMS norm -------------------------------------------------------------------------------------------------------

// y = weight * x / rms(x); the normalised x is rounded to storage first, as the models' own code does. more: added to x
// before that, in its place, or null.
template <typename T>
void rms_norm(T* x, const T* more, const float* weight, T* y, float* inverse_rms, int64_t n, int64_t width, float eps,
              int round_first) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        T* row = x + i * width;
        T* out = y + i * width;
        if (more) add_to(row, more + i * width, width);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; ++j) sum += load(row + j) * load(row + j);
        const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
        inverse_rms[i] = inverse;
        if (round_first) {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) store(out + j, weight[j] * rounded<T>(load(row + j) * inverse));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) store(out + j, weight[j] * (load(row + j) * inverse));
        }
    }
}

// gx = inverse_rms * (w gy - x^ mean(w gy x^)), x^ = x * inverse_rms. more: added to that, or null.
template <typename T>
void rms_norm_backward(const T* gy, const T* x, const float* weight, const float* inverse_rms, const T* more, T* gx,
                       int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const T *g = gy + i * width, *row = x + i * width;
        T* out = gx + i * width;
        const float inverse = inverse_rms[i];
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; ++j) dot += load(g + j) * weight[j] * load(row + j);
        const float mean = dot * inverse * inverse / static_cast<float>(width);
#pragma omp simd
        for (int64_t j = 0; j < width; ++j)
            store(out + j, inverse * (load(g + j) * weight[j] - load(row + j) * mean));
        if (more) add_to(out, more + i * width, width);
    }
}

// --- rotary embedding -----------------------------------------------------------------------------------------------

// Rotates pairs (j, j + dim/2) of every head. x: n rows of heads * dim, `stride` apart. cos, sin: (n, dim).
// direction 1 rotates, -1 is its transpose. y: like x, its rows y_stride apart; it may be x.
template <typename T>
void rotary(const T* x, int64_t stride, const T* cosine, const T* sine, T* y, int64_t y_stride, int64_t n,
            int64_t heads, int64_t dim, float direction) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const T *c = cosine + i * dim, *s = sine + i * dim;
        for (int64_t h = 0; h < heads; ++h) {
            const T *a = x + i * stride + h * dim, *b = a + half;
            T *out_a = y + i * y_stride + h * dim, *out_b = out_a + half;
            if (direction > 0) {
#pragma omp simd
                for (int64_t j = 0; j < half; ++j) {
                    const float first = load(a + j), second = load(b + j);
                    store(out_a + j, first * load(c + j) - second * load(s + j));
                    store(out_b + j, second * load(c + half + j) + first * load(s + half + j));
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < half; ++j) {
                    const float first = load(a + j), second = load(b + j);
                    store(out_a + j, first * load(c + j) + second * load(s + half + j));
                    store(out_b + j, second * load(c + half + j) - first * load(s + j));
                }
            }
        }
    }
}

// --- gated activations ----------------------------------------------------------------------------------------------

enum Activation { SILU = 0, GELU_TANH = 1 };

constexpr float SQRT_2_OVER_PI = 0.7978845608028654f, GELU_CUBE = 0.044715f;

template <int kind>
inline float activate(float x) {
    if (kind == SILU) return x * sigmoid(x);
    return x * sigmoid(2.0f * SQRT_2_OVER_PI * (x + GELU_CUBE * x * x * x));  // tanh u = 2 sigmoid(2u) - 1
}
template <int kind>
inline float slope(float x) {
    if (kind == SILU) {
        const float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
    const float s = sigmoid(2.0f * SQRT_2_OVER_PI * (x + GELU_CUBE * x * x * x));
    return s + x * s * (1.0f - s) * 2.0f * SQRT_2_OVER_PI * (1.0f + 3.0f * GELU_CUBE * x * x);
}

// y = act(gate) * up. gate, up: n rows, `stride` apart; y: (n, width) contiguous.
template <typename T, int kind>
void gated(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const T *a = gate + i * gate_stride, *b = up + i * up_stride;
        T* out = y + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) store(out + j, activate<kind>(load(a + j)) * load(b + j));
    }
}

// Gradients of gate and up, side by side in each row of g_both: (n, 2 width).
template <typename T, int kind>
void gated_backward(const T* gy, int64_t gy_stride, const T* gate, int64_t gate_stride, const T* up,
                    int64_t up_stride, T* g_both, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const T *g = gy + i * gy_stride, *a = gate + i * gate_stride, *b = up + i * up_stride;
        T *g_gate = g_both + i * 2 * width, *g_up = g_gate + width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) {
            const float upstream = load(g + j), x = load(a + j);
            store(g_gate + j, upstream * load(b + j) * slope<kind>(x));
            store(g_up + j, upstream * activate<kind>(x));
        }
    }
}

// --- attention ------------------------------------------------------------------------------------------------------

// Tokens -> the layout of batched products: packed (kv_heads, cells, group * dim). tokens: (cells,), -1 for padding.
template <typename T>
void gather_heads(const T* x, int64_t stride, const int32_t* tokens, T* packed, int64_t kv_heads, int64_t cells,
                  int64_t width) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t h = 0; h < kv_heads; ++h)
        for (int64_t c = 0; c < cells; ++c) {
            T* out = packed + (h * cells + c) * width;
            if (tokens[c] < 0)
                std::memset(out, 0, width * sizeof(T));
            else
                std::memcpy(out, x + tokens[c] * stride + h * width, width * sizeof(T));
        }
}

// The way back: y[token, h] = packed[h, cell], or += where `add`. No token stands in two cells.
template <typename T>
void scatter_heads(const T* packed, const int32_t* tokens, T* y, int64_t stride, int64_t kv_heads, int64_t cells,
                   int64_t width, int add) {
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < cells; ++c) {
        if (tokens[c] < 0) continue;
        for (int64_t h = 0; h < kv_heads; ++h) {
            const T* in = packed + (h * cells + c) * width;
            T* out = y + tokens[c] * stride + h * width;
            if (add) {
#pragma omp simd
                for (int64_t j = 0; j < width; ++j) store(out + j, load(out + j) + load(in + j));
            } else {
                std::memcpy(out, in, width * sizeof(T));
            }
        }
    }
}

// Which keys a query sees: those of the shared prefix, then those of its own row up to itself, within the window.
// Score rows run over (heads * rows of the batch, queries, group); query q of a row has position prefix + first + q.
struct Geometry {
    int64_t blocks;   // kv heads * rows
    int64_t rows;     // rows of the batch: block b is row b % rows
    int64_t queries;  // of this chunk
    int64_t group;    // query heads a kv head
    int64_t first;    // the row's token that the chunk begins with
    int64_t keys;     // own keys in the scores: first + queries
    int64_t prefix;   // keys of the shared prefix
    int64_t window;   // most keys a query sees, itself included; 0: all
};

struct Seen {
    int64_t own_first, own_end, prefix_first;
};

inline Seen seen(const Geometry& at, int64_t query) {
    const int64_t token = at.first + query;
    Seen s{0, token + 1, 0};
    if (at.window > 0) {
        const int64_t oldest = at.prefix + token - at.window + 1;
        s.prefix_first = oldest < 0 ? 0 : (oldest < at.prefix ? oldest : at.prefix);
        s.own_first = oldest > at.prefix ? oldest - at.prefix : 0;
    }
    return s;
}

template <typename T>
inline float maximum(const T* row, int64_t from, int64_t to, float start) {
    float top = start;
#pragma omp simd reduction(max : top)
    for (int64_t j = from; j < to; ++j) top = load(row + j) > top ? load(row + j) : top;
    return top;
}

// Turns scores into probabilities in place: first their exponentials, then divided by the sum.
template <typename T>
inline float exponentials(T* row, int64_t from, int64_t to, int64_t width, float scale, float shift) {
    float sum = 0.0f;
    for (int64_t j = 0; j < from; ++j) store(row + j, 0.0f);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < to; ++j) {
        const float e = fast_exp(load(row + j) * scale - shift);
        sum += e;
        store(row + j, e);
    }
    for (int64_t j = to; j < width; ++j) store(row + j, 0.0f);
    return sum;
}

template <typename T>
inline void multiply(T* row, int64_t from, int64_t to, float factor) {
#pragma omp simd
    for (int64_t j = from; j < to; ++j) store(row + j, load(row + j) * factor);
}

// own: (blocks, queries * group, keys). shared: (blocks, queries * group, prefix), or null. Scores in, probabilities
// out. lengths: (rows,) real tokens of each row; queries beyond come out as zeros. log_sum: (blocks, queries, group).
template <typename T>
void softmax(T* own, T* shared, const int32_t* lengths, float* log_sum, const Geometry* geometry, float scale) {
    const Geometry at = *geometry;
    const int64_t lines = at.queries * at.group;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < at.blocks; ++b)
        for (int64_t line = 0; line < lines; ++line) {
            const int64_t i = b * lines + line, query = line / at.group;
            T *row = own + i * at.keys, *before = shared + i * at.prefix;
            if (at.first + query >= lengths[b % at.rows]) {
                std::memset(row, 0, at.keys * sizeof(T));
                std::memset(before, 0, at.prefix * sizeof(T));
                log_sum[i] = 0.0f;
                continue;
            }
            const Seen s = seen(at, query);
            float top = maximum(row, s.own_first, s.own_end, -INFINITY);
            if (at.prefix) top = maximum(before, s.prefix_first, at.prefix, top);
            const float shift = top * scale;
            float sum = exponentials(row, s.own_first, s.own_end, at.keys, scale, shift);
            if (at.prefix) sum += exponentials(before, s.prefix_first, at.prefix, at.prefix, scale, shift);
            multiply(row, s.own_first, s.own_end, 1.0f / sum);
            if (at.prefix) multiply(before, s.prefix_first, at.prefix, 1.0f / sum);
            log_sum[i] = shift + std::log(sum);
        }
}

template <typename T>
inline float probabilities(T* scores, const T* g, int64_t from, int64_t to, int64_t width, float scale, float log_sum) {
    float dot = 0.0f;
    for (int64_t j = 0; j < from; ++j) store(scores + j, 0.0f);
#pragma omp simd reduction(+ : dot)
    for (int64_t j = from; j < to; ++j) {
        const float p = fast_exp(load(scores + j) * scale - log_sum);
        dot += p * load(g + j);
        store(scores + j, p);
    }
    for (int64_t j = to; j < width; ++j) store(scores + j, 0.0f);
    return dot;
}

template <typename T>
inline void score_gradients(const T* p, T* g, int64_t from, int64_t to, int64_t width, float scale, float dot) {
    for (int64_t j = 0; j < from; ++j) store(g + j, 0.0f);
#pragma omp simd
    for (int64_t j = from; j < to; ++j) store(g + j, scale * load(p + j) * (load(g + j) - dot));
    for (int64_t j = to; j < width; ++j) store(g + j, 0.0f);
}

// Scores in, probabilities out (own, shared); gradients of probabilities in, of raw scores out (g_own, g_shared).
template <typename T>
void softmax_backward(T* own, T* shared, T* g_own, T* g_shared, const int32_t* lengths, const float* log_sum,
                      const Geometry* geometry, float scale) {
    const Geometry at = *geometry;
    const int64_t lines = at.queries * at.group;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t b = 0; b < at.blocks; ++b)
        for (int64_t line = 0; line < lines; ++line) {
            const int64_t i = b * lines + line, query = line / at.group;
            T *row = own + i * at.keys, *g_row = g_own + i * at.keys;
            T *before = shared + i * at.prefix, *g_before = g_shared + i * at.prefix;
            if (at.first + query >= lengths[b % at.rows]) {
                std::memset(row, 0, at.keys * sizeof(T));
                std::memset(g_row, 0, at.keys * sizeof(T));
                std::memset(before, 0, at.prefix * sizeof(T));
                std::memset(g_before, 0, at.prefix * sizeof(T));
                continue;
            }
            const Seen s = seen(at, query);
            float dot = probabilities(row, g_row, s.own_first, s.own_end, at.keys, scale, log_sum[i]);
            if (at.prefix)
                dot += probabilities(before, g_before, s.prefix_first, at.prefix, at.prefix, scale, log_sum[i]);
            score_gradients(row, g_row, s.own_first, s.own_end, at.keys, scale, dot);
            if (at.prefix) score_gradients(before, g_before, s.prefix_first, at.prefix, at.prefix, scale, dot);
        }
}

// --- loss -----------------------------------------------------------------------------------------------------------

// Per row: nll = log sum exp(logits) - logits[target]. Where `gradient`, the logits become weight * (softmax - onehot).
template <typename T>
void cross_entropy(T* logits, const int64_t* targets, const float* weights, float* nll, int64_t n, int64_t vocab,
                   int gradient) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; ++i) {
        T* row = logits + i * vocab;
        const float top = maximum(row, 0, vocab, -INFINITY);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < vocab; ++j) sum += fast_exp(load(row + j) - top);
        nll[i] = top + std::log(sum) - load(row + targets[i]);
        if (!gradient) continue;
        const float factor = weights[i] / sum;
        const float at_target = weights[i] * (fast_exp(load(row + targets[i]) - top) / sum - 1.0f);
#pragma omp simd
        for (int64_t j = 0; j < vocab; ++j) store(row + j, factor * fast_exp(load(row + j) - top));
        store(row + targets[i], at_target);
    }
}

// --- int8 -----------------------------------------------------------------------------------------------------------

// Each row of x (times `columns`, where not null) as int8 with its own scale: q = round(x / scale), scale = max|x| / 127.
// Without scales, q = round(x * columns) as it is.
template <typename T>
void quantize_rows(const T* x, int64_t stride, const float* columns, int8_t* q, float* scales, int64_t n,
                   int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const T* row = x + i * stride;
        int8_t* out = q + i * width;
        float top = scales ? 0.0f : 127.0f;
        if (!scales) {
        } else if (columns) {
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < width; ++j) {
                const float size = std::fabs(load(row + j) * columns[j]);
                top = size > top ? size : top;
            }
        } else {
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < width; ++j) {
                const float size = std::fabs(load(row + j));
                top = size > top ? size : top;
            }
        }
        if (scales) scales[i] = top / 127.0f;
        const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
        const float shift = 12582912.0f;  // adding and subtracting it rounds to the nearest whole number
        if (columns) {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j)
                out[j] = static_cast<int8_t>(static_cast<int32_t>((load(row + j) * columns[j] * inverse + shift) - shift));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j)
                out[j] = static_cast<int8_t>(static_cast<int32_t>((load(row + j) * inverse + shift) - shift));
        }
    }
}

// y = sums * rows[i] * columns[j] (+ y, where `add`); columns may be null. y: n rows, `stride` apart.
template <typename T>
void dequantize(const int32_t* sums, const float* rows, const float* columns, T* y, int64_t stride, int64_t n,
                int64_t width, int add) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const int32_t* in = sums + i * width;
        T* out = y + i * stride;
        const float scale = rows[i];
        if (columns) {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j)
                store(out + j, static_cast<float>(in[j]) * scale * columns[j] + (add ? load(out + j) : 0.0f));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; ++j)
                store(out + j, static_cast<float>(in[j]) * scale + (add ? load(out + j) : 0.0f));
        }
    }
}

// --- lengths of rows ------------------------------------------------------------------------------------------------

// y *= columns. y: n rows, `stride` apart.
template <typename T>
void scale_columns(T* y, int64_t stride, const float* columns, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        T* row = y + i * stride;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) store(row + j, load(row + j) * columns[j]);
    }
}

// scaled = g * columns, and sums = the sum over rows of g u. Columns are split among threads, a block at a time, and rows
// are summed in blocks too, so that an error grows with their number and not with that of all rows.
template <typename T>
void scale_columns_backward(const T* g, int64_t g_stride, const T* u, int64_t u_stride, const float* columns, T* scaled,
                            float* sums, int64_t n, int64_t width) {
    constexpr int64_t BLOCK = 128;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t count = width - first < BLOCK ? width - first : BLOCK;
        float total[BLOCK] = {0.0f};
        for (int64_t top = 0; top < n; top += BLOCK) {
            const int64_t end = top + BLOCK < n ? top + BLOCK : n;
            float part[BLOCK] = {0.0f};
            for (int64_t i = top; i < end; ++i) {
                const T* g_row = g + i * g_stride + first;
                const T* u_row = u + i * u_stride + first;
                T* out = scaled + i * width + first;
#pragma omp simd
                for (int64_t j = 0; j < count; ++j) {
                    const float value = load(g_row + j);
                    part[j] += value * load(u_row + j);
                    store(out + j, value * columns[first + j]);
                }
            }
            for (int64_t j = 0; j < count; ++j) total[j] += part[j];
        }
        for (int64_t j = 0; j < count; ++j) sums[first + j] = total[j];
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#define INSTANTIATE(suffix, T)                                                                                         \
    EXPORT void rms_norm_##suffix(T* x, const T* m, const float* w, T* y, float* r, int64_t n, int64_t d, float eps,   \
                                  int f) {                                                                             \
        rms_norm(x, m, w, y, r, n, d, eps, f);                                                                         \
    }                                                                                                                  \
    EXPORT void rms_norm_backward_##suffix(const T* gy, const T* x, const float* w, const float* r, const T* m, T* gx, \
                                           int64_t n, int64_t d) {                                                     \
        rms_norm_backward(gy, x, w, r, m, gx, n, d);                                                                   \
    }                                                                                                                  \
    EXPORT void rotary_##suffix(const T* x, int64_t s, const T* cs, const T* sn, T* y, int64_t ys, int64_t n,          \
                                int64_t h, int64_t d, float direction) {                                               \
        rotary(x, s, cs, sn, y, ys, n, h, d, direction);                                                               \
    }                                                                                                                  \
    EXPORT void gated_##suffix(const T* a, int64_t as, const T* b, int64_t bs, T* y, int64_t n, int64_t d, int kind) { \
        kind == SILU ? gated<T, SILU>(a, as, b, bs, y, n, d) : gated<T, GELU_TANH>(a, as, b, bs, y, n, d);             \
    }                                                                                                                  \
    EXPORT void gated_backward_##suffix(const T* g, int64_t gs, const T* a, int64_t as, const T* b, int64_t bs, T* y,  \
                                        int64_t n, int64_t d, int kind) {                                              \
        kind == SILU ? gated_backward<T, SILU>(g, gs, a, as, b, bs, y, n, d)                                           \
                     : gated_backward<T, GELU_TANH>(g, gs, a, as, b, bs, y, n, d);                                     \
    }                                                                                                                  \
    EXPORT void gather_heads_##suffix(const T* x, int64_t s, const int32_t* t, T* p, int64_t h, int64_t c, int64_t w) {\
        gather_heads(x, s, t, p, h, c, w);                                                                             \
    }                                                                                                                  \
    EXPORT void scatter_heads_##suffix(const T* p, const int32_t* t, T* y, int64_t s, int64_t h, int64_t c, int64_t w, \
                                       int add) {                                                                      \
        scatter_heads(p, t, y, s, h, c, w, add);                                                                       \
    }                                                                                                                  \
    EXPORT void softmax_##suffix(T* own, T* shared, const int32_t* n, float* l, const Geometry* at, float scale) {     \
        softmax(own, shared, n, l, at, scale);                                                                         \
    }                                                                                                                  \
    EXPORT void softmax_backward_##suffix(T* own, T* shared, T* g_own, T* g_shared, const int32_t* n, const float* l,  \
                                          const Geometry* at, float scale) {                                           \
        softmax_backward(own, shared, g_own, g_shared, n, l, at, scale);                                               \
    }                                                                                                                  \
    EXPORT void cross_entropy_##suffix(T* x, const int64_t* t, const float* w, float* nll, int64_t n, int64_t v,       \
                                       int gradient) {                                                                 \
        cross_entropy(x, t, w, nll, n, v, gradient);                                                                   \
    }                                                                                                                  \
    EXPORT void quantize_rows_##suffix(const T* x, int64_t s, const float* c, int8_t* q, float* r, int64_t n,          \
                                       int64_t d) {                                                                    \
        quantize_rows(x, s, c, q, r, n, d);                                                                            \
    }                                                                                                                  \
    EXPORT void dequantize_##suffix(const int32_t* q, const float* r, const float* c, T* y, int64_t s, int64_t n,      \
                                    int64_t d, int add) {                                                              \
        dequantize(q, r, c, y, s, n, d, add);                                                                          \
    }                                                                                                                  \
    EXPORT void scale_columns_##suffix(T* y, int64_t s, const float* c, int64_t n, int64_t d) {                        \
        scale_columns(y, s, c, n, d);                                                                                  \
    }                                                                                                                  \
    EXPORT void scale_columns_backward_##suffix(const T* g, int64_t gs, const T* u, int64_t us, const float* c, T* y,  \
                                                float* r, int64_t n, int64_t d) {                                      \
        scale_columns_backward(g, gs, u, us, c, y, r, n, d);                                                           \
    }

INSTANTIATE(f32, float)
INSTANTIATE(bf16, bf16)
