// Products with codes: 8-bit codes of queries and probabilities, and a page's fields as lanes read them.
#pragma once

#include "core.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "types.cuh"

DEVICE void mma_m16n8k16(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_f16(d, a, b); }
DEVICE void mma_m16n8k16(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }

// Adding 1.5·2²³ rounds a small float to nearest even and leaves it in the low bits.
constexpr float ROUND = 12582912.0f;

// Four codes, still with the bits of ROUND, as bytes in the order given.
DEVICE uint32_t pack_codes(float a, float b, float c, float d) {
    const uint32_t low = __byte_perm(bit_cast<uint32_t>(a), bit_cast<uint32_t>(b), 0x0040);
    const uint32_t high = __byte_perm(bit_cast<uint32_t>(c), bit_cast<uint32_t>(d), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// Scale and reciprocal of an 8-bit group: x ≈ scale·code + min.
struct EightBit {
    float scale;
    float reciprocal;

    DEVICE EightBit(float min, float max) {
        scale = (max - min) * (1.0f / 255.0f);
        if (!(scale >= 1.17549435e-38f)) scale = 1.0f;
        reciprocal = rcp_approx(scale);
    }
    // The code of x, with the bits of ROUND.
    DEVICE float code(float x, float min) const { return __fmaf_rn(x - min, reciprocal, ROUND); }
};

// A float as two numbers of tf32. The second has up to 13 bits, of which a tensor core takes 11, cutting off the others or rounding: the
// sum misses x by 3·2⁻²³ of its leading power of two at most.
struct TwoParts {
    uint32_t high;
    uint32_t low;

    DEVICE explicit TwoParts(float x) {
        high = bit_cast<uint32_t>(x) & 0xffffe000u;
        low = bit_cast<uint32_t>(x - bit_cast<float>(high));
    }
};

// Neighbouring values of a field, `Bytes` in all.
template <uint32_t Bytes>
struct Words {
    static constexpr uint32_t COUNT = Bytes / 4;
    uint32_t word[COUNT];

    // From `index` times Bytes bytes on, in shared memory.
    DEVICE Words(const unsigned char* from, uint32_t index) {
        from += index * Bytes;
        if constexpr (Bytes % 16 == 0) {
#pragma unroll
            for (uint32_t i = 0; i < COUNT / 4; i++) {
                const uint4 four = reinterpret_cast<const uint4*>(from)[i];
                word[4 * i] = four.x, word[4 * i + 1] = four.y, word[4 * i + 2] = four.z, word[4 * i + 3] = four.w;
            }
        } else if constexpr (Bytes % 8 == 0) {
#pragma unroll
            for (uint32_t i = 0; i < COUNT / 2; i++) {
                const uint2 two = reinterpret_cast<const uint2*>(from)[i];
                word[2 * i] = two.x, word[2 * i + 1] = two.y;
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < COUNT; i++) word[i] = reinterpret_cast<const uint32_t*>(from)[i];
        }
    }
    // Value i of SumBytes bytes each.
    template <uint32_t SumBytes>
    DEVICE uint32_t integer(uint32_t i) const {
        return SumBytes == 1 ? word[i / 4] >> (8 * (i % 4)) & 0xff : word[i / 2] >> (16 * (i % 2)) & 0xffff;
    }
    // 16-bit value i as f32.
    template <class Element>
    DEVICE float value(uint32_t i) const {
        return to_f32(Element{static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)))});
    }
};
