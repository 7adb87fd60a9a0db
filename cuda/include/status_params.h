/* Codes that a kernel leaves in the status word when a value in device memory is wrong. */
#ifndef LONGKV_STATUS_PARAMS_H
#define LONGKV_STATUS_PARAMS_H

#include <stdint.h>

/* What a kernel found wrong with one row: the high 32 bits of the status word. The low 32 bits are the row's index. */
enum FaultCode {
    /* Nothing is wrong. */
    FAULT_NONE = 0,
    /* A length exceeds the plan's maximum, or the memory that holds the sequence. */
    FAULT_BAD_LENGTH = 1,
    /* A page id lies outside the pool. */
    FAULT_BAD_PAGE = 2,
    /* A number of splits exceeds the plan's maximum. */
    FAULT_BAD_SPLITS = 3,
    /* A row, slot or head index lies outside its array. */
    FAULT_BAD_INDEX = 4,
    /* A work range or an offset array is not ascending, or ends outside its array. */
    FAULT_BAD_RANGE = 5,
    /* What a row was given was made for an earlier state of it. */
    FAULT_STALE = 6
};

#endif
