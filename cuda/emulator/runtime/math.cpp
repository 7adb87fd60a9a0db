// Functions that a GPU approximates and that are exact here.
#include <cmath>

#include "emulator_api.h"
#include "report.h"

namespace emulator {

float exp2_approx(float x) { return std::exp2(x); }
float rcp_approx(float x) { return 1.0f / x; }
float log2_approx(float x) { return std::log2(x); }

void trap() { fail(__builtin_return_address(0), "__trap()"); }

}  // namespace emulator
