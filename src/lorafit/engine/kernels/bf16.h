// bfloat16 beside float: both are loaded as float, and stored from it.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) {
    const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
inline void store(float* p, float value) { *p = value; }
inline void store(bf16* p, float value) {  // round to nearest, ties to even, as torch does
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    const uint32_t nan = (wide & 0x7fffffffu) > 0x7f800000u;  // the carry would turn some NaN into a number
    p->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

}  // namespace
