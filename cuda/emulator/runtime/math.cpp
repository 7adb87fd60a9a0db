// Functions that a GPU approximates and that are exact here, with subnormal numbers flushed to zero as there (`.ftz`).
#include <cmath>

#include "emulator_api.h"
#include "report.h"

namespace emulator {

namespace {

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace

float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
float rcp_approx(float x) { return flushed(1.0f / flushed(x)); }
float log2_approx(float x) { return std::log2(flushed(x)); }

void trap() { fail(__builtin_return_address(0), "__trap()"); }

}  // namespace emulator
