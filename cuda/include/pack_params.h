/* Parameters of kernels/seq-parallel/pack.cu. */
#ifndef LONGKV_PACK_PARAMS_H
#define LONGKV_PACK_PARAMS_H

#include <stdint.h>

/* Numbers of kernels/seq-parallel/pack.cu. */
enum PackConstants {
    /* Buffers that one launch reads, and as many that it writes. */
    PACK_BUFFERS = 3,
    /* Bytes of the smallest unit: what offsets, strides and rows are multiples of. */
    PACK_UNIT = 4
};

/* Rows of bytes, evenly apart in one buffer, to rows evenly apart in another. */
struct PackCopy {
    /* First byte of the first row, in its source. */
    uint64_t source_offset;
    /* Bytes between two rows there. */
    uint64_t source_stride;
    /* First byte of the first row, in its destination. */
    uint64_t destination_offset;
    /* Bytes between two rows there. */
    uint64_t destination_stride;
    /* Rows. */
    uint32_t rows;
    /* Bytes of a row. */
    uint32_t row_bytes;
    /* Number of the source. */
    uint32_t source;
    /* Number of the destination. */
    uint32_t destination;
};

/* Sizes of the buffers of one launch. */
struct PackParams {
    /* Bytes of each source; 0 for one that is not there. */
    uint64_t source_bytes[PACK_BUFFERS];
    /* Bytes of each destination; 0 for one that is not there. */
    uint64_t destination_bytes[PACK_BUFFERS];
};

#endif
