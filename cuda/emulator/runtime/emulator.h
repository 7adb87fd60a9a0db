// What a CUDA kernel sees when it is compiled for the CPU: keywords, builtins and the functions behind the `ptx/`
// wrappers.
//
// Every emulated variant of a kernel is one translation unit:
//
//     #include "emulator.h"
//     namespace row_17 {
//     #define V_DIM 128
//     #include "attention/merge_states.cu"
//     }
//     EMULATOR_ENTRY(row_17, merge_states)
//
// The namespace keeps variants apart: two variants of one function template in one binary would otherwise be merged by
// the linker. This header is included before it, is light, and holds no state; all work is done by the runtime beside
// it.
#pragma once

#if defined(__CUDACC__)
#error "emulator.h is for the host compiler only"
#endif
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__)
#error "the emulator needs g++ on x86-64 Linux"
#endif

#include <stddef.h>
#include <stdint.h>
#include <type_traits>
#include <utility>

#include "emulator_api.h"
#include "emulator_builtins.h"

// Makes a kernel known to the runtime under the name of its namespace.
#define EMULATOR_ENTRY(space, kernel)                                                   \
    extern "C" const ::emulator::Entry emulator_entry_##space;                          \
    const ::emulator::Entry emulator_entry_##space = {                                  \
        &::emulator::Signature<decltype(&space::kernel)>::template run<&space::kernel>, \
        ::emulator::Signature<decltype(&space::kernel)>::parameters,                    \
        ::emulator::Signature<decltype(&space::kernel)>::count};
