// silu(gate) * up and its gradients in bfloat16, a register at a time: compilers do not find the processor's rounding to
// bfloat16, nor a division by its reciprocal. Widths are multiples of 16. See kernels.cpp for every other case.

#include "dot.h"

#if HAS_DOT

// y = silu(gate) * up. gate, up: n rows, `stride` apart; y: (n, width) contiguous.
EXPORT void silu_gated(const bf16* gate, int64_t gate_stride, const bf16* up, int64_t up_stride, bf16* y, int64_t n,
                       int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < width; j += LANES) {
            const __m512 x = widen(gate + i * gate_stride + j);
            const __m512 product = _mm512_mul_ps(x, widen(up + i * up_stride + j));
            narrow(y + i * width + j, _mm512_mul_ps(product, sigmoid(x)));
        }
}

// Gradients of gate and up, side by side in each row of g_both: (n, 2 width). With s = sigmoid(x): silu' = s + s x (1 - s).
// y: null, or what silu_gated gives.
EXPORT void silu_gated_backward(const bf16* gy, int64_t gy_stride, const bf16* gate, int64_t gate_stride,
                                const bf16* up, int64_t up_stride, bf16* g_both, bf16* y, int64_t n, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < width; j += LANES) {
            const __m512 x = widen(gate + i * gate_stride + j), g = widen(gy + i * gy_stride + j), s = sigmoid(x);
            const __m512 other = widen(up + i * up_stride + j), value = _mm512_mul_ps(x, s);
            const __m512 slope = _mm512_fnmadd_ps(value, s, _mm512_add_ps(s, value));
            if (y) narrow(y + i * width + j, _mm512_mul_ps(_mm512_mul_ps(x, other), s));
            narrow(g_both + i * 2 * width + j, _mm512_mul_ps(_mm512_mul_ps(g, other), slope));
            narrow(g_both + (i * 2 + 1) * width + j, _mm512_mul_ps(g, value));
        }
}

#endif
