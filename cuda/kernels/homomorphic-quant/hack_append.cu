// Appends new tokens to a quantized KV cache: 16-bit sinks, packed pages for blocks that close, the 16-bit open block.
//
// k_new        [num_new, kv_heads, QK_DIM] KV_DTYPE    v_new [num_new, kv_heads, V_DIM] KV_DTYPE
//              tokens by the strides of params; vectors are 16-byte aligned
// new_start    [batch + 1] u32: the new tokens of sequence s are new_start[s] … new_start[s + 1] − 1
// kv_len       [batch] u32, tokens of each sequence, the new ones included
// block_table  [batch, max_pages] u32 by params: the page of each closed block; read for those that close now
// sink_page    [batch] u32, open_page [batch] u32: the page of each sequence in its pool
// pages        the pool of packed pages: kv_heads segments each, as in tile/hack_page.cuh
// sink_pool    [num_sink_pages, kv_heads] of k [sinks, QK_DIM] · v [sinks, V_DIM] KV_DTYPE
// open_pool    [num_open_pages, kv_heads] of k [PARTITION, QK_DIM] · v [PARTITION, V_DIM] KV_DTYPE
// status       first fault, with the sequence, to which then nothing is appended: FAULT_BAD_RANGE (new_start),
//              FAULT_BAD_LENGTH, FAULT_BAD_PAGE, FAULT_BAD_INDEX (sink or open page)
//
// Token p of a sequence is a sink for p < sinks; else it belongs to block (p − sinks) / PARTITION, at place
// (p − sinks) % PARTITION. A block that is full after the append is quantized from the open block's tokens and the new ones,
// every other token is copied. Groups with an infinity or NaN become NaN (tile/quantizer.cuh).
//
// Arch:    sm_80 and later.
// Mapping: grid (blocks that can close at once, kv_heads, batch). Block x quantizes the x-th closing block of its sequence
//          and head, and ends at once where there is none; block 0 also copies sinks and open tokens, after it has read the
//          open block. K, then V go through one tile in shared memory: threads find the groups' ranges, then each warp packs
//          units of tile/codes.cuh, 16 bytes per lane.
// Budget:  168 registers; a tile of PARTITION vectors and tables of the groups.
// Limit:   bytes: every new vector read once, 4768 bytes per token over 8 KV heads at 2 bits, 128 channels.
#include "core.cuh"
#include "hack_append_params.h"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "status_params.h"
#include "tile/hack_page.cuh"
#include "tile/quantizer.cuh"
#include "tile/status.cuh"
#include "types.cuh"

using Element = StorageOf<KV_DTYPE>;
using Page = HackPage<K_BITS, V_BITS, PARTITION, QK_DIM, V_DIM>;

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / WARP_SIZE;
constexpr uint32_t CHUNK = 8;  // elements in 16 bytes
constexpr uint32_t LARGEST_DIM = QK_DIM > V_DIM ? QK_DIM : V_DIM;
constexpr uint32_t VALUE_GROUPS = PARTITION * Page::V_PARTITIONS;
constexpr uint32_t KEY_SUMS = PARTITION * Page::K_PARTITIONS;
constexpr uint32_t MOST_GROUPS = QK_DIM > VALUE_GROUPS ? QK_DIM : VALUE_GROUPS;
constexpr uint32_t MOST_SUMS = KEY_SUMS > V_DIM ? KEY_SUMS : V_DIM;
// Elements between two tokens in the tile: one chunk more than the longest vector, so that columns spread over the banks.
constexpr uint32_t ROW = LARGEST_DIM + CHUNK;

struct Shared {
    Element tile[PARTITION * ROW];
    CodeGroup groups[MOST_GROUPS];
    uint32_t sums[MOST_SUMS];
    uint32_t bad_pages;
};

// What one launch appends to one sequence.
struct Append {
    uint32_t first_new;  // of the sequence, among all new tokens
    uint32_t old_len;
    uint32_t len;
    uint32_t closed_before;  // blocks
    uint32_t closed_after;
};

// Where a sequence's tokens are read from: the open block for old ones, else the new ones. `Dim` and `Values` tell K from V.
template <uint32_t Dim, bool Values>
struct Source {
    const Element* fresh;  // of the head, token 0 of the launch
    int64_t stride;
    const Element* open;  // of the head's segment

    DEVICE const Element* token(const Append& append, uint32_t position, uint32_t place) const {
        return position < append.old_len ? open + place * Dim
                                         : fresh + (append.first_new + position - append.old_len) * stride;
    }
};

// Brings a block's vectors into the tile.
template <class Source, uint32_t Dim>
DEVICE void load_tile(Shared& shared, const Source& source, const Append& append, uint32_t first_position) {
    constexpr uint32_t CHUNKS = Dim / CHUNK;
    for (uint32_t index = threadIdx.x; index < PARTITION * CHUNKS; index += THREADS) {
        const uint32_t token = index / CHUNKS;
        const uint32_t channel = index % CHUNKS * CHUNK;
        const uint4 chunk = load_global_16(source.token(append, first_position + token, token) + channel);
        *reinterpret_cast<uint4*>(&shared.tile[token * ROW + channel]) = chunk;
    }
    for (uint32_t i = threadIdx.x; i < MOST_SUMS; i += THREADS) shared.sums[i] = 0;
    __syncthreads();
}

// Keys: a group per channel, a sum per token and channel partition.
struct Keys {
    using Codes = Page::KeyCodes;
    static constexpr uint32_t GROUPS = QK_DIM;

    static DEVICE CodeGroup group(const Shared& shared, uint32_t channel) {
        ValueRange range;
        for (uint32_t token = 0; token < PARTITION; token++) range.add(to_f32(shared.tile[token * ROW + channel]));
        return group_of<Element, Codes::LEVELS>(range);
    }
    static DEVICE uint32_t code(const Shared& shared, uint32_t token, uint32_t channel) {
        return shared.groups[channel].code<Codes::LEVELS>(to_f32(shared.tile[token * ROW + channel]));
    }
    static DEVICE uint32_t sum_of(uint32_t token, uint32_t channel) {
        return token * Page::K_PARTITIONS + channel / Page::K_CHANNELS;
    }
};

// Values: a group per token and channel partition, a sum per channel. Rows of the packed matrix are channels.
struct Values {
    using Codes = Page::ValueCodes;
    static constexpr uint32_t GROUPS = VALUE_GROUPS;

    static DEVICE CodeGroup group(const Shared& shared, uint32_t index) {
        constexpr uint32_t CHUNKS = Page::V_CHANNELS / CHUNK;
        const uint32_t token = index / Page::V_PARTITIONS;
        const Element* const channels = &shared.tile[token * ROW + index % Page::V_PARTITIONS * Page::V_CHANNELS];
        ValueRange range;
        for (uint32_t i = 0; i < CHUNKS; i++) {
            const uint4 chunk = *reinterpret_cast<const uint4*>(channels + i * CHUNK);
            const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
            for (uint32_t w = 0; w < 4; w++) {
                const float2 pair = unpack2<Element>(words[w]);
                range.add(pair.x);
                range.add(pair.y);
            }
        }
        return group_of<Element, Codes::LEVELS>(range);
    }
    static DEVICE uint32_t code(const Shared& shared, uint32_t channel, uint32_t column) {
        const uint32_t token = Page::token_of_column(column);
        const CodeGroup& group = shared.groups[token * Page::V_PARTITIONS + channel / Page::V_CHANNELS];
        return group.code<Codes::LEVELS>(to_f32(shared.tile[token * ROW + channel]));
    }
    static DEVICE uint32_t sum_of(uint32_t channel, uint32_t) { return channel; }
};

// Quantizes the tile into `codes`, and leaves groups and sums in shared memory.
template <class Side>
DEVICE void quantize(Shared& shared, unsigned char* codes) {
    using Codes = typename Side::Codes;
    for (uint32_t i = threadIdx.x; i < Side::GROUPS; i += THREADS) shared.groups[i] = Side::group(shared, i);
    __syncthreads();

    const uint32_t lane = lane_index();
    for (uint32_t unit = warp_index(); unit < Codes::GROUPS * Codes::STEPS; unit += WARPS) {
        const uint32_t group = unit / Codes::STEPS;
        const uint32_t step = unit % Codes::STEPS;
        uint32_t words[Codes::WORDS];
#pragma unroll
        for (uint32_t word = 0; word < Codes::WORDS; word++) {
            words[word] = 0;
#pragma unroll
            for (uint32_t plane = 0; plane < Codes::PLANES; plane++) {
                const uint32_t row = Codes::row(group, lane, word, plane);
                uint32_t sum = 0;
#pragma unroll
                for (uint32_t b = 0; b < 4; b++) {
                    const uint32_t code = Side::code(shared, row, Codes::column(step, lane, word, plane, b));
                    words[word] |= code << (8 * b + Codes::BITS * plane);
                    sum += code;
                }
                // The four lanes of a row hold 16 columns, which lie in one partition.
                sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                if (lane % 4 == 0) atomicAdd(&shared.sums[Side::sum_of(row, Codes::column(step, lane, word, plane, 0))], sum);
            }
        }
        unsigned char* const place = codes + unit * Codes::UNIT_BYTES + lane * Codes::WORDS * 4;
        if constexpr (Codes::WORDS == 4) store_global_16(place, make_uint4(words[0], words[1], words[2], words[3]));
        else store_global_8(place, make_uint2(words[0], words[1]));
    }
    __syncthreads();
}

DEVICE void store_sum(unsigned char* sums, uint32_t bytes, uint32_t position, uint32_t sum) {
    if (bytes == 1) sums[position] = static_cast<uint8_t>(sum);
    else reinterpret_cast<uint16_t*>(sums)[position] = static_cast<uint16_t>(sum);
}

// Copies tokens [first, end) of a sequence to a 16-bit page: token p goes to place p − base.
template <class Source, uint32_t Dim>
DEVICE void copy_tokens(Element* to, const Source& source, const Append& append, uint32_t first, uint32_t end, uint32_t base) {
    constexpr uint32_t CHUNKS = Dim / CHUNK;
    const uint32_t chunks = first < end ? (end - first) * CHUNKS : 0;
    for (uint32_t index = threadIdx.x; index < chunks; index += THREADS) {
        const uint32_t position = first + index / CHUNKS;
        const uint32_t channel = index % CHUNKS * CHUNK;
        // Tokens that are copied are new.
        const uint4 chunk = load_global_16(source.token(append, position, 0) + channel);
        store_global_16(to + (position - base) * Dim + channel, chunk);
    }
}

KERNEL(128, 4)
hack_append(const Element* k_new, const Element* v_new, const uint32_t* new_start, const uint32_t* kv_len,
            const uint32_t* block_table, const uint32_t* sink_page, const uint32_t* open_page, unsigned char* pages,
            Element* sink_pool, Element* open_pool, uint64_t* status, const __grid_constant__ HackAppendParams params) {
    DYNAMIC_SHARED(shared_bytes);
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const uint32_t closing = blockIdx.x;
    const uint32_t head = blockIdx.y;
    const uint32_t sequence = blockIdx.z;

    grid_dependency_wait();
    // Every block of a sequence comes to the same verdict; one of them reports it.
    const bool reports = closing == 0 && head == 0 && threadIdx.x == 0;
    const uint32_t first_new = new_start[sequence];
    const uint32_t end_new = new_start[sequence + 1];
    if (first_new > end_new || end_new > params.num_new) {
        if (reports) report_fault(status, FAULT_BAD_RANGE, sequence);
        return;
    }
    Append append;
    append.first_new = first_new;
    append.len = kv_len[sequence];
    const uint32_t count = end_new - first_new;
    append.old_len = append.len - count;
    append.closed_before = append.old_len > params.sinks ? (append.old_len - params.sinks) / PARTITION : 0;
    append.closed_after = append.len > params.sinks ? (append.len - params.sinks) / PARTITION : 0;
    if (count > append.len || count > params.max_new || append.len > params.max_kv_len ||
        append.closed_after > params.max_pages) {
        if (reports) report_fault(status, FAULT_BAD_LENGTH, sequence);
        return;
    }
    if (count == 0) return;
    const uint32_t to_close = append.closed_after - append.closed_before;
    if (closing > 0 && closing >= to_close) return;

    const uint32_t* const table = block_table + sequence * params.table_batch_stride + append.closed_before;
    const bool has_sinks = append.old_len < params.sinks;
    const uint32_t sinks_at = has_sinks ? sink_page[sequence] : 0;
    const uint32_t open_at = open_page[sequence];
    if ((has_sinks && sinks_at >= params.num_sink_pages) || open_at >= params.num_open_pages) {
        if (reports) report_fault(status, FAULT_BAD_INDEX, sequence);
        return;
    }
    if (to_close > 0) {
        if (threadIdx.x == 0) shared.bad_pages = 0;
        __syncthreads();
        bool bad = false;
        for (uint32_t i = threadIdx.x; i < to_close; i += THREADS) bad |= table[i] >= params.num_pages;
        if (bad) atomicOr(&shared.bad_pages, 1u);
        __syncthreads();
        if (shared.bad_pages != 0) {
            if (reports) report_fault(status, FAULT_BAD_PAGE, sequence);
            return;
        }
    }

    constexpr uint32_t TOKEN = QK_DIM + V_DIM;
    Element* const open = open_pool + (static_cast<uint64_t>(open_at) * params.kv_heads + head) * PARTITION * TOKEN;
    const Source<QK_DIM, false> keys{k_new + head * QK_DIM, params.k_new_stride, open};
    const Source<V_DIM, true> values{v_new + head * V_DIM, params.v_new_stride, open + PARTITION * QK_DIM};
    if (closing < to_close) {
        const uint32_t first_position = params.sinks + (append.closed_before + closing) * PARTITION;
        unsigned char* const segment = pages + table[closing] * params.page_stride + head * Page::SEGMENT_BYTES;
        load_tile<Source<QK_DIM, false>, QK_DIM>(shared, keys, append, first_position);
        quantize<Keys>(shared, segment + Page::K_CODES);
        for (uint32_t i = threadIdx.x; i < QK_DIM; i += THREADS) {
            reinterpret_cast<Element*>(segment + Page::K_SCALE)[i] =
                from_f32<Element>(shared.groups[Page::channel_of_scale(i)].scale);
            reinterpret_cast<Element*>(segment + Page::K_MIN)[i] =
                from_f32<Element>(shared.groups[Page::channel_of_min(i)].min);
        }
        for (uint32_t i = threadIdx.x; i < KEY_SUMS; i += THREADS) {
            const uint32_t at = Page::position_of_k_sum(i / Page::K_PARTITIONS, i % Page::K_PARTITIONS);
            store_sum(segment + Page::K_SUMS, Page::K_SUM_BYTES, at, shared.sums[i]);
        }
        __syncthreads();

        unsigned char* const half = segment + Page::KEY_BYTES;
        load_tile<Source<V_DIM, true>, V_DIM>(shared, values, append, first_position);
        quantize<Values>(shared, half + Page::V_CODES);
        for (uint32_t i = threadIdx.x; i < VALUE_GROUPS; i += THREADS) {
            const uint32_t at = Page::position_of_v_group(i / Page::V_PARTITIONS, i % Page::V_PARTITIONS);
            reinterpret_cast<Element*>(half + Page::V_SCALE)[at] = from_f32<Element>(shared.groups[i].scale);
            reinterpret_cast<Element*>(half + Page::V_MIN)[at] = from_f32<Element>(shared.groups[i].min);
        }
        for (uint32_t i = threadIdx.x; i < V_DIM; i += THREADS) {
            store_sum(half + Page::V_SUMS, Page::V_SUM_BYTES, Page::position_of_v_sum(i), shared.sums[i]);
        }
    }
    if (closing > 0) return;

    // The open block's old tokens have been read: by this block alone, behind the barriers above.
    Element* const sinks = sink_pool + (static_cast<uint64_t>(sinks_at) * params.kv_heads + head) * params.sinks * TOKEN;
    const uint32_t sinks_end = min(append.len, params.sinks);
    copy_tokens<Source<QK_DIM, false>, QK_DIM>(sinks, keys, append, append.old_len, sinks_end, 0);
    copy_tokens<Source<V_DIM, true>, V_DIM>(sinks + params.sinks * QK_DIM, values, append, append.old_len, sinks_end, 0);
    const uint32_t open_begin = params.sinks + append.closed_after * PARTITION;
    const uint32_t first_open = max(append.old_len, open_begin);
    copy_tokens<Source<QK_DIM, false>, QK_DIM>(open, keys, append, first_open, append.len, open_begin);
    copy_tokens<Source<V_DIM, true>, V_DIM>(open + PARTITION * QK_DIM, values, append, first_open, append.len, open_begin);
}
