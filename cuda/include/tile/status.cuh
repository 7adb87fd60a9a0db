// The status word: what a kernel found wrong in values that live in device memory.
//
// One 64-bit word of the caller, zero when all is well: the code in bits 32-63, the index of the offending row in bits 0-31.
// The first report since the caller last cleared the word wins; later ones are dropped, so that the word always names one
// real row. Which of several bad rows that is depends on timing. The caller reads the word when it likes.
#pragma once

#include "core.cuh"
#include "ptx/sync.cuh"

// Reports `code` (not 0) for row `index`. `status` may be null: then nothing is reported.
DEVICE void report_fault(uint64_t* status, uint32_t code, uint32_t index) {
    if (status != nullptr) atomic_cas_acq_rel_u64(status, 0, static_cast<uint64_t>(code) << 32 | index);
}
