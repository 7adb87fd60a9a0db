// Checks, on the device and once per step, that the keys of a sequence can be read.
//
// Params is the parameter struct of a kernel over a KV cache: batch, kv_heads, table_batch_stride, table_head_stride,
// page_shift, max_pages, num_pages, num_tokens and max_kv_len. Lengths are left in valid_len [tables, batch], where a table
// is a KV head's own block table, or the one that all heads share: a bad page id in one head's table harms that head alone.
#pragma once

#include "core.cuh"
#include "status_params.h"
#include "tile/status.cuh"

// Block tables per sequence; 1 for a contiguous cache.
template <class Params>
DEVICE uint32_t tables_of(const Params& params) {
    return params.table_head_stride == 0 ? 1 : params.kv_heads;
}

// The length of a sequence for one KV head, as check_sequence left it.
template <class Params>
DEVICE uint32_t valid_len_of(const uint32_t* valid_len, uint32_t sequence, uint32_t kv_head, const Params& params) {
    return valid_len[(params.table_head_stride == 0 ? 0 : static_cast<uint64_t>(kv_head) * params.batch) + sequence];
}

// The longest of a sequence's lengths.
template <class Params>
DEVICE uint32_t longest_len_of(const uint32_t* valid_len, uint32_t sequence, const Params& params) {
    uint32_t longest = 0;
    for (uint32_t table = 0; table < tables_of(params); table++) {
        longest = max(longest, valid_len_of(valid_len, sequence, table, params));
    }
    return longest;
}

// Leaves `len` in valid_len for every table of the sequence through which the keys [0, sinks) and [begin, len) can be read,
// 0 for the others, and reports the first fault. Entries of pages in between, which no query sees, may hold anything. The
// whole block calls; its threads see the lengths afterwards.
template <uint32_t Threads, class Params>
DEVICE void check_sequence(uint32_t sequence, uint32_t len, uint32_t begin, uint32_t sinks, const uint32_t* kv_start,
                           const uint32_t* block_table, uint32_t* valid_len, uint64_t* status, const Params& params) {
    bool too_long = len > params.max_kv_len;
    if (block_table == nullptr) {
        too_long = too_long || (len > 0 && static_cast<uint64_t>(kv_start[sequence]) + len > params.num_tokens);
    } else {
        too_long = too_long || len > static_cast<uint64_t>(params.max_pages) << params.page_shift;
    }
    const uint32_t readable = too_long ? 0 : len;
    const uint32_t tables = tables_of(params);
    for (uint32_t table = threadIdx.x; table < tables; table += Threads) {
        valid_len[static_cast<uint64_t>(table) * params.batch + sequence] = readable;
    }
    __syncthreads();
    if (block_table != nullptr && readable != 0) {
        const uint64_t page_size = 1ull << params.page_shift;
        const uint32_t first_page = begin >> params.page_shift;
        const uint32_t sink_pages = min(static_cast<uint32_t>(ceil_div<uint64_t>(sinks, page_size)), first_page);
        const uint32_t pages = sink_pages + static_cast<uint32_t>(ceil_div<uint64_t>(readable, page_size)) - first_page;
        for (uint32_t table = 0; table < tables; table++) {
            const uint32_t* entries =
                block_table + table * params.table_head_stride + sequence * params.table_batch_stride;
            bool bad = false;
            for (uint32_t i = threadIdx.x; i < pages; i += Threads) {
                bad |= entries[i < sink_pages ? i : first_page + i - sink_pages] >= params.num_pages;
            }
            if (bad) {
                atomicAnd(&valid_len[static_cast<uint64_t>(table) * params.batch + sequence], 0u);
                report_fault(status, FAULT_BAD_PAGE, sequence);
            }
        }
        __syncthreads();
    }
    if (too_long && threadIdx.x == 0) report_fault(status, FAULT_BAD_LENGTH, sequence);
}
