// Fibers: a stack each and a switch in a dozen instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 512 * 1024;  // red zones make frames several times larger
#else
constexpr size_t STACK_BYTES = 128 * 1024;
#endif

// Maps a stack with a guard page below it; returns its lowest usable byte.
uintptr_t map_stack();
void unmap_stack(uintptr_t low);
// The stack pointer of a fiber that will call `entry`, which must not return. `number` tells neighbouring fibers apart.
void* prepare_stack(uintptr_t low, unsigned number, void (*entry)());

}  // namespace emulator

// Saves the running context's stack pointer to *save and goes on where `to` was saved. Only the registers that the
// System V ABI lets a callee keep are saved; kernels never change the floating-point control words.
extern "C" void emulator_switch(void** save, void* to);
