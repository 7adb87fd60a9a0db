// Which fiber runs next.
#pragma once

#include "block.h"

namespace emulator {

// The running thread cannot go on; its state says what for. Returns when somebody has made it ready.
void park();
// Lets the lanes of `mask` go on.
void make_ready(Warp& warp, uint32_t mask);
// Abandons all fibers of the block and returns to the OS thread's own stack.
[[noreturn]] void abandon_block();
// One look of a polling loop was in vain: lets everybody else run, other warps first. Fails where all threads only
// poll.
void spin(const void* pc, const char* what);
// Whether the running thread has seen this value in this place the last time it looked: then it polls.
bool poll_in_vain(const void* address, uint64_t value);

}  // namespace emulator
