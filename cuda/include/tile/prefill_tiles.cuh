// What prefill_plan and prefill agree on: which keys a query sees.
//
// A segment is a run of queries with the keys that they are aligned to, the queries of a sequence for one. A plan lists the
// tiles of all segments as PrefillTile; whoever lists tiles another way, such as the pairs of query and key segments of a
// ring step, some of them causal (on the diagonal) and some not, runs the same kernel.
#pragma once

#include "core.cuh"
#include "prefill_params.h"

// Keys that a query sees: [begin, end) and [0, sinks). All three grow with the query, so that what a run of queries sees
// together is the begin of the first, and the end and the sinks of the last.
struct Visible {
    uint32_t begin;
    uint32_t end;
    uint32_t sinks;

    DEVICE bool sees(uint32_t key) const { return (key >= begin && key < end) || key < sinks; }
};

// For query `query` of a segment of `queries` queries and `kv_len` keys.
DEVICE Visible visible_to(uint32_t query, uint32_t queries, uint32_t kv_len, bool causal, const PrefillParams& params) {
    // One past the query's own position; 0 where the segment has more queries than keys up to it.
    const uint32_t own = kv_len + query + 1 > queries ? kv_len + query + 1 - queries : 0;
    const uint32_t end = causal ? min(own, kv_len) : kv_len;
    const uint32_t begin = params.window != 0 && end > params.window ? end - params.window : 0;
    return {begin, max(end, min(params.prefix, kv_len)), min(params.sinks, end)};
}
