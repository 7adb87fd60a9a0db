// Every conversion of ptx/convert.cuh and types.cuh, element by element.
//
// first [n], second [n] u32: f32 bits, or narrow bits in the low half   out [n] u32
// operation: see the switch; those of one operand ignore `second`.
//
// Arch:    sm_80 and later; fp8 by instruction from sm_89 on, by software before.
// Mapping: one thread per element.
// Budget:  24 registers, no shared memory.
// Limit:   none that matters: it exists to be compared bit by bit.
#include "types.cuh"

KERNEL(256, 1) convert(const uint32_t* first, const uint32_t* second, uint32_t* out, uint32_t n, uint32_t operation) {
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const uint32_t a = first[i], b = second[i];
    const float x = bit_cast<float>(a), y = bit_cast<float>(b);
    const uint16_t narrow = static_cast<uint16_t>(a);
    const uint8_t tiny = static_cast<uint8_t>(a);
    uint32_t result = 0;
    switch (operation) {
        case 0: result = from_f32<f16>(x).bits; break;
        case 1: result = bit_cast<uint32_t>(to_f32(f16{narrow})); break;
        case 2: result = from_f32<bf16>(x).bits; break;
        case 3: result = bit_cast<uint32_t>(to_f32(bf16{narrow})); break;
        case 4: result = pack2<f16>(x, y); break;
        case 5: result = pack2<bf16>(x, y); break;
        case 6: result = bit_cast<uint32_t>(unpack2<f16>(a).x); break;
        case 7: result = bit_cast<uint32_t>(unpack2<f16>(a).y); break;
        case 8: result = bit_cast<uint32_t>(unpack2<bf16>(a).y); break;
        case 9: result = cvt_tf32_f32(x); break;
        case 10: result = from_f32<e4m3>(x).bits; break;
        case 11: result = from_f32<e5m2>(x).bits; break;
        case 12: result = bit_cast<uint32_t>(to_f32(e4m3{tiny})); break;
        case 13: result = bit_cast<uint32_t>(to_f32(e5m2{tiny})); break;
        case 14: result = cvt_e4m3x2_f32(x, y); break;
        case 15: result = cvt_e5m2x2_f32(x, y); break;
        case 16: result = cvt_f16x2_e4m3x2(narrow); break;
        case 17: result = cvt_f16x2_e5m2x2(narrow); break;
        // The software that stands in for missing instructions, on every architecture.
        case 18: result = software::f16_from_f32(x); break;
        case 19: result = bit_cast<uint32_t>(software::f32_from_f16(narrow)); break;
        case 20: result = software::bf16_from_f32(x); break;
        case 21: result = software::e4m3_from_f32(x); break;
        case 22: result = software::e5m2_from_f32(x); break;
        case 23: result = software::f16_from_e4m3(tiny); break;
        case 24: result = software::f16_from_e5m2(tiny); break;
        default: __trap();
    }
    out[i] = result;
}
