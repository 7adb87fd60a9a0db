// Storage types and their conversions: f16, bf16, fp8 E4M3 and E5M2. Arithmetic is always f32 or integer.
//
// A storage type is its bits in a struct: it can be neither added nor converted by accident.
#pragma once

#include "core.cuh"
#include "ptx/convert.cuh"

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};
struct e4m3 {
    uint8_t bits;
};
struct e5m2 {
    uint8_t bits;
};

// Values of the DTYPE constants; the kernel table (`table::dtype`) has the same numbers.
constexpr int DTYPE_F32 = 0;
constexpr int DTYPE_F16 = 1;
constexpr int DTYPE_BF16 = 2;

// StorageOf<DTYPE> is the C++ type of a DTYPE constant.
template <int Dtype>
struct Storage;
template <>
struct Storage<DTYPE_F32> {
    using type = float;
};
template <>
struct Storage<DTYPE_F16> {
    using type = f16;
};
template <>
struct Storage<DTYPE_BF16> {
    using type = bf16;
};
template <int Dtype>
using StorageOf = typename Storage<Dtype>::type;

// Exact widening.
DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(f16 x) { return cvt_f32_f16(x.bits); }
DEVICE float to_f32(bf16 x) { return cvt_f32_bf16(x.bits); }
DEVICE float to_f32(e4m3 x) { return cvt_f32_f16(static_cast<uint16_t>(cvt_f16x2_e4m3x2(x.bits))); }
DEVICE float to_f32(e5m2 x) { return cvt_f32_f16(static_cast<uint16_t>(cvt_f16x2_e5m2x2(x.bits))); }

// Rounding to nearest even; f16 and bf16 overflow to infinity, fp8 saturates.
template <typename T>
DEVICE T from_f32(float x);
template <>
DEVICE float from_f32<float>(float x) {
    return x;
}
template <>
DEVICE f16 from_f32<f16>(float x) {
    return f16{cvt_f16_f32(x)};
}
template <>
DEVICE bf16 from_f32<bf16>(float x) {
    return bf16{cvt_bf16_f32(x)};
}
template <>
DEVICE e4m3 from_f32<e4m3>(float x) {
    return e4m3{static_cast<uint8_t>(cvt_e4m3x2_f32(x, 0.0f))};
}
template <>
DEVICE e5m2 from_f32<e5m2>(float x) {
    return e5m2{static_cast<uint8_t>(cvt_e5m2x2_f32(x, 0.0f))};
}

// Two values rounded and packed into a register as the tensor cores read them: `low` (the lower index) in bits 0-15.
template <typename T>
DEVICE uint32_t pack2(float low, float high);
template <>
DEVICE uint32_t pack2<f16>(float low, float high) {
    return cvt_f16x2_f32(low, high);
}
template <>
DEVICE uint32_t pack2<bf16>(float low, float high) {
    return cvt_bf16x2_f32(low, high);
}

// The reverse of pack2: x holds the low value, y the high one.
template <typename T>
DEVICE float2 unpack2(uint32_t packed) {
    return make_float2(to_f32(T{static_cast<uint16_t>(packed)}), to_f32(T{static_cast<uint16_t>(packed >> 16)}));
}
