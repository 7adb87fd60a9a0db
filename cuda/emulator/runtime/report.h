// Ending a block with a report.
#pragma once

#include "block.h"

namespace emulator {

// Offset of a return address in this executable or library. Reports write places as `{@hex}`; the Rust side turns them
// into file and line.
Place place_of(const void* pc);

// Ends the running block: its fibers are abandoned and its OS thread goes on with the next block. The report opens
// with the message and says which thread did it, where.
[[noreturn]] void fail(const void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The same for two accesses without order.
[[noreturn]] void fail_conflict(const void* pc, const char* memory, const Conflict& conflict, const std::string& bytes);

// Ends the block because no thread can go on, and says where each of them waits.
[[noreturn]] void fail_deadlock(const char* why);

// "thread 37 (warp 1, lane 5)".
std::string thread_name(const Block& block, unsigned thread);

}  // namespace emulator
