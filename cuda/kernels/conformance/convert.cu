// Every conversion of ptx/convert.cuh and types.cuh, element by element.
//
// first [n], second [n] u32: f32 bits, or narrow bits in the low half   out [n] u32
// operation: see the switch; those of one operand ignore `second`.
//
// Arch:    sm_80 and later; fp8 by instruction from sm_89 on, by software before.
// Mapping: blocks of 256 threads, 16 elements per thread, a block's elements next to each other.
// Budget:  24 registers, no shared memory.
// Limit:   none that matters: it exists to be compared bit by bit.
#include "types.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t PER_BLOCK = 16 * THREADS;

DEVICE uint32_t convert_one(uint32_t operation, uint32_t a, uint32_t b) {
    const float x = bit_cast<float>(a), y = bit_cast<float>(b);
    const uint16_t narrow = static_cast<uint16_t>(a);
    const uint8_t tiny = static_cast<uint8_t>(a);
    switch (operation) {
        case 0: return from_f32<f16>(x).bits;
        case 1: return bit_cast<uint32_t>(to_f32(f16{narrow}));
        case 2: return from_f32<bf16>(x).bits;
        case 3: return bit_cast<uint32_t>(to_f32(bf16{narrow}));
        case 4: return pack2<f16>(x, y);
        case 5: return pack2<bf16>(x, y);
        case 6: return bit_cast<uint32_t>(unpack2<f16>(a).x);
        case 7: return bit_cast<uint32_t>(unpack2<f16>(a).y);
        case 8: return bit_cast<uint32_t>(unpack2<bf16>(a).y);
        case 9: return cvt_tf32_f32(x);
        case 10: return from_f32<e4m3>(x).bits;
        case 11: return from_f32<e5m2>(x).bits;
        case 12: return bit_cast<uint32_t>(to_f32(e4m3{tiny}));
        case 13: return bit_cast<uint32_t>(to_f32(e5m2{tiny}));
        case 14: return cvt_e4m3x2_f32(x, y);
        case 15: return cvt_e5m2x2_f32(x, y);
        case 16: return cvt_f16x2_e4m3x2(narrow);
        case 17: return cvt_f16x2_e5m2x2(narrow);
        // The software that stands in for missing instructions, on every architecture.
        case 18: return software::f16_from_f32(x);
        case 19: return bit_cast<uint32_t>(software::f32_from_f16(narrow));
        case 20: return software::bf16_from_f32(x);
        case 21: return software::e4m3_from_f32(x);
        case 22: return software::e5m2_from_f32(x);
        case 23: return software::f16_from_e4m3(tiny);
        case 24: return software::f16_from_e5m2(tiny);
        // Four fp8 in a word, pair by pair.
        case 25: return cvt_f16x2_e4m3x4<0>(a);
        case 26: return cvt_f16x2_e4m3x4<1>(a);
        case 27: return arithmetic_f16x2_e4m3x4<0>(a);
        case 28: return arithmetic_f16x2_e4m3x4<1>(a);
        case 29: return cvt_bf16x2_e4m3x4<0>(a);
        case 30: return cvt_bf16x2_e4m3x4<1>(a);
        default: __trap();
    }
    return 0;
}

KERNEL(256, 1) convert(const uint32_t* first, const uint32_t* second, uint32_t* out, uint32_t n, uint32_t operation) {
    const uint32_t begin = blockIdx.x * PER_BLOCK;
    const uint32_t end = min(begin + PER_BLOCK, n);
    for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) out[i] = convert_one(operation, first[i], second[i]);
}
