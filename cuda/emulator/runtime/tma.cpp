// Bulk loads and TMA tile loads: global to shared memory, completing on an mbarrier.
#include "tma.h"

#include <algorithm>
#include <cstring>

#include "checker.h"
#include "mbarrier.h"
#include "report.h"

namespace emulator {

namespace {

#define CALLER __builtin_return_address(0)

void issue(PendingCopy copy, const void* pc) {
    Thread& self = *current;
    const Stamp mark = Stamp::make(self.block->tag, AGENTS + self.linear, 0, true);
    const char* what = copy.kind == PendingCopy::Tile ? "tma_load_2d" : "cp.async.bulk";
    check_proxy_fence(self, copy.dst, copy.bytes, Kind::Write, what, pc);
    mark_shared(self, mark, copy.dst, copy.bytes, Kind::Write, pc);
    copy.issuer = self.linear;
    copy.async_stamp = mark.bits;
    self.block->counters.async_copies++;
    issue_pending(std::move(copy), pc);
}

// Whether plane z is one of the tensor's; the only plane of a map of two dimensions is 0.
bool has_plane(const TensorMap& map, int z) { return z >= 0 && (uint64_t)z < std::max<uint64_t>(map.planes, 1); }

void load_tile(const char* name, unsigned dimensions, uint32_t dst, const void* map_address, uint32_t mbar, int x, int y, int z,
               const void* pc) {
    PendingCopy copy{};
    memcpy(&copy.map, map_address, sizeof copy.map);
    const TensorMap& map = copy.map;
    if (map.magic != TENSOR_MAP_MAGIC) fail(pc, "%s: this is no tensor map of the emulator", name);
    const unsigned of_map = map.planes > 0 ? 3 : 2;
    if (of_map != dimensions) fail(pc, "%s: the tensor map has %u dimensions", name, of_map);
    if (map.swizzle_128 && map.box_columns * map.element_bytes > 128)
        fail(pc, "%s: a box row of %u bytes does not fit the 128-byte swizzle", name, map.box_columns * map.element_bytes);
    copy.kind = PendingCopy::Tile;
    copy.mbar = mbar;
    copy.dst = dst;
    copy.bytes = map.box_columns * map.box_rows * map.element_bytes;
    copy.x = x;
    copy.y = y;
    copy.z = z;
    // The swizzle is a function of the address: it begins anew at every 1024 bytes.
    shared_bytes(dst, copy.bytes, map.swizzle_128 ? 1024 : 128, name, pc);
    // What the box shares with the tensor, row by row.
    const int64_t left = std::max<int64_t>(x, 0);
    const int64_t right = std::min<int64_t>((int64_t)x + map.box_columns, map.columns);
    const int64_t bottom = has_plane(map, z) ? std::min<int64_t>((int64_t)y + map.box_rows, map.rows) : 0;
    for (int64_t row = std::max<int64_t>(y, 0); left < right && row < bottom; row++) {
        const uint64_t first = map.address + z * map.plane_bytes + row * map.row_bytes + left * map.element_bytes;
        check_access(reinterpret_cast<const void*>(first), (right - left) * map.element_bytes, Kind::Read, pc);
    }
    issue(std::move(copy), pc);
}

}  // namespace

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar) {
    const void* pc = CALLER;
    if (bytes % 16) fail(pc, "cp.async.bulk: %u bytes are not a multiple of 16", bytes);
    shared_bytes(dst, bytes, 16, "cp.async.bulk", pc);
    if (reinterpret_cast<uintptr_t>(src) % 16)
        fail(pc, "cp.async.bulk: source address %p is not a multiple of 16", src);
    if (!bytes) return;
    check_access(src, bytes, Kind::Read, pc);
    PendingCopy copy{};
    copy.kind = PendingCopy::Bulk;
    copy.mbar = mbar;
    copy.dst = dst;
    copy.bytes = bytes;
    copy.src = static_cast<const unsigned char*>(src);
    issue(std::move(copy), pc);
}

void tma_load_2d(uint32_t dst, const void* map, uint32_t mbar, int x, int y) {
    load_tile("tma_load_2d", 2, dst, map, mbar, x, y, 0, CALLER);
}

void tma_load_3d(uint32_t dst, const void* map, uint32_t mbar, int x, int y, int z) {
    load_tile("tma_load_3d", 3, dst, map, mbar, x, y, z, CALLER);
}

void copy_tile(const TensorMap& map, int x, int y, int z, unsigned char* dst) {
    const uint64_t row_bytes = (uint64_t)map.box_columns * map.element_bytes;
    for (uint32_t r = 0; r < map.box_rows; r++) {
        const int64_t row = (int64_t)y + r;
        for (uint32_t c = 0; c < map.box_columns; c++) {
            const int64_t column = (int64_t)x + c;
            uint64_t offset = r * row_bytes + (uint64_t)c * map.element_bytes;
            if (map.swizzle_128) offset ^= (offset >> 7 & 7) << 4;
            const bool inside = has_plane(map, z) && row >= 0 && column >= 0 && (uint64_t)row < map.rows &&
                                (uint64_t)column < map.columns;
            if (inside) {
                const uint64_t source =
                    map.address + z * map.plane_bytes + (uint64_t)row * map.row_bytes + (uint64_t)column * map.element_bytes;
                memcpy(dst + offset, reinterpret_cast<const unsigned char*>(source), map.element_bytes);
            } else {
                memset(dst + offset, 0, map.element_bytes);
            }
        }
    }
}

}  // namespace emulator
