/* Parameters of the kernels in kernels/sparse-attn/sparse_summarise.cu, sparse_score.cu and sparse_select.cu. */
#ifndef LONGKV_SPARSE_SELECT_PARAMS_H
#define LONGKV_SPARSE_SELECT_PARAMS_H

#include <stdint.h>

/* What summarises a chunk of keys, and what its two vectors are multiplied with. */
enum SparseScorer {
    /* Minimum and maximum, with the negative and the positive part of the query. */
    SPARSE_MIN_MAX = 0,
    /* Centre of the box and mean distance from it, with the query and its size. */
    SPARSE_CUBOID_MEAN = 1,
    /* Mean and standard deviation, with the query and its weighted size. */
    SPARSE_MEAN_STD = 2,
    /* Mean alone. */
    SPARSE_MEAN = 3
};

/* How the scores of a group become one. */
enum SparseAggregation {
    /* Largest raw score. */
    SPARSE_RAW = 0,
    /* Largest probability. */
    SPARSE_MAX = 1,
    /* Mean probability. */
    SPARSE_AVERAGE = 2,
    /* Sum of probabilities. */
    SPARSE_SUM = 3
};

/* Shape of one round of summaries. */
struct SparseSummariseParams {
    /* (Request, KV head) pairs. */
    uint32_t rows;
    /* Entries that a row's list of closed pages can hold. */
    uint32_t max_closing;
    /* Pages of a chunk. */
    uint32_t chunk_pages;
    /* log2 of the tokens in a page. */
    uint32_t page_shift;
    /* Elements of a key. */
    uint32_t dim;
    /* Elements of a run: keys, then values. */
    uint32_t run_elements;
    /* Runs of device memory. */
    uint32_t num_runs;
    /* Partitions that a row may have. */
    uint32_t max_partitions;
    /* A SparseScorer. */
    uint32_t scorer;
    /* Explicit padding, always 0. */
    uint32_t _pad;
};

/* Shape of one round of scores. */
struct SparseScoreParams {
    /* (Request, KV head) pairs. */
    uint32_t rows;
    /* Queries of a row, 1 to 16. */
    uint32_t group;
    /* Partitions that a row may have. */
    uint32_t max_partitions;
    /* A SparseScorer: how queries meet summaries. */
    uint32_t scorer;
    /* Blocks of a row. */
    uint32_t blocks;
    /* How much a deviation counts, for SPARSE_MEAN_STD. */
    float weight;
    /* Scale of the softmax under which a group agrees. */
    float scale;
    /* Its soft-cap; 0 for none. */
    float soft_cap;
};

/* Shape and rule of one selection. */
struct SparseSelectParams {
    /* Share of a row's partitions that is estimated, after those that are read. */
    double estimate;
    /* (Request, KV head) pairs. */
    uint32_t rows;
    /* Rows of scores of a row, 1 to 16. */
    uint32_t columns;
    /* Partitions that a row may have. */
    uint32_t max_partitions;
    /* Blocks of a row in the scores' partial sums. */
    uint32_t blocks;
    /* Pages that a row may select. */
    uint32_t max_selected;
    /* Partitions that a row may estimate. */
    uint32_t max_estimated;
    /* First partitions that are always kept. */
    uint32_t sinks;
    /* Last partitions that are always kept. */
    uint32_t recent;
    /* Pages of a partition, where all have the same number. */
    uint32_t partition_pages;
    /* A SparseAggregation. */
    uint32_t aggregation;
    /* Scale of the softmax under which a group agrees. */
    float scale;
    /* Its soft-cap; 0 for none. */
    float soft_cap;
};

#endif
