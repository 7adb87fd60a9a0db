/* Parameters of the kernels in kernels/attention/merge_states*.cu. */
#ifndef LONGKV_MERGE_STATES_PARAMS_H
#define LONGKV_MERGE_STATES_PARAMS_H

#include <stdint.h>

/* Shape of one merge of partial attention states. */
struct MergeStatesParams {
    /* Rows to merge, each into one state. */
    uint32_t rows;
    /* Partial states stored per row; a row's own count may be smaller. */
    uint32_t max_splits;
    /* Partial states that one block folds; only the last-arriver kernel reads it. */
    uint32_t splits_per_block;
    /* Explicit padding, always 0. */
    uint32_t _pad;
};

#endif
