/* Fault codes that kernels write to the status word. */
#ifndef LONGKV_STATUS_PARAMS_H
#define LONGKV_STATUS_PARAMS_H

#include <stdint.h>

/* What was wrong with the row that a status word names. */
enum StatusCode {
    /* Nothing. */
    STATUS_OK = 0,
    /* A length is larger than what its row can hold. */
    STATUS_BAD_LENGTH = 1,
    /* A page id lies outside the page pool. */
    STATUS_BAD_PAGE = 2,
    /* A row claims more partial states than are stored for it. */
    STATUS_BAD_SPLITS = 3
};

#endif
