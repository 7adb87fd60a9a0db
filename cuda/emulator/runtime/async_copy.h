// What a thread may not leave behind.
#pragma once

#include "block.h"

namespace emulator {

// Fails if copies of the running thread are still on their way: they would land in memory that is no longer the
// block's.
void check_thread_end(Thread& self);

// Completes the thread's cp.async copies: their bytes count as written by `done`.
void complete_copies(const Thread& issuer, const std::vector<CpAsync>& copies, size_t count, Stamp mark_of_issue,
                     Stamp done);

}  // namespace emulator
