/* Parameters of the kernels in kernels/hybrid-gemm. */
#ifndef LONGKV_HYBRID_GEMM_PARAMS_H
#define LONGKV_HYBRID_GEMM_PARAMS_H

#include <stdint.h>

/* Constants of the packed layout of weights: hybrid-gemm/src/pack. */
enum HybridGemmLayout {
    /* Output features of a tile. */
    HYBRID_TILE_ROWS = 64,
    /* Bytes of a slab: 64 rows of 128 bytes. */
    HYBRID_SLAB_BYTES = 8192,
    /* Tokens of a panel of hybrid_small_m. */
    HYBRID_SMALL_PANEL = 64,
    /* Tokens of a panel of hybrid_large_m. */
    HYBRID_LARGE_PANEL = 256,
    /* Output features, and inputs, of a block of fp8 weights. */
    HYBRID_FP8_BLOCK = 128
};

/* Values of the constant FORMAT: how weights are stored. Other values are int4 codes in groups of so many inputs, a multiple of 32. */
enum HybridGemmFormat {
    /* As X. */
    HYBRID_FORMAT_FLOAT = 0,
    /* Signed codes of 8 bits with one f32 scale per output feature. */
    HYBRID_FORMAT_INT8 = 1,
    /* fp8 e4m3 with one f32 scale per output feature. */
    HYBRID_FORMAT_FP8_ROWS = 2,
    /* fp8 e4m3 with one f32 scale per block. */
    HYBRID_FORMAT_FP8_BLOCKS = 3,
    /* Added to the inputs of a group: int4 codes with zero points. */
    HYBRID_FORMAT_ZERO_POINTS = 1
};

/* The function between product and residual. */
enum HybridGemmActivation {
    /* None. */
    HYBRID_IDENTITY = 0,
    /* x / (1 + exp(-x)) */
    HYBRID_SILU = 1,
    /* The tanh form of GELU. */
    HYBRID_GELU_TANH = 2,
    /* silu(gate) * up of interleaved rows. */
    HYBRID_SWIGLU = 3
};

/* The tile schedule of a launch, in device memory so that a captured graph follows a change: hybrid-gemm/src/schedule.rs. */
struct HybridGemmSchedule {
    /* Tokens M. */
    uint32_t tokens;
    /* Tokens of a panel. */
    uint32_t panel;
    /* K tiles of a column. */
    uint32_t k_tiles;
    /* First column of the launch. */
    uint32_t first_column;
    /* Host columns of the output-stationary role, from first_column. */
    uint32_t os_columns;
    /* Host columns of the weight-stationary role, behind those. */
    uint32_t ws_columns;
    /* Columns in HBM, behind those. */
    uint32_t hbm_columns;
    /* Blocks of the output-stationary role. */
    uint32_t os_blocks;
    /* Blocks of the weight-stationary role. */
    uint32_t ws_blocks;
    /* Blocks of the HBM role. */
    uint32_t hbm_blocks;
    /* Blocks that share a fetch: 1. */
    uint32_t cluster;
    /* Which block of each role gets the first item. */
    uint32_t rotation[3];
    /* 0. */
    uint32_t padding[2];
};

/* Where the columns of an expert of a grouped product lie: hybrid-gemm/src/grouped.rs. */
struct HybridGemmExpert {
    /* Bytes before its columns in host memory. */
    uint64_t host_offset;
    /* Bytes before its columns in HBM. */
    uint64_t hbm_offset;
    /* Its columns in host memory, the first ones; the rest is in HBM. */
    uint32_t host_columns;
    /* 0. */
    uint32_t padding;
};

/* What launches moved since the receipt was last zeroed: hybrid-gemm/src/traffic.rs. */
struct HybridGemmTraffic {
    /* Weight tiles fetched over the host link. */
    uint64_t link_tiles;
    /* Bytes of weights over the host link. */
    uint64_t link_bytes;
    /* Weight tiles fetched from HBM. */
    uint64_t hbm_tiles;
    /* Bytes of weights from HBM. */
    uint64_t hbm_weight_bytes;
    /* Bytes of weights that a copy engine wrote to HBM, of the link's: booked by the launch behind each copy, whatever it reads. */
    uint64_t staged_bytes;
    /* Bytes of activations. */
    uint64_t activation_bytes;
    /* Bytes of partial sums, written and read. */
    uint64_t partial_bytes;
    /* Bytes of outputs, and of the residual. */
    uint64_t output_bytes;
    /* Additions and multiplications. */
    uint64_t flops;
    /* Nanoseconds that the blocks of each role worked, all together. */
    uint64_t role_ns[3];
};

/* Shapes and layouts of one product. */
struct HybridGemmParams {
    /* Elements between two rows of X. */
    int64_t x_stride;
    /* Elements between two rows of O. */
    int64_t out_stride;
    /* Elements between two rows of the residual. */
    int64_t residual_stride;
    /* Bytes from a packed column to the next. */
    uint64_t column_bytes;
    /* f32 of partial sums that the workspace has. */
    uint64_t partial_len;
    /* Bytes of all experts' columns in host memory, of a grouped product. */
    uint64_t host_bytes;
    /* Bytes of all experts' columns in HBM. */
    uint64_t hbm_bytes;
    /* Bytes that a copy engine has brought from host memory for this launch, whose weights in HBM they are; 0 for others. */
    uint64_t staged_bytes;
    /* Rows of X and O: the schedule's tokens are at most as many. */
    uint32_t max_tokens;
    /* Output features. */
    uint32_t n;
    /* Inputs. */
    uint32_t k;
    /* Slabs of a full tile. */
    uint32_t tile_slabs;
    /* Columns in host memory, the first ones; of a grouped product, the most that an expert has there. */
    uint32_t host_columns;
    /* The column that the weights in HBM start with. */
    uint32_t hbm_first;
    /* Columns that the weights in HBM have. */
    uint32_t hbm_columns;
    /* Whether the weights in host memory are row-major [n, k]; else they are packed. */
    uint32_t host_row_major;
    /* Whether the weights in HBM are row-major, as a staged slab of such a matrix is. */
    uint32_t hbm_row_major;
    /* Parts that the K tiles of a column are dealt to: grid.y. */
    uint32_t k_splits;
    /* Type of O and of the residual: DTYPE of types.cuh. */
    uint32_t out_dtype;
    /* One of HybridGemmActivation. */
    uint32_t activation;
    /* Experts of a grouped product; 0 for a single one. */
    uint32_t experts;
    /* Tiles of those staged bytes. */
    uint32_t staged_tiles;
};

#endif
