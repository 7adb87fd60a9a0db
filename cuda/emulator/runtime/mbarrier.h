// mbarriers, and the copies that complete on them: bulk loads, TMA tiles, arrivals of cp.async.
#pragma once

#include "block.h"

namespace emulator {

// Queues an operation that completes on `copy.mbar`; it is performed when nobody can go on without it.
void issue_pending(PendingCopy copy, const void* pc);

// No thread is ready: performs copies that somebody waits for, or lets pollers look again.
void advance_mbarriers(Block& block);

// The thread waits for all its cp.async: also for those that were handed to mbarriers.
void complete_cp_async_arrivals(Thread& self);

// Fails if copies are on their way into shared memory when the block ends.
void check_block_end(Block& block);

}  // namespace emulator
