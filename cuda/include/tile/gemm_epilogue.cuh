// What happens to a sum on its way to O: scale, bias, activation, residual, rounding, in this order, all in f32
// (hybrid-gemm/src/epilogue.rs).
#pragma once

#include "core.cuh"
#include "hybrid_gemm_params.h"
#include "ptx/math.cuh"
#include "types.cuh"

// Where the sum of a token and a row lies in a tile of sums in shared memory [tokens][64], so that neither the fragments'
// stores nor reads by row meet a bank conflict.
DEVICE uint32_t sums_index(uint32_t token, uint32_t row) { return token * HYBRID_TILE_ROWS + (row ^ token / 2 % 4 * 8); }

DEVICE float silu(float x) { return __fdiv_rn(x, 1.0f + exp2_approx(-LOG2_E * x)); }

// x/2 · (1 + tanh(u)) = x / (1 + e⁻²ᵘ), u = √(2/π) (x + 0.044715 x³)
DEVICE float gelu_tanh(float x) {
    constexpr float TWICE_ROOT_2_OVER_PI = 1.5957691216057308f;
    const float u2 = TWICE_ROOT_2_OVER_PI * (x + 0.044715f * x * x * x);
    return __fdiv_rn(x, 1.0f + exp2_approx(-LOG2_E * u2));
}

// O and what is added on the way to it. Null where there is none.
struct GemmEpilogue {
    const float* scales;   // [n]
    const float* bias;     // [n]
    const void* residual;  // [tokens, out columns] of O's type
    void* out;             // [tokens, out columns]

    DEVICE float biased(float sum, uint32_t row) const {
        if (scales != nullptr) sum *= scales[row];
        if (bias != nullptr) sum += bias[row];
        return sum;
    }

    template <class Out>
    DEVICE void store_as(const HybridGemmParams& params, uint32_t token, uint32_t column, float value) const {
        if (residual != nullptr) {
            value += to_f32(static_cast<const Out*>(residual)[token * params.residual_stride + column]);
        }
        static_cast<Out*>(out)[token * params.out_stride + column] = from_f32<Out>(value);
    }

    DEVICE void store(const HybridGemmParams& params, uint32_t token, uint32_t column, float value) const {
        if (params.out_dtype == DTYPE_F32) store_as<float>(params, token, column, value);
        if (params.out_dtype == DTYPE_F16) store_as<f16>(params, token, column, value);
        if (params.out_dtype == DTYPE_BF16) store_as<bf16>(params, token, column, value);
    }

    // O of `tokens` tokens from `first_token` on and of column tile `column`, from the sums in shared memory.
    // All `Threads` threads call.
    template <uint32_t Threads>
    DEVICE void finish(const HybridGemmParams& params, const float* sums, uint32_t first_token, uint32_t tokens,
                       uint32_t column) const {
        const bool gated = params.activation == HYBRID_SWIGLU;
        const uint32_t outputs = gated ? HYBRID_TILE_ROWS / 2 : HYBRID_TILE_ROWS;
        const uint32_t first_row = column * HYBRID_TILE_ROWS;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < tokens * outputs; i += Threads) {
            const uint32_t token = i / outputs, output = i % outputs;
            // Eight rows of gates, then eight of what they gate.
            const uint32_t row = gated ? output / 8 * 16 + output % 8 : output;
            if (first_row + row >= params.n) continue;
            float value = biased(sums[sums_index(token, row)], first_row + row);
            if (gated) value = silu(value) * biased(sums[sums_index(token, row + 8)], first_row + row + 8);
            if (params.activation == HYBRID_SILU) value = silu(value);
            if (params.activation == HYBRID_GELU_TANH) value = gelu_tanh(value);
            store(params, first_token + token, column * outputs + output, value);
        }
    }

    // Bytes of outputs and residual for one token and `rows` rows of W.
    DEVICE uint32_t bytes(const HybridGemmParams& params, uint32_t rows) const {
        const uint32_t columns = params.activation == HYBRID_SWIGLU ? rows / 2 : rows;
        return columns * (params.out_dtype == DTYPE_F32 ? 4 : 2) * (residual != nullptr ? 2 : 1);
    }

    // O of a launch whose schedule is not valid: zeros in the launch's own columns, element by element, dealt to `threads` threads.
    // Those of another slab are another launch's.
    DEVICE void store_zeros(const HybridGemmParams& params, uint64_t thread, uint64_t threads) const {
        const bool gated = params.activation == HYBRID_SWIGLU;
        const uint32_t outputs = gated ? HYBRID_TILE_ROWS / 2 : HYBRID_TILE_ROWS;
        const uint32_t columns = gated ? params.n / 2 : params.n;
        for (uint64_t i = thread; i < static_cast<uint64_t>(params.max_tokens) * columns; i += threads) {
            const uint32_t tile = i % columns / outputs;
            const bool own = params.experts > 0 || tile < params.host_columns || tile - params.hbm_first < params.hbm_columns;
            if (!own) continue;
            const uint64_t at = i / columns * params.out_stride + i % columns;
            if (params.out_dtype == DTYPE_F32) {
                static_cast<float*>(out)[at] = 0;
            } else {
                static_cast<uint16_t*>(out)[at] = 0;  // zero has the same bits in f16 and bf16
            }
        }
    }
};
