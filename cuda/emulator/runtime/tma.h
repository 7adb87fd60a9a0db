// Tiles of tensor maps.
#pragma once

#include "block.h"

namespace emulator {

// Copies the map's box at (x, y) of plane z, with zeros outside of the tensor, in the map's layout.
void copy_tile(const TensorMap& map, int x, int y, int z, unsigned char* dst);

}  // namespace emulator
