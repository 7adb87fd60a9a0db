// Checks memory accesses: of kernels, through the compiler's instrumentation, and of the runtime on their behalf.
//
// With `EMULATOR_SANITIZE` the kernels are built for AddressSanitizer instead and report nothing here: then only
// bounds are checked.
#pragma once

#include "block.h"

namespace emulator {

#if defined(EMULATOR_SANITIZE)
constexpr bool CHECKED = false;
#else
constexpr bool CHECKED = true;
#endif

// What the running thread is about to do to [address, address + bytes), wherever that is.
void check_access(const void* address, size_t bytes, Kind kind, const void* pc);

// ---- shared memory, by shared address -----------------------------------------------------------------------------

// The bytes behind a shared address. Fails unless all of them lie within the launch's dynamic shared memory, aligned.
unsigned char* shared_bytes(uint32_t address, size_t bytes, size_t alignment, const char* what, const void* pc);
// An access by another thread of the running warp.
void check_shared(const Thread& thread, uint32_t address, size_t bytes, Kind kind, const void* pc);
// A read or write by the running thread for an operation of the async proxy: earlier writes through the generic proxy need a
// proxy fence. Writes that are not known to be earlier are the marks' to report.
void check_proxy_fence(const Thread& thread, uint32_t address, size_t bytes, Kind kind, const char* what, const void* pc);

// ---- asynchronous operations --------------------------------------------------------------------------------------
// Between issue and completion the bytes are marked: nobody may touch what is being written, nor write what is being
// read.

// The stamp for an operation that `thread` issues now.
Stamp under_way_stamp(const Thread& thread);
void mark_shared(const Thread& thread, Stamp mark, uint32_t address, size_t bytes, Kind kind, const void* pc);
// Replaces the marks by an access of `done`.
void complete_shared(const Thread& thread, Stamp mark, Stamp done, uint32_t address, size_t bytes, Kind kind,
                     const void* pc);
void mark_global(const Thread& thread, Stamp mark, const void* address, size_t bytes, const void* pc);
void complete_global(Stamp mark, Stamp done, const void* address, size_t bytes);
// The bytes hold an mbarrier: nobody may touch them. `mark`: a stamp that is under way. Or they hold nothing any more.
void set_shared(Stamp mark, uint32_t address, size_t bytes);

// Whether the access happened before what `thread` does next.
bool happened_before(const Thread& thread, Stamp stamp);

}  // namespace emulator
