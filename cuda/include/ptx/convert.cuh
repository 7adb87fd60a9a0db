// Conversions between f32 and the narrow formats, on raw bits. PTX ISA, "Data Movement and Conversion Instructions: cvt".
//
// Rounding is to nearest even throughout. Where no instruction exists (the host; fp8 before sm_89) the same conversion is
// exact arithmetic on bits: f16 and bf16 overflow to infinity, fp8 saturates to its largest finite value, subnormals are
// kept. NaN stays NaN; its sign and payload are not specified.
//
// Two values are packed as the tensor cores read them: the first in the low half, the second in the high half. (The
// instruction's own operand order is the reverse.)
#pragma once

#include "core.cuh"

namespace software {

// |x| (f32 bits without sign, not NaN) rounded to a format with the given exponent bias and mantissa width, as if its
// exponent had no upper end: what is past the format's largest code, infinity included, the caller cuts off.
template <int Bias, int Mantissa>
DEVICE constexpr uint32_t narrow(uint32_t magnitude) {
    const int exponent = static_cast<int>(magnitude >> 23) - 127 + Bias;
    uint32_t value = 0;
    int shift = 23 - Mantissa;
    if (exponent > 0) {
        value = static_cast<uint32_t>(exponent) << 23 | (magnitude & 0x7fffff);
    } else {
        value = 0x800000 | (magnitude & 0x7fffff);
        shift += 1 - exponent;
        if (shift > 24) return 0;  // below half of the smallest subnormal
    }
    const uint32_t half = 1u << (shift - 1);
    const uint32_t odd = value >> shift & 1;
    return (value + half - 1 + odd) >> shift;
}

DEVICE constexpr uint32_t at_most(uint32_t code, uint32_t largest) { return code < largest ? code : largest; }

DEVICE constexpr uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffff; }
DEVICE constexpr uint32_t sign(float x) { return bit_cast<uint32_t>(x) >> 31; }

DEVICE constexpr uint16_t f16_from_f32(float x) {
    const uint32_t m = magnitude(x);
    if (m > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>(sign(x) << 15 | at_most(narrow<15, 10>(m), 0x7c00));
}

DEVICE constexpr float f32_from_f16(uint16_t h) {
    const uint32_t m = h & 0x7fff;
    const uint32_t s = static_cast<uint32_t>(h & 0x8000) << 16;
    if (m > 0x7c00) return bit_cast<float>(0x7fffffffu);
    if (m == 0x7c00) return bit_cast<float>(s | 0x7f800000);
    // Moving the exponent by a multiplication also normalises subnormals, exactly.
    return bit_cast<float>(s | bit_cast<uint32_t>(bit_cast<float>(m << 13) * bit_cast<float>(0x77800000u)));  // · 2^112
}

DEVICE constexpr uint16_t bf16_from_f32(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (magnitude(x) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// fp8 E4M3: no infinity, largest finite 448 = 0x7e, NaN 0x7f.
DEVICE constexpr uint8_t e4m3_from_f32(float x) {
    const uint32_t m = magnitude(x);
    if (m > 0x7f800000) return 0x7f;
    return static_cast<uint8_t>(sign(x) << 7 | at_most(narrow<7, 3>(m), 0x7e));
}

// fp8 E5M2: largest finite 57344 = 0x7b, infinity 0x7c (never produced), NaN 0x7f.
DEVICE constexpr uint8_t e5m2_from_f32(float x) {
    const uint32_t m = magnitude(x);
    if (m > 0x7f800000) return 0x7f;
    return static_cast<uint8_t>(sign(x) << 7 | at_most(narrow<15, 2>(m), 0x7b));
}

// E4M3 as f16 bits; every value is an f16.
DEVICE constexpr uint16_t f16_from_e4m3(uint8_t b) {
    const uint32_t m = b & 0x7f;
    if (m == 0x7f) return 0x7fff;
    return f16_from_f32(bit_cast<float>(static_cast<uint32_t>(b & 0x80) << 24
                                        | bit_cast<uint32_t>(bit_cast<float>(m << 20) * bit_cast<float>(0x7b800000u))));  // · 2^120
}

// Two E4M3 in the upper bytes of two halves as f16 bits, 2^-8 of their values: the exponent moves from bias 7 to 15. NaN becomes
// NaN: its magnitude alone carries into the exponent's highest bit.
DEVICE constexpr uint32_t f16x2_in_256ths(uint32_t upper) {
    const uint32_t magnitudes = upper >> 1 & 0x3f803f80;
    return (upper & 0x80008000) | magnitudes | ((magnitudes + 0x00800080) & 0x40004000);
}

// The same as bf16 bits, 2^-120 of their values. The magnitude of NaN alone carries out of the exponent, and clears its upper bits.
DEVICE constexpr uint32_t bf16x2_in_2_120ths(uint32_t upper) {
    const uint32_t magnitudes = upper >> 4 & 0x07f007f0;
    return (upper & 0x80008000) | magnitudes | (~(magnitudes + 0x78107810) & 0x78007800);
}

// E5M2 as f16 bits: E5M2 is the upper byte of f16.
DEVICE constexpr uint16_t f16_from_e5m2(uint8_t b) {
    return (b & 0x7f) > 0x7c ? 0x7fff : static_cast<uint16_t>(b << 8);
}

}  // namespace software

// f32 -> f16. cvt.rn.f16.f32
DEVICE uint16_t cvt_f16_f32(float x) {
#ifdef __CUDACC__
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    return software::f16_from_f32(x);
#endif
}

// f16 -> f32, exact. cvt.f32.f16
DEVICE float cvt_f32_f16(uint16_t h) {
#ifdef __CUDACC__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#else
    return software::f32_from_f16(h);
#endif
}

// f32 -> bf16. cvt.rn.bf16.f32 (sm_80)
DEVICE uint16_t cvt_bf16_f32(float x) {
#ifdef __CUDACC__
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    return software::bf16_from_f32(x);
#endif
}

// bf16 -> f32, exact: bf16 is the upper half of f32, so that no instruction is needed.
DEVICE float cvt_f32_bf16(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }

// Two f32 -> packed f16, `low` in bits 0-15. cvt.rn.f16x2.f32 (sm_80)
DEVICE uint32_t cvt_f16x2_f32(float low, float high) {
#ifdef __CUDACC__
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return software::f16_from_f32(low) | static_cast<uint32_t>(software::f16_from_f32(high)) << 16;
#endif
}

// Two f32 -> packed bf16, `low` in bits 0-15. cvt.rn.bf16x2.f32 (sm_80)
DEVICE uint32_t cvt_bf16x2_f32(float low, float high) {
#ifdef __CUDACC__
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return software::bf16_from_f32(low) | static_cast<uint32_t>(software::bf16_from_f32(high)) << 16;
#endif
}

// f32 -> tf32, as the f32 bits that a tf32 `mma` reads: 10 bits of mantissa, ties away from zero. cvt.rna.tf32.f32 (sm_80)
//
// The lower 13 bits are zero for finite values; NaN and infinity are for the caller to avoid.
DEVICE uint32_t cvt_tf32_f32(float x) {
#ifdef __CUDACC__
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits & 0xffffe000;
#else
    return (bit_cast<uint32_t>(x) + 0x1000) & 0xffffe000;
#endif
}

// Two f32 -> packed fp8 E4M3, saturating, `low` in bits 0-7. cvt.rn.satfinite.e4m3x2.f32 (sm_89; software before)
DEVICE uint16_t cvt_e4m3x2_f32(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return static_cast<uint16_t>(software::e4m3_from_f32(low) | software::e4m3_from_f32(high) << 8);
#endif
}

// Two f32 -> packed fp8 E5M2, saturating, `low` in bits 0-7. cvt.rn.satfinite.e5m2x2.f32 (sm_89; software before)
DEVICE uint16_t cvt_e5m2x2_f32(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
    uint16_t packed;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return static_cast<uint16_t>(software::e5m2_from_f32(low) | software::e5m2_from_f32(high) << 8);
#endif
}

// Packed fp8 E4M3 -> packed f16, exact. cvt.rn.f16x2.e4m3x2 (sm_89; software before)
DEVICE uint32_t cvt_f16x2_e4m3x2(uint16_t packed) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(packed));
    return halves;
#else
    return software::f16_from_e4m3(static_cast<uint8_t>(packed))
           | static_cast<uint32_t>(software::f16_from_e4m3(static_cast<uint8_t>(packed >> 8))) << 16;
#endif
}

// Bytes 2·Pair and 2·Pair + 1 of `word` in the upper bytes of two halves. prmt
template <int Pair>
DEVICE uint32_t upper_bytes(uint32_t word) {
    return __byte_perm(word, 0, Pair == 0 ? 0x1404 : 0x3424);
}

// Pair `Pair` (0: the lower) of four packed fp8 E4M3 -> packed f16, exact, subnormals too, by what every architecture has:
// bits to their places, and a multiplication by 2^8. mul.rn.f16x2
template <int Pair>
DEVICE uint32_t arithmetic_f16x2_e4m3x4(uint32_t word) {
    const uint32_t x = software::f16x2_in_256ths(upper_bytes<Pair>(word));
#ifdef __CUDACC__
    uint32_t halves;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(x), "r"(0x5c005c00));
    return halves;
#else
    const float low = software::f32_from_f16(static_cast<uint16_t>(x));
    const float high = software::f32_from_f16(static_cast<uint16_t>(x >> 16));
    return software::f16_from_f32(low * 256) | static_cast<uint32_t>(software::f16_from_f32(high * 256)) << 16;
#endif
}

// The same by an instruction where there is one. cvt.rn.f16x2.e4m3x2 (sm_89; arithmetic before)
template <int Pair>
DEVICE uint32_t cvt_f16x2_e4m3x4(uint32_t word) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
    return cvt_f16x2_e4m3x2(static_cast<uint16_t>(word >> 16 * Pair));
#else
    return arithmetic_f16x2_e4m3x4<Pair>(word);
#endif
}

// Pair `Pair` of four packed fp8 E4M3 -> packed bf16, exact, subnormals too: bits to their places, and a multiplication by 2^120,
// added to -0, which keeps signs of zeros. fma.rn.bf16x2 (sm_80)
template <int Pair>
DEVICE uint32_t cvt_bf16x2_e4m3x4(uint32_t word) {
    const uint32_t x = software::bf16x2_in_2_120ths(upper_bytes<Pair>(word));
#ifdef __CUDACC__
    uint32_t halves;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(halves) : "r"(x), "r"(0x7b807b80), "r"(0x80008000));
    return halves;
#else
    constexpr float SCALE = bit_cast<float>(0x7b800000u);
    const float low = bit_cast<float>(x << 16) * SCALE, high = bit_cast<float>(x & 0xffff0000) * SCALE;
    return software::bf16_from_f32(low) | static_cast<uint32_t>(software::bf16_from_f32(high)) << 16;
#endif
}

// Packed fp8 E5M2 -> packed f16, exact. cvt.rn.f16x2.e5m2x2 (sm_89; software before)
DEVICE uint32_t cvt_f16x2_e5m2x2(uint16_t packed) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(packed));
    return halves;
#else
    return software::f16_from_e5m2(static_cast<uint8_t>(packed))
           | static_cast<uint32_t>(software::f16_from_e5m2(static_cast<uint8_t>(packed >> 8))) << 16;
#endif
}
