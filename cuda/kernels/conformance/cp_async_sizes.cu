// Every form of cp.async: each thread copies one piece into a slot of its own.
//
// source [threads, 16 bytes]   form [threads] u32: 0-3 the 16-byte forms (plain, line, evict-first and evict-last policy),
// 4 16 bytes zero-filled, 5 8 bytes, 6 8 bytes zero-filled, 7 4 bytes, 8 4 bytes zero-filled
// source_bytes [threads] u32: how much a zero-filling form copies   out [threads, 32 bytes]: the slot afterwards
//
// A slot is 32 bytes of 0xEE; the piece goes to its middle, so that a copy that is too long shows.
//
// Arch:    sm_80 and later.
// Mapping: one thread per piece, blocks of 128.
// Budget:  32 registers, 4 KB of shared memory.
// Limit:   none that matters: it exists to be compared with the PTX ISA.
#include "core.cuh"
#include "ptx/cp_async.cuh"

KERNEL(128, 1) cp_async_sizes(const unsigned char* source, const uint32_t* form, const uint32_t* source_bytes, uint4* out) {
    DYNAMIC_SHARED(shared);
    const uint32_t thread = blockIdx.x * 128 + threadIdx.x;
    uint4* slot = reinterpret_cast<uint4*>(shared) + threadIdx.x * 2;
    slot[0] = slot[1] = make_uint4(0xeeeeeeeeu, 0xeeeeeeeeu, 0xeeeeeeeeu, 0xeeeeeeeeu);
    __syncthreads();

    const unsigned char* from = source + thread * 16;
    const uint32_t whole = shared_address(slot + 1);  // the upper half of the slot
    const uint32_t part = shared_address(slot) + 8;   // its middle
    const uint32_t bytes = source_bytes[thread];
    switch (form[thread]) {
        case 0: cp_async_16(whole, from); break;
        case 1: cp_async_16_line(whole, from); break;
        case 2: cp_async_16_policy(whole, from, l2_evict_first_policy()); break;
        case 3: cp_async_16_policy(whole, from, l2_evict_last_policy()); break;
        case 4: cp_async_16_zfill(whole, from, min(bytes, 16u)); break;
        case 5: cp_async_8(part, from); break;
        case 6: cp_async_8_zfill(part, from, min(bytes, 8u)); break;
        case 7: cp_async_4(part, from); break;
        case 8: cp_async_4_zfill(part, from, min(bytes, 4u)); break;
    }
    cp_async_commit();
    cp_async_wait<0>();
    out[thread * 2] = slot[0];
    out[thread * 2 + 1] = slot[1];
}
