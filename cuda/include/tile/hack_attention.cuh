// What the kernels that attend to packed pages share: parts of items, 16-bit tokens, states that meet.
//
// A block of 128 threads serves queries × query heads of one KV head, eight columns per warp. The warps that share a set of
// pages, each with columns of its own, are a team with a ring of its own; the block's teams take pages in turn and meet at the
// end of a part. How a page is read is the kernel's: its Reader's start() sees the queries, and attend() takes one page from the
// stream into the columns' state.
#pragma once

#include "core.cuh"
#include "hack_decode_params.h"
#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
#include "tile/hack_columns.cuh"
#include "tile/hack_stream.cuh"
#include "tile/partial_states.cuh"
#include "tile/split_plan.cuh"
#include "types.cuh"

// Buffers of the kernels, as their parameters name them.
template <class Element>
struct HackBuffers {
    const Element* q;
    const unsigned char* pages;
    const uint32_t* block_table;
    const Element* sink_pool;
    const Element* open_pool;
    const uint32_t* sink_page;
    const uint32_t* open_page;
    const uint32_t* valid_len;
    const uint32_t* first_unit;
    Element* out;
    float* lse;
    float* part_acc;
    float* part_ml;
    uint32_t* arrivals;
};

template <class Shape>
struct HackAttention {
    using Element = typename Shape::Element;
    using Page = typename Shape::Page;
    static constexpr uint32_t THREADS = 128;
    static constexpr uint32_t TEAM = Shape::WARPS_OF_TEAM;
    static constexpr uint32_t TEAMS = THREADS / WARP_SIZE / TEAM;
    static constexpr uint32_t COLUMNS = TEAM * 8;
    static constexpr uint32_t KEY_DIM = Shape::KEY_DIM;
    static constexpr uint32_t VALUE_DIM = Shape::VALUE_DIM;
    static constexpr uint32_t K_ROW = KEY_DIM * 2;
    static constexpr uint32_t V_ROW = VALUE_DIM * 2;
    static constexpr uint32_t ROWS = 16;  // 16-bit tokens that a team takes at once
    using Stream = PageStream<Page, TEAM>;

    // A ring serves pages, 16-bit vectors, and at the end the team's O.
    static constexpr uint32_t ROWS_BYTES = ROWS * (K_ROW + V_ROW);
    static constexpr uint32_t STATE_BYTES = COLUMNS * VALUE_DIM * 4;
    static constexpr uint32_t OTHER_BYTES = ROWS_BYTES > STATE_BYTES ? ROWS_BYTES : STATE_BYTES;
    static constexpr uint32_t RING = ceil_div<uint32_t>(Stream::BYTES > OTHER_BYTES ? Stream::BYTES : OTHER_BYTES, 128) * 128;
    static constexpr uint32_t Q_BYTES = COLUMNS * K_ROW;
    static constexpr bool EIGHT_BITS = Page::KeyCodes::BITS == 8 || Page::ValueCodes::BITS == 8;
    // What the rings allow: SMs with 100 KB of shared memory hold one block, others three, if registers do; of pages of
    // 8-bit codes two blocks have enough on their way.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    static constexpr int BLOCKS_PER_SM = KEY_DIM <= 128 && VALUE_DIM <= 128 ? 1 : 2;
#else
    static constexpr int BLOCKS_PER_SM =
        KEY_DIM <= 128 && VALUE_DIM <= 128 && Shape::BLOCK <= 64 && TEAM == 1 && !Shape::CAPPED && !EIGHT_BITS ? 3 : 2;
#endif

    struct Tail {
        SplitPlan plan;
        uint64_t unit;  // at which the block's part begins
        float ml[TEAMS][COLUMNS][2];
        HackItem item;
        uint32_t is_last;
    };

    static DEVICE HackItem item_of(const Part& part, const HackBuffers<Element>& buffers, const HackDecodeParams& params) {
        HackItem item;
        item.sequence = part.sequence;
        item.kv_head = part.head / params.column_blocks;
        item.first_column = part.head % params.column_blocks * COLUMNS;
        item.kv_len = buffers.valid_len[part.sequence];
        const HackTokens tokens(item.kv_len, params);
        item.sinks = tokens.sinks;
        item.closed = tokens.closed;
        item.open = tokens.open;
        const uint32_t last_column = min(item.first_column + COLUMNS, params.q_len * params.group) - 1;
        item.of_first = visible_tokens(item.first_column / params.group, item.kv_len, params);
        const VisibleTokens of_last = visible_tokens(last_column / params.group, item.kv_len, params);
        item.last_begin = of_last.begin;
        const uint32_t begin = item.of_first.begin > item.sinks ? item.of_first.begin - item.sinks : 0;
        const uint32_t end = of_last.end > item.sinks ? of_last.end - item.sinks : 0;
        item.end_block = min(ceil_div<uint32_t>(end, Shape::BLOCK), item.closed);
        item.begin_block = min(begin / Shape::BLOCK, item.end_block);
        return item;
    }

    // Loads the item's queries into shared memory as swizzled rows; columns that do not exist are zero.
    static DEVICE void load_queries(uint32_t q_tile, const Element* q, const HackItem& item, const HackDecodeParams& params) {
        constexpr uint32_t CHUNKS = K_ROW / 16;
        for (uint32_t index = threadIdx.x; index < COLUMNS * CHUNKS; index += THREADS) {
            const uint32_t row = index / CHUNKS;
            const uint32_t chunk = index % CHUNKS;
            const uint32_t column = item.first_column + row;
            const bool exists = column < params.q_len * params.group;
            const uint64_t query =
                exists ? static_cast<uint64_t>(item.sequence) * params.q_len + column / params.group : 0;
            const uint64_t head = exists ? item.kv_head * params.group + column % params.group : 0;
            const Element* source = q + (query * params.kv_heads * params.group + head) * KEY_DIM + chunk * 8;
            cp_async_16_zfill(q_tile + Swizzle<K_ROW>::offset(row, chunk), source, exists ? 16 : 0);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    }

    // Attends to the sinks and the open block, 16 tokens at a time, which the teams take in turn. State is Columns or Rows.
    template <class State, class Item>
    static DEVICE void attend_16_bit(State& state, const Stream& stream, const Item& item,
                                     const HackBuffers<Element>& buffers, const HackDecodeParams& params) {
        constexpr uint32_t TOKEN = KEY_DIM + VALUE_DIM;
        // As with page ids: a place that has gone bad since the plan reads a wrong page.
        const auto segment = [&](const Element* pool, const uint32_t* places, uint32_t count, uint32_t tokens) {
            const uint32_t place = count > 0 ? min(places[item.sequence], count - 1) : 0;
            return pool + (static_cast<uint64_t>(place) * params.kv_heads + item.kv_head) * tokens * TOKEN;
        };
        const Element* const sinks =
            item.sinks > 0 ? segment(buffers.sink_pool, buffers.sink_page, params.num_sink_pages, params.sinks) : nullptr;
        const Element* const open =
            item.open > 0 ? segment(buffers.open_pool, buffers.open_page, params.num_open_pages, Shape::BLOCK) : nullptr;
        const uint32_t k = shared_address(stream.ring);
        const uint32_t v = k + ROWS * K_ROW;
        const uint32_t thread = threadIdx.x % (TEAM * WARP_SIZE);
#pragma unroll 1
        for (uint32_t first = stream.team * ROWS; first < item.sinks + item.open; first += TEAMS * ROWS) {
            constexpr uint32_t K_CHUNKS = K_ROW / 16;
            constexpr uint32_t CHUNKS = TOKEN / 8;
#pragma unroll 1
            for (uint32_t index = thread; index < ROWS * CHUNKS; index += TEAM * WARP_SIZE) {
                const uint32_t row = index / CHUNKS;
                const bool of_values = index % CHUNKS >= K_CHUNKS;
                const uint32_t chunk = index % CHUNKS - (of_values ? K_CHUNKS : 0);
                const uint32_t token = first + row;
                const bool is_sink = token < item.sinks;
                const bool exists = token < item.sinks + item.open;
                const uint32_t place = is_sink ? token : token - item.sinks;
                const uint32_t tokens = is_sink ? params.sinks : Shape::BLOCK;
                const Element* const from = is_sink ? sinks : open;
                const uint32_t offset = of_values ? tokens * KEY_DIM + place * VALUE_DIM : place * KEY_DIM;
                const uint32_t to = of_values ? v + Swizzle<V_ROW>::offset(row, chunk) : k + Swizzle<K_ROW>::offset(row, chunk);
                cp_async_16_zfill(to, exists ? from + offset + chunk * 8 : buffers.q, exists ? 16 : 0);
            }
            cp_async_commit();
            cp_async_wait<0>();
            stream.sync();
            state.attend_rows(k, v, item, params, [&](uint32_t row) {
                const uint32_t token = first + row;
                if (token < item.sinks) return token;
                return token < item.sinks + item.open ? token + item.closed * Shape::BLOCK : ~0u;
            });
            stream.sync();
        }
    }

    // The part that begins at `unit`, and its item.
    struct Work {
        Part part;
        HackItem item;

        DEVICE Work(const SplitPlan& plan, uint64_t unit, const HackBuffers<Element>& buffers, const HackDecodeParams& params)
            : part(plan.part_at(unit, plan.begin(blockIdx.x + 1), blockIdx.x)), item(item_of(part, buffers, params)) {}
    };

    // Leaves the state of each team's columns over the part that begins at `unit` in shared memory, and there too what the loop
    // over pages need not keep in registers.
    template <class Reader>
    static DEVICE void attend_part(unsigned char* shared_bytes, Tail& tail, uint64_t unit,
                                   const HackBuffers<Element>& buffers, const HackDecodeParams& params) {
        const Work work(tail.plan, unit, buffers, params);
        const HackItem& item = work.item;
        if (threadIdx.x == 0) {
            tail.unit = unit;
            tail.item = item;
        }
        const uint32_t team = warp_index() / TEAM;
        load_queries(shared_address(shared_bytes), buffers.q, item, params);
        Stream stream{shared_bytes + Q_BYTES + team * RING,
                      team,
                      TEAMS,
                      buffers.pages,
                      Stream::place_of(item.kv_head),
                      buffers.block_table + item.sequence * params.table_batch_stride,
                      params};
        Columns<Shape> columns;
        columns.start(shared_bytes, warp_index() % TEAM);
        if (work.part.first_unit == 0) attend_16_bit(columns, stream, item, buffers, params);

        // Units 1, 2 … are pages from the sequence's first visible block on.
        const uint32_t first_block = HackTokens(item.kv_len, params).first_block;
        const auto block_of = [&](uint32_t unit) {
            const uint32_t block = first_block + (unit > 0 ? unit - 1 : 0) * params.unit_pages;
            return max(min(block, item.end_block), item.begin_block);
        };
        const uint32_t begin_block = block_of(work.part.first_unit);
        const uint32_t end_block = block_of(work.part.end_unit);
        Reader reader;
        reader.start(columns, params);
        stream.start(begin_block + team, end_block);
        for (uint32_t block = begin_block + team; block < end_block; block += TEAMS) {
            reader.attend(columns, stream, tail.item, block, params);
        }
        stream.finish();
        columns.leave(reinterpret_cast<float*>(stream.ring) + warp_index() % TEAM * 8 * VALUE_DIM,
                      &tail.ml[team][warp_index() % TEAM * 8]);
        __syncthreads();
    }

    // The teams become the part that attend_part has seen; the parts, in their last arriver, the item. Returns the next unit.
    static DEVICE uint64_t finish_part(const unsigned char* rings, Tail& tail, const HackBuffers<Element>& buffers,
                                       const HackDecodeParams& params) {
        const uint64_t unit = tail.unit;
        const Work work(tail.plan, unit, buffers, params);
        const HackItem& item = work.item;
        const Part& part = work.part;
        const uint32_t count = min(COLUMNS, params.q_len * params.group - item.first_column);
        const uint32_t item_index = part.sequence * tail.plan.heads + part.head;
        auto finish = [&](const SoftmaxState& state, uint32_t column, uint32_t channel) {
            const uint32_t query = (item.first_column + column) / params.group;
            const uint32_t head = item.kv_head * params.group + (item.first_column + column) % params.group;
            const uint64_t row =
                (static_cast<uint64_t>(item.sequence) * params.q_len + query) * params.kv_heads * params.group + head;
            store_4(buffers.out + row * VALUE_DIM + channel, state.out());
            if (channel == 0) buffers.lse[row] = state.lse();
        };
        merge_parts<COLUMNS, VALUE_DIM>(RingStates<COLUMNS, VALUE_DIM, RING>{rings, tail.ml}, TEAMS, part, buffers.part_acc, buffers.part_ml,
                                        buffers.arrivals + item_index, &tail.is_last, ColumnFold<VALUE_DIM, THREADS>{count}, finish);
        return unit + part.end_unit - part.first_unit;
    }

    template <class Reader>
    static DEVICE void run(unsigned char* shared_bytes, const HackBuffers<Element>& buffers, const HackDecodeParams& params) {
        unsigned char* const rings = shared_bytes + Q_BYTES;
        Tail& tail = *reinterpret_cast<Tail*>(rings + TEAMS * RING);
        grid_dependency_wait();
        const SplitPlan plan(buffers.first_unit, params.batch, params.kv_heads * params.column_blocks, gridDim.x,
                             params.min_units, params.fixed_parts != 0);
        if (blockIdx.x >= plan.blocks) return;
        if (threadIdx.x == 0) tail.plan = plan;
        __syncthreads();
        uint64_t unit = plan.begin(blockIdx.x);
        do {
            attend_part<Reader>(shared_bytes, tail, unit, buffers, params);
            unit = finish_part(rings, tail, buffers, params);
        } while (unit < tail.plan.begin(blockIdx.x + 1));
    }
};
