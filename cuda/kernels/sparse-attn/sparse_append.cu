// Appends the keys and values of new tokens to the open pages of each request.
//
// k_new       [requests, tokens, kv_heads, k_bytes], v_new [requests, tokens, kv_heads, v_bytes], 16-byte aligned; keys after RoPE
// kv_len      [requests] u32, tokens of each request with the new ones: new token i is token kv_len − tokens + i
// new_len     [requests] u32, how many of the new tokens exist, the last ones; null where all do, or as many as kv_len has
// closed      [rows] u32, tokens in closed pages, row = request · kv_heads + kv_head
// open_table  [rows, max_open] u32, run of each open page
// runs        [num_runs, K [page, k_bytes] | V [page, v_bytes]], 16-byte aligned
// status      first fault: FAULT_BAD_LENGTH with a request whose token lies in a closed page or past the open ones,
//             FAULT_BAD_PAGE with one whose run is out of range; the token's vectors there are left out
//
// Arch:    sm_80 and later.
// Mapping: one block per token; threads take 16-byte chunks of all its vectors.
// Budget:  64 registers, no shared memory.
// Limit:   bytes: each vector read once and written once.
#include "core.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "sparse_pages_params.h"
#include "status_params.h"
#include "tile/status.cuh"

constexpr uint32_t THREADS = 128;

KERNEL(128, 8)
sparse_append(const uint8_t* k_new, const uint8_t* v_new, const uint32_t* kv_len, const uint32_t* new_len,
              const uint32_t* closed, const uint32_t* open_table, uint8_t* runs, uint64_t* status,
              const __grid_constant__ SparseAppendParams params) {
    const uint32_t request = blockIdx.x / params.tokens;
    const uint32_t number = blockIdx.x % params.tokens;
    grid_dependency_wait();
    const uint32_t len = kv_len[request];
    const uint32_t exist = new_len == nullptr ? len : min(new_len[request], len);
    if (static_cast<uint64_t>(exist) + number < params.tokens) return;
    const uint32_t token = len + number - params.tokens;

    const uint32_t k_chunks = params.k_bytes / 16;
    const uint32_t v_chunks = params.v_bytes / 16;
    const uint32_t per_head = k_chunks + v_chunks;
    const uint64_t run_bytes = static_cast<uint64_t>(params.k_bytes + params.v_bytes) << params.page_shift;
    for (uint32_t index = threadIdx.x; index < params.kv_heads * per_head; index += THREADS) {
        const uint32_t head = index / per_head;
        const uint32_t row = request * params.kv_heads + head;
        const uint32_t before = closed[row];
        const uint32_t page = token >= before ? (token - before) >> params.page_shift : params.max_open;
        if (page >= params.max_open) {
            report_fault(status, FAULT_BAD_LENGTH, request);
            continue;
        }
        const uint32_t run = open_table[static_cast<uint64_t>(row) * params.max_open + page];
        if (run >= params.num_runs) {
            report_fault(status, FAULT_BAD_PAGE, request);
            continue;
        }
        const uint32_t in_page = (token - before) & ((1u << params.page_shift) - 1);
        const uint64_t vector = static_cast<uint64_t>(blockIdx.x) * params.kv_heads + head;
        const uint32_t chunk = index % per_head;
        uint8_t* const to = runs + run * run_bytes;
        if (chunk < k_chunks) {
            store_global_16(to + in_page * params.k_bytes + chunk * 16,
                            load_global_16(k_new + vector * params.k_bytes + chunk * 16));
        } else {
            const uint32_t at = (chunk - k_chunks) * 16;
            store_global_16(to + (params.k_bytes << params.page_shift) + in_page * params.v_bytes + at,
                            load_global_16(v_new + vector * params.v_bytes + at));
        }
    }
}
