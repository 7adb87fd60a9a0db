// 16-bit floats to f32, exactly.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

inline float bits_to_f32(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float bf16_to_f32(uint32_t bits) { return bits_to_f32(bits << 16); }

inline float f16_to_f32(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return bits_to_f32(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return bits_to_f32(sign | (exponent + 112) << 23 | mantissa << 13);
    const float subnormal = (float)mantissa * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

}  // namespace emulator
