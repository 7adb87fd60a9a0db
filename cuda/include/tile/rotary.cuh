// Rotation of vectors by position (RoPE), eight channels at a time.
//
// (a, b) → (a·cos − b·sin, b·cos + a·sin) for each plane of a vector; multiplications and additions are rounded one by one,
// so that every kernel that rotates agrees with the others and with the reference to the bit.
#pragma once

#include "core.cuh"
#include "types.cuh"

// Values of the ROTARY constants: plane i is the pair of channels (i, i + planes) if half-split, (2i, 2i + 1) if interleaved.
constexpr uint32_t HALF_SPLIT = 1;
constexpr uint32_t INTERLEAVED = 2;

// Eight channels as f32.
template <typename Element>
struct Channels {
    float x[8];

    DEVICE explicit Channels(uint4 bits) {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const float2 pair = unpack2<Element>(words[i]);
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
    DEVICE uint4 bits() const {
        return make_uint4(pack2<Element>(x[0], x[1]), pack2<Element>(x[2], x[3]), pack2<Element>(x[4], x[5]),
                          pack2<Element>(x[6], x[7]));
    }
};

// Count planes of a row of cosines or sines, from a multiple of four on.
template <uint32_t Count>
struct Planes {
    float x[Count];

    DEVICE explicit Planes(const float* row) {
#pragma unroll
        for (uint32_t i = 0; i < Count; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(row + i);
            x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        }
    }
};

DEVICE void rotate(float& a, float& b, float cosine, float sine) {
    const float turned = __fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine));
    b = __fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine));
    a = turned;
}

// Rotates the eight channels `low` of planes 0-7 of `cosines` and `sines` with their partners `high`. Half-split.
template <typename Element>
DEVICE void rotate_halves(Channels<Element>& low, Channels<Element>& high, const float* cosines, const float* sines) {
    const Planes<8> cosine(cosines);
    const Planes<8> sine(sines);
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) rotate(low.x[i], high.x[i], cosine.x[i], sine.x[i]);
}

// Rotates eight channels, the planes 0-3 of `cosines` and `sines`. Interleaved.
template <typename Element>
DEVICE void rotate_pairs(Channels<Element>& pairs, const float* cosines, const float* sines) {
    const Planes<4> cosine(cosines);
    const Planes<4> sine(sines);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) rotate(pairs.x[2 * i], pairs.x[2 * i + 1], cosine.x[i], sine.x[i]);
}
