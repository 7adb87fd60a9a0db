// wgmma m64n64k16: products of tiles in shared memory, performed as late as allowed, at the wait.
//
// Each of the four warps of a warpgroup computes 16 of the 64 rows. Operands are K-major: row r of A (or column r of
// B) is 128 bytes of which a product uses 32, in the 128-byte swizzle: address bits 4-6 are XORed with bits 7-9.
//
// Accumulator of warp w, lane l, with g = l / 4, t = l % 4: register i is row 16 * w + g + 8 * (i / 2 % 2), column
// 8 * (i / 4) + 2 * t + i % 2.
#include <cstring>

#include "checker.h"
#include "formats.h"
#include "report.h"
#include "warp.h"

namespace emulator {

namespace {

#define CALLER __builtin_return_address(0)

constexpr unsigned K = 16, N = 64, WARP_ROWS = 16;

// The fields of a matrix descriptor.
struct Tile {
    uint32_t start, stride;  // shared address; bytes between groups of 8 rows

    Tile(uint64_t descriptor, const char* which, const void* pc) {
        start = (uint32_t)(descriptor & 0x3fff) << 4;
        stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
        if (descriptor >> 62 != 1)
            fail(pc, "wgmma: the descriptor of %s asks for swizzle mode %u, only 1 (128 bytes) is emulated", which,
                 (unsigned)(descriptor >> 62));
        if (descriptor >> 49 & 7)
            fail(pc, "wgmma: the descriptor of %s has base offset %u, only 0 is emulated", which,
                 (unsigned)(descriptor >> 49 & 7));
    }
    // The shared address of 16-byte half `half` of a row.
    uint32_t chunk(unsigned row, unsigned half) const {
        const uint32_t address = start + row / 8 * stride + row % 8 * 128 + half * 16;
        return address ^ (address >> 7 & 7) << 4;
    }
};

struct ProductOperand {
    uint64_t a, b;
    float* d;
    bool bf16;
    const void* pc;
};

// Calls f(shared address) for each 16-byte chunk that this warp's part of a product reads.
template <class F>
void for_chunks(const Warp& warp, const Wgmma& product, const F& f) {
    const Tile a(product.a, "A", product.pc), b(product.b, "B", product.pc);
    const unsigned first_row = warp.index % 4 * WARP_ROWS;
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned row = 0; row < WARP_ROWS; row++) f(a.chunk(first_row + row, half));
        for (unsigned row = 0; row < N; row++) f(b.chunk(row, half));
    }
}

// A product's operands are marked under the warp's first thread, at a time that no other product has.
void run_issue(Warp& warp, uint32_t) {
    const ProductOperand& first = operand<ProductOperand>(warp, 0);
    Wgmma product{first.a, first.b, {}, first.bf16, first.pc, {}};
    for (unsigned lane = 0; lane < LANES; lane++) {
        const ProductOperand& o = operand<ProductOperand>(warp, lane);
        if (o.a != first.a || o.b != first.b || o.bf16 != first.bf16)
            fail(o.pc, "wgmma: lanes 0 and %u have different descriptors", lane);
        product.d[lane] = o.d;
    }
    if (!warp.wgmma_fenced) fail(first.pc, "wgmma without wgmma_fence before the first product");
    Thread& thread = warp.threads[0];
    product.mark = under_way_stamp(thread);
    thread.step_time();
    for_chunks(warp, product, [&](uint32_t address) {
        shared_bytes(address, 16, 16, "wgmma", product.pc);
        mark_shared(thread, product.mark, address, 16, Kind::Read, product.pc);
        check_proxy_fence(thread, address, 16, "wgmma", product.pc);
    });
    warp.products.push_back(product);
}

void perform(Warp& warp, const Wgmma& product) {
    const Tile a_tile(product.a, "A", product.pc), b_tile(product.b, "B", product.pc);
    Block& block = *warp.threads->block;
    const unsigned first_row = warp.index % 4 * WARP_ROWS;
    const auto load = [&](const Tile& tile, unsigned row, unsigned k) {
        uint16_t bits;
        memcpy(&bits, block.shared + (tile.chunk(row, k / 8) - SHARED_FIRST) + k % 8 * 2, 2);
        return product.bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    };
    float a[WARP_ROWS][K], b[K][N], sum[WARP_ROWS][N] = {};
    for (unsigned row = 0; row < WARP_ROWS; row++)
        for (unsigned k = 0; k < K; k++) a[row][k] = load(a_tile, first_row + row, k);
    for (unsigned column = 0; column < N; column++)
        for (unsigned k = 0; k < K; k++) b[k][column] = load(b_tile, column, k);
    for (unsigned row = 0; row < WARP_ROWS; row++)
        for (unsigned k = 0; k < K; k++)
            for (unsigned column = 0; column < N; column++) sum[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < LANES; lane++)
        for (unsigned i = 0; i < 32; i++)
            product.d[lane][i] += sum[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
    const Thread& thread = warp.threads[0];
    for_chunks(warp, product, [&](uint32_t address) {
        complete_shared(thread, product.mark, thread.stamp(), address, 16, Kind::Read, product.pc);
    });
    block.counters.mma++;
}

struct WaitOperand {
    unsigned pending;
    const void* pc;
};

void run_wait(Warp& warp, uint32_t) {
    const unsigned pending = operand<WaitOperand>(warp, 0).pending;
    for (unsigned lane = 1; lane < LANES; lane++)
        if (operand<WaitOperand>(warp, lane).pending != pending)
            fail(operand<WaitOperand>(warp, lane).pc, "wgmma_wait: lanes 0 and %u wait for different groups", lane);
    std::vector<size_t>& ends = warp.product_group_ends;
    if (ends.size() <= pending) return;
    const size_t groups = ends.size() - pending, count = ends[groups - 1];
    for (size_t i = 0; i < count; i++) perform(warp, warp.products[i]);
    warp.products.erase(warp.products.begin(), warp.products.begin() + count);
    ends.erase(ends.begin(), ends.begin() + groups);
    for (size_t& end : ends) end -= count;
}

void issue(uint64_t a, uint64_t b, float* d, bool bf16, const void* pc) {
    static const Meeting meeting{"wgmma", run_issue, false, true};
    if (current->warp->index / 4 * 4 + 4 > current->block->warps_in_block)
        fail(pc, "wgmma: warp %u is not part of a warpgroup of four", current->warp->index);
    ProductOperand o{a, b, d, bf16, pc};
    meet(meeting, ~0u, &o, pc);
}

}  // namespace

void wgmma_fence() {
    static const Meeting meeting{"wgmma_fence", [](Warp& warp, uint32_t) { warp.wgmma_fenced = true; }, false, true};
    meet(meeting, ~0u, nullptr, CALLER);
}

void wgmma_commit() {
    static const Meeting meeting{"wgmma_commit",
                                 [](Warp& warp, uint32_t) { warp.product_group_ends.push_back(warp.products.size()); },
                                 false, true};
    meet(meeting, ~0u, nullptr, CALLER);
}

void wgmma_wait(unsigned pending) {
    static const Meeting meeting{"wgmma_wait", run_wait, false, true};
    WaitOperand o{pending, CALLER};
    meet(meeting, ~0u, &o, o.pc);
}

void wgmma_m64n64k16_bf16(float (&d)[32], uint64_t a_desc, uint64_t b_desc) { issue(a_desc, b_desc, d, true, CALLER); }
void wgmma_m64n64k16_f16(float (&d)[32], uint64_t a_desc, uint64_t b_desc) { issue(a_desc, b_desc, d, false, CALLER); }

}  // namespace emulator
