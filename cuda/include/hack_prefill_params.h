/* Parameters of kernels/homomorphic-quant/hack_prefill.cu. */
#ifndef LONGKV_HACK_PREFILL_PARAMS_H
#define LONGKV_HACK_PREFILL_PARAMS_H

#include "hack_decode_params.h"

/* Shape, layout and mask of a prefill over a quantized KV cache. */
struct HackPrefillParams {
    /* Cache, heads, mask and score. Of what it says on queries, q_len is the most that a sequence has; what it says on splits is
     * not read. */
    struct HackDecodeParams cache;
    /* Query tokens of all sequences. */
    uint32_t num_queries;
    /* 1 where the cache holds the queries' own tokens, as its last; 0 where the queries come after all that it holds. */
    uint32_t cached;
    /* 1 where the softmax state starts from the one stored, 0 where it starts empty. */
    uint32_t resume;
    /* 1 where the state is left as it is, unnormalised; 0 where outputs are written. */
    uint32_t keep;
};

#endif
