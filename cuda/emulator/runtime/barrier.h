// Block barriers: `__syncthreads` and the numbered ones.
#pragma once

#include "block.h"

namespace emulator {

// A thread has ended: whoever waits for it in `__syncthreads` waits for ever.
void barrier_thread_ended(Block& block);

}  // namespace emulator
