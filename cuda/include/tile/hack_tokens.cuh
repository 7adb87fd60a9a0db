// Where the tokens of a sequence in a quantized KV cache lie, and which of them a query sees.
//
// A sequence is `sinks` tokens in 16 bits, `closed` blocks of `partition` tokens in pages, `open` tokens in 16 bits, in this
// order.
#pragma once

#include "core.cuh"
#include "hack_decode_params.h"

// Tokens [begin, end) that a query sees, and the first `sinks`.
struct VisibleTokens {
    uint32_t begin;
    uint32_t end;
    uint32_t sinks;

    DEVICE bool sees(uint32_t token) const { return token < end && (token >= begin || token < sinks); }
};

// What a query sees whose position is `own` − 1, of kv_len tokens: those up to its own, of them the last `window` and the first
// `window_sinks`.
DEVICE VisibleTokens visible_before(uint32_t own, uint32_t kv_len, const HackDecodeParams& params) {
    const bool cut = params.window != 0 && own > params.window;
    return {cut ? own - params.window : 0, own < kv_len ? own : kv_len, cut ? params.window_sinks : 0};
}

// Query i of q_len sits at kv_len − q_len + i.
DEVICE VisibleTokens visible_tokens(uint32_t query, uint32_t kv_len, const HackDecodeParams& params) {
    const uint32_t own = kv_len + query + 1 > params.q_len ? kv_len + query + 1 - params.q_len : 0;
    return visible_before(own, kv_len, params);
}

struct HackTokens {
    uint32_t sinks;
    uint32_t closed;       // blocks
    uint32_t open;         // tokens
    uint32_t first_block;  // the first that some query sees, or `closed`

    DEVICE HackTokens(uint32_t kv_len, const HackDecodeParams& params) {
        sinks = kv_len < params.sinks ? kv_len : params.sinks;
        closed = (kv_len - sinks) / params.partition;
        open = (kv_len - sinks) % params.partition;
        const uint32_t begin = visible_tokens(0, kv_len, params).begin;
        first_block = begin > sinks ? (begin - sinks) / params.partition : 0;
        if (first_block > closed) first_block = closed;
    }
};
