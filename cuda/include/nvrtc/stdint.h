// What `#include <stdint.h>` finds under NVRTC.
//
// NVRTC has no C library, yet the `*_params.h` headers are also read by bindgen and must name their types as plain C does.
// This file is embedded under the name "stdint.h" and gives NVRTC those names; any other compiler that meets it is sent on
// to its own header, so that the embedded copies may stand first on an include path.
#ifndef __CUDACC_RTC__
#include_next <stdint.h>
#elif !defined(LONGKV_STDINT_H)
#define LONGKV_STDINT_H
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#endif
