// What those who list tiles of a prefill and the kernels agree on: which keys a query sees.
//
// A segment is a run of queries with the keys that they are aligned to, the queries of a sequence for one. prefill_plan lists
// the tiles of all segments as PrefillTile, each with all its keys as one span. Whoever lists tiles another way, such as the
// pairs of query and key segments of a ring step, runs the same kernels: segments of tokens that lie evenly apart are runs too,
// where both have the same stride, for then each query sees one key more than the one before.
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

// For query `query` of a tile's segment, of whose span `kv_len` keys can be read.
DEVICE Visible visible_to(uint32_t query, const PrefillTile& tile, uint32_t kv_len) {
    // Neither sum wraps: queries and keys together are below 2^31.
    const int32_t past = static_cast<int32_t>(query) + tile.end;
    const int32_t first = static_cast<int32_t>(query) + tile.begin;
    const uint32_t end = min(static_cast<uint32_t>(max(past, 0)), kv_len);
    return {static_cast<uint32_t>(max(first, 0)), max(end, min(tile.prefix, kv_len)), min(tile.sinks, end)};
}

// The tile of a segment's rows from `first_row` on, with all its keys as one span: the queries are aligned to their end, and see
// what the mask of params says.
DEVICE PrefillTile segment_tile(uint32_t sequence, uint32_t first_query, uint32_t queries, uint32_t first_row, uint32_t kv_start,
                                uint32_t kv_len, const PrefillParams& params) {
    PrefillTile tile{sequence, first_query, queries, first_row, kv_start, kv_len, 0, 0, params.sinks, params.prefix, 0, 0};
    const int32_t first = -static_cast<int32_t>(queries);
    tile.end = static_cast<int32_t>(kv_len) + (params.causal != 0 ? first + 1 : 0);
    // The window's first key, or where that is before the first key for the last query too, the first key.
    tile.begin = params.window != 0 && params.window <= kv_len ? tile.end - static_cast<int32_t>(params.window) : first;
    return tile;
}
