// Weights that are stored in fewer bits, decoded into float or bfloat16: the blocks of GGUF files, and nf4 and int8.
//
// Each number is a product and at most a sum of floats, rounded one after the other, so that the bits are those of
// quant/. Rows are split among OpenMP threads. Called through ctypes: plain C types only.

// A product and a sum in one instruction would round once.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <cstdint>
#include <cstring>

#include "bf16.h"

namespace {

inline float half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t wide = static_cast<uint32_t>(h & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &wide, 4);
    value *= 0x1p112f;  // the exponents' offsets differ by 112; exact, for subnormal numbers too
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((h & 0x7c00u) == 0x7c00u) bits = wide | 0x7f800000u;  // infinite, or not a number
    bits |= static_cast<uint32_t>(h & 0x8000u) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A format: how many numbers a block holds, in how many bytes, and what they are.

struct Q8_0 {
    static constexpr int numbers = 32, bytes = 34;
    static void decode(const uint8_t* p, float* y) {
        const float d = half(p);
        for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(static_cast<int8_t>(p[2 + j])) * d;
    }
};

struct Q4_0 {
    static constexpr int numbers = 32, bytes = 18;
    static void decode(const uint8_t* p, float* y) {
        const float d = half(p);
        for (int j = 0; j < 16; ++j) {
            y[j] = static_cast<float>((p[2 + j] & 15) - 8) * d;
            y[16 + j] = static_cast<float>((p[2 + j] >> 4) - 8) * d;
        }
    }
};

struct Q4_1 {
    static constexpr int numbers = 32, bytes = 20;
    static void decode(const uint8_t* p, float* y) {
        const float d = half(p), least = half(p + 2);
        for (int j = 0; j < 16; ++j) {
            y[j] = static_cast<float>(p[4 + j] & 15) * d + least;
            y[16 + j] = static_cast<float>(p[4 + j] >> 4) * d + least;
        }
    }
};

// Four bits of each number in `low`, the fifth in `high`.
inline void fives(const uint8_t* high, const uint8_t* low, int* q) {
    uint32_t fifth;
    std::memcpy(&fifth, high, 4);
    for (int j = 0; j < 16; ++j) {
        q[j] = (low[j] & 15) | static_cast<int>(((fifth >> j) & 1u) << 4);
        q[16 + j] = (low[j] >> 4) | static_cast<int>(((fifth >> (16 + j)) & 1u) << 4);
    }
}

struct Q5_0 {
    static constexpr int numbers = 32, bytes = 22;
    static void decode(const uint8_t* p, float* y) {
        const float d = half(p);
        int q[32];
        fives(p + 2, p + 6, q);
        for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(q[j] - 16) * d;
    }
};

struct Q5_1 {
    static constexpr int numbers = 32, bytes = 24;
    static void decode(const uint8_t* p, float* y) {
        const float d = half(p), least = half(p + 2);
        int q[32];
        fives(p + 4, p + 8, q);
        for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(q[j]) * d + least;
    }
};

// Of Q4_K and Q5_K: the scales and least values of eight groups of 32 numbers, six bits each.
inline void scales_and_least(const uint8_t* p, float* scales, float* least) {
    const float d = half(p), dmin = half(p + 2);
    const uint8_t* s = p + 4;
    for (int k = 0; k < 4; ++k) {
        scales[k] = d * static_cast<float>(s[k] & 63);
        least[k] = dmin * static_cast<float>(s[4 + k] & 63);
        scales[4 + k] = d * static_cast<float>((s[8 + k] & 15) | ((s[k] >> 2) & 48));
        least[4 + k] = dmin * static_cast<float>((s[8 + k] >> 4) | ((s[4 + k] >> 2) & 48));
    }
}

struct Q4_K {
    static constexpr int numbers = 256, bytes = 144;
    static void decode(const uint8_t* p, float* y) {
        float scales[8], least[8];
        scales_and_least(p, scales, least);
        for (int k = 0; k < 4; ++k) {
            const uint8_t* q = p + 16 + 32 * k;
            for (int j = 0; j < 32; ++j) {
                y[64 * k + j] = static_cast<float>(q[j] & 15) * scales[2 * k] - least[2 * k];
                y[64 * k + 32 + j] = static_cast<float>(q[j] >> 4) * scales[2 * k + 1] - least[2 * k + 1];
            }
        }
    }
};

struct Q5_K {
    static constexpr int numbers = 256, bytes = 176;
    static void decode(const uint8_t* p, float* y) {
        float scales[8], least[8];
        scales_and_least(p, scales, least);
        const uint8_t* high = p + 16;
        for (int k = 0; k < 4; ++k) {
            const uint8_t* q = p + 48 + 32 * k;
            for (int j = 0; j < 32; ++j) {
                const int a = (q[j] & 15) | (((high[j] >> (2 * k)) & 1) << 4);
                const int b = (q[j] >> 4) | (((high[j] >> (2 * k + 1)) & 1) << 4);
                y[64 * k + j] = static_cast<float>(a) * scales[2 * k] - least[2 * k];
                y[64 * k + 32 + j] = static_cast<float>(b) * scales[2 * k + 1] - least[2 * k + 1];
            }
        }
    }
};

struct Q6_K {
    static constexpr int numbers = 256, bytes = 210;
    static void decode(const uint8_t* p, float* y) {
        const float d = half(p + 208);
        for (int g = 0; g < 8; ++g) {  // 32 numbers each, with two scales
            const uint8_t* low = p + 64 * (g / 4) + 32 * (g % 2);
            const uint8_t* high = p + 128 + 32 * (g / 4);
            const int shift = 4 * ((g / 2) % 2), above = 2 * (g % 4);
            for (int half_group = 0; half_group < 2; ++half_group) {
                const float scale = d * static_cast<float>(static_cast<int8_t>(p[192 + 2 * g + half_group]));
                for (int i = 16 * half_group; i < 16 * (half_group + 1); ++i) {
                    const int q = ((low[i] >> shift) & 15) | (((high[i] >> above) & 3) << 4);
                    y[32 * g + i] = static_cast<float>(q - 32) * scale;
                }
            }
        }
    }
};

template <typename Format, typename T>
void decode_rows(const uint8_t* data, int64_t row_bytes, int64_t rows, int64_t width, T* out, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* p = data + row * row_bytes;
        T* y = out + row * stride;
        float values[Format::numbers];
        for (int64_t first = 0; first < width; first += Format::numbers, p += Format::bytes) {
            Format::decode(p, values);
            for (int j = 0; j < Format::numbers; ++j) store(y + first + j, values[j]);
        }
    }
}

template <typename T>
void decode(const uint8_t* data, int64_t row_bytes, int64_t rows, int64_t width, T* out, int64_t stride, int format) {
    switch (format) {  // the numbers are those of native.FORMATS
        case 0: return decode_rows<Q4_0>(data, row_bytes, rows, width, out, stride);
        case 1: return decode_rows<Q4_1>(data, row_bytes, rows, width, out, stride);
        case 2: return decode_rows<Q5_0>(data, row_bytes, rows, width, out, stride);
        case 3: return decode_rows<Q5_1>(data, row_bytes, rows, width, out, stride);
        case 4: return decode_rows<Q8_0>(data, row_bytes, rows, width, out, stride);
        case 5: return decode_rows<Q4_K>(data, row_bytes, rows, width, out, stride);
        case 6: return decode_rows<Q5_K>(data, row_bytes, rows, width, out, stride);
        case 7: return decode_rows<Q6_K>(data, row_bytes, rows, width, out, stride);
    }
}

// quant/bits.py: 16 quantiles of a normal distribution, two numbers a byte, a scale for 64 of them.
constexpr float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

template <typename T>
void decode_nf4(const uint8_t* data, const float* tops, int64_t rows, int64_t width, T* out, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* p = data + row * (width / 2);
        const float* top = tops + row * (width / 64);
        T* y = out + row * stride;
        for (int64_t block = 0; block < width / 64; ++block, p += 32, y += 64) {
            float values[64];
            for (int j = 0; j < 32; ++j) {
                values[2 * j] = NF4[p[j] >> 4] * top[block];
                values[2 * j + 1] = NF4[p[j] & 15] * top[block];
            }
            for (int j = 0; j < 64; ++j) store(y + j, values[j]);
        }
    }
}

template <typename T>
void decode_int8(const int8_t* data, const float* tops, int64_t rows, int64_t width, T* out, int64_t stride) {
    constexpr float step = static_cast<float>(1.0 / 127);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int8_t* q = data + row * width;
        for (int64_t j = 0; j < width; ++j) store(out + row * stride + j, static_cast<float>(q[j]) * tops[row] * step);
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#define INSTANTIATE(suffix, T)                                                                                         \
    EXPORT void decode_blocks_##suffix(const uint8_t* data, int64_t row_bytes, int64_t rows, int64_t width, T* out,    \
                                       int64_t stride, int format) {                                                   \
        decode(data, row_bytes, rows, width, out, stride, format);                                                     \
    }                                                                                                                  \
    EXPORT void decode_nf4_##suffix(const uint8_t* data, const float* tops, int64_t rows, int64_t width, T* out,       \
                                    int64_t stride) {                                                                  \
        decode_nf4(data, tops, rows, width, out, stride);                                                              \
    }                                                                                                                  \
    EXPORT void decode_int8_##suffix(const int8_t* data, const float* tops, int64_t rows, int64_t width, T* out,       \
                                     int64_t stride) {                                                                 \
        decode_int8(data, tops, rows, width, out, stride);                                                             \
    }

INSTANTIATE(f32, float)
INSTANTIATE(bf16, bf16)
