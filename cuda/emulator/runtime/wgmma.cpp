// wgmma m64nNk16: products of tiles in shared memory, or of registers with such a tile, performed as late as allowed, at the wait.
//
// Each of the four warps of a warpgroup computes 16 of the 64 rows. A row of 128 bytes is 64 values of K of a row of A or a column
// of B (K-major), or 64 columns of B at one K (N-major), in the 128-byte swizzle: address bits 4-6 are XORed with bits 7-9.
//
// Accumulator of warp w, lane l, with g = l / 4, t = l % 4: register i is row 16 * w + g + 8 * (i / 2 % 2), column
// 8 * (i / 4) + 2 * t + i % 2. A in registers: register i is row 16 * w + g + 8 * (i % 2), columns 8 * (i / 2) + 2 * t and the next.
#include <cstring>

#include "checker.h"
#include "formats.h"
#include "report.h"
#include "warp.h"

namespace emulator {

namespace {

#define CALLER __builtin_return_address(0)

constexpr unsigned K = 16, MAX_N = 256, WARP_ROWS = 16;

// The fields of a matrix descriptor.
struct Tile {
    uint32_t start, leading, stride;  // shared address; bytes between panels of N, and between groups of 8 rows

    Tile(uint64_t descriptor, const char* which, const void* pc) {
        start = (uint32_t)(descriptor & 0x3fff) << 4;
        leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
        stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
        if (descriptor >> 62 != 1)
            fail(pc, "wgmma: the descriptor of %s asks for swizzle mode %u, only 1 (128 bytes) is emulated", which,
                 (unsigned)(descriptor >> 62));
        if (descriptor >> 49 & 7)
            fail(pc, "wgmma: the descriptor of %s has base offset %u, only 0 is emulated", which,
                 (unsigned)(descriptor >> 49 & 7));
    }
    static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

    // The shared address of 16-byte half `half` of the 16 values of K of a row, K-major.
    uint32_t chunk(unsigned row, unsigned half) const {
        return swizzled(start + row / 8 * stride + row % 8 * 128 + half * 16);
    }
    // The shared address of the 8 columns from 8 * chunk on at one K, N-major.
    uint32_t columns(unsigned k, unsigned chunk) const {
        return swizzled(start + chunk / 8 * leading + k / 8 * stride + k % 8 * 128 + chunk % 8 * 16);
    }
};

struct ProductOperand {
    Wgmma product;
    float* d;
    const uint32_t* a;
};

// Calls f(shared address) for each 16-byte chunk that this warp's part of a product reads.
template <class F>
void for_chunks(const Warp& warp, const Wgmma& product, const F& f) {
    const Tile b(product.b, "B", product.pc);
    if (product.in_registers) {
        for (unsigned k = 0; k < K; k++)
            for (unsigned chunk = 0; chunk < product.n / 8; chunk++) f(b.columns(k, chunk));
        return;
    }
    const Tile a(product.a, "A", product.pc);
    const unsigned first_row = warp.index % 4 * WARP_ROWS;
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned row = 0; row < WARP_ROWS; row++) f(a.chunk(first_row + row, half));
        for (unsigned row = 0; row < product.n; row++) f(b.chunk(row, half));
    }
}

// A product's operands are marked under the warp's first thread, at a time that no other product has.
void run_issue(Warp& warp, uint32_t) {
    Wgmma product = operand<ProductOperand>(warp, 0).product;
    for (unsigned lane = 0; lane < LANES; lane++) {
        const ProductOperand& o = operand<ProductOperand>(warp, lane);
        if (o.product.a != product.a || o.product.b != product.b || o.product.bf16 != product.bf16
            || o.product.n != product.n || o.product.add != product.add)
            fail(o.product.pc, "wgmma: lanes 0 and %u have different descriptors", lane);
        product.d[lane] = o.d;
        product.a_registers[lane] = o.a;
    }
    if (!warp.wgmma_fenced)
        fail(product.pc,
             "wgmma without wgmma_fence before the first product, or since a wait gave registers of products back");
    Thread& thread = warp.threads[0];
    product.mark = under_way_stamp(thread);
    thread.step_time();
    for_chunks(warp, product, [&](uint32_t address) {
        shared_bytes(address, 16, 16, "wgmma", product.pc);
        mark_shared(thread, product.mark, address, 16, Kind::Read, product.pc);
        check_proxy_fence(thread, address, 16, Kind::Read, "wgmma", product.pc);
    });
    warp.products.push_back(product);
}

void perform(Warp& warp, const Wgmma& product) {
    const Tile b_tile(product.b, "B", product.pc);
    Block& block = *warp.threads->block;
    const unsigned first_row = warp.index % 4 * WARP_ROWS;
    const auto widen = [&](uint16_t bits) { return product.bf16 ? bf16_to_f32(bits) : f16_to_f32(bits); };
    const auto load = [&](uint32_t chunk, unsigned i) {
        uint16_t bits;
        memcpy(&bits, block.shared + (chunk - SHARED_FIRST) + i * 2, 2);
        return widen(bits);
    };
    static thread_local float a[WARP_ROWS][K], b[K][MAX_N], sum[WARP_ROWS][MAX_N];
    memset(sum, 0, sizeof sum);
    if (product.in_registers) {
        for (unsigned lane = 0; lane < LANES; lane++)
            for (unsigned i = 0; i < 4; i++)
                for (unsigned half = 0; half < 2; half++)
                    a[lane / 4 + i % 2 * 8][i / 2 * 8 + lane % 4 * 2 + half] =
                        widen((uint16_t)(product.a_registers[lane][i] >> 16 * half));
        for (unsigned k = 0; k < K; k++)
            for (unsigned column = 0; column < product.n; column++)
                b[k][column] = load(b_tile.columns(k, column / 8), column % 8);
    } else {
        const Tile a_tile(product.a, "A", product.pc);
        for (unsigned row = 0; row < WARP_ROWS; row++)
            for (unsigned k = 0; k < K; k++) a[row][k] = load(a_tile.chunk(first_row + row, k / 8), k % 8);
        for (unsigned column = 0; column < product.n; column++)
            for (unsigned k = 0; k < K; k++) b[k][column] = load(b_tile.chunk(column, k / 8), k % 8);
    }
    for (unsigned row = 0; row < WARP_ROWS; row++)
        for (unsigned k = 0; k < K; k++)
            for (unsigned column = 0; column < product.n; column++) sum[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < LANES; lane++)
        for (unsigned i = 0; i < product.n / 2; i++) {
            float& d = product.d[lane][i];
            d = (product.add ? d : 0.0f) + sum[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
        }
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
    // Their registers may be touched from here on, which the next product must be fenced from.
    if (count > 0) warp.wgmma_fenced = false;
    warp.products.erase(warp.products.begin(), warp.products.begin() + count);
    ends.erase(ends.begin(), ends.begin() + groups);
    for (size_t& end : ends) end -= count;
}

void issue(ProductOperand& o) {
    static const Meeting meeting{"wgmma", run_issue, false, true};
    if (current->warp->index / 4 * 4 + 4 > current->block->warps_in_block)
        fail(o.product.pc, "wgmma: warp %u is not part of a warpgroup of four", current->warp->index);
    meet(meeting, ~0u, &o, o.product.pc);
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

void wgmma_ss(float* d, unsigned n, uint64_t a, uint64_t b, bool add, bool bf16) {
    ProductOperand o{{a, b, n, {}, {}, false, add, bf16, CALLER, {}}, d, nullptr};
    issue(o);
}

void wgmma_rs(float* d, unsigned n, const uint32_t* a, uint64_t b, bool add, bool bf16) {
    ProductOperand o{{0, b, n, {}, {}, true, add, bf16, CALLER, {}}, d, a};
    issue(o);
}

}  // namespace emulator
