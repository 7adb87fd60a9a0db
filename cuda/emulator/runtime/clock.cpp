#include "clock.h"

#include <cstdlib>
#include <cstring>

#include "block.h"
#include "report.h"

namespace emulator {

// ---- Known --------------------------------------------------------------------------------------------------------

constexpr unsigned FAN_OUT_BITS = 4, FAN_OUT = 1 << FAN_OUT_BITS;

struct Known::Node {
    mutable std::atomic<uint32_t> references;
    uint32_t level;
    uint32_t entries;  // level 0
    union {
        const Node* child[FAN_OUT];
        uint32_t time[1];
    };
};

using Node = Known::Node;

namespace {

Node* new_leaf(unsigned entries) {
    Node* leaf = static_cast<Node*>(malloc(sizeof(Node) + entries * sizeof(uint32_t)));
    leaf->references = 1;
    leaf->level = 0;
    leaf->entries = entries;
    return leaf;
}

Node* new_branch(unsigned level) {
    Node* branch = static_cast<Node*>(malloc(sizeof(Node)));
    branch->references = 1;
    branch->level = level;
    branch->entries = 0;
    for (const Node*& child : branch->child) child = nullptr;
    return branch;
}

const Node* retain(const Node* node) {
    if (node) node->references.fetch_add(1, std::memory_order_relaxed);
    return node;
}

void release(const Node* node) {
    if (!node || node->references.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    if (node->level > 0)
        for (const Node* child : node->child) release(child);
    free(const_cast<Node*>(node));
}

// An owned reference to the join.
const Node* join_nodes(const Node* a, const Node* b) {
    if (a == b || !b) return retain(a);
    if (!a) return retain(b);
    if (a->level == 0) {
        Node* leaf = new_leaf(a->entries);
        for (unsigned i = 0; i < a->entries; i++) leaf->time[i] = a->time[i] > b->time[i] ? a->time[i] : b->time[i];
        return leaf;
    }
    Node* branch = new_branch(a->level);
    bool as_a = true, as_b = true;
    for (unsigned i = 0; i < FAN_OUT; i++) {
        branch->child[i] = join_nodes(a->child[i], b->child[i]);
        as_a &= branch->child[i] == a->child[i];
        as_b &= branch->child[i] == b->child[i];
    }
    if (as_a || as_b) {  // keep subtrees shared, so that later joins see at a glance that they are equal
        const Node* same = retain(as_a ? a : b);
        release(branch);
        return same;
    }
    return branch;
}

const Node* with_leaf(const Node* node, unsigned level, uint64_t block, const Node* leaf) {
    if (level == 0) return retain(leaf);
    Node* branch = new_branch(level);
    const unsigned slot = block >> FAN_OUT_BITS * (level - 1) & (FAN_OUT - 1);
    for (unsigned i = 0; i < FAN_OUT; i++) {
        const Node* old = node ? node->child[i] : nullptr;
        branch->child[i] = i == slot ? with_leaf(old, level - 1, block, leaf) : retain(old);
    }
    return branch;
}

}  // namespace

Known::Known(const Known& other) : root(retain(other.root)) {}

Known& Known::operator=(Known other) noexcept {
    std::swap(root, other.root);
    return *this;
}

Known::~Known() { release(root); }

const uint32_t* Known::find(uint64_t block) const {
    const Node* node = root;
    while (node && node->level > 0) node = node->child[block >> FAN_OUT_BITS * (node->level - 1) & (FAN_OUT - 1)];
    return node ? node->time : nullptr;
}

void Known::join(const Known& other) {
    if (root == other.root || !other.root) return;
    const Node* joined = join_nodes(root, other.root);
    release(root);
    root = joined;
}

void Known::set(unsigned levels, uint64_t block, const uint32_t* times, unsigned entries) {
    Node* leaf = new_leaf(entries);
    memcpy(leaf->time, times, entries * sizeof(uint32_t));
    const Node* next = with_leaf(root, levels, block, leaf);
    release(leaf);
    release(root);
    root = next;
}

unsigned Known::levels_for(uint64_t blocks) {
    unsigned levels = 1;
    while (levels < 16 && blocks > 1ull << FAN_OUT_BITS * levels) levels++;
    return levels;
}

// ---- ClockPool ----------------------------------------------------------------------------------------------------

void ClockPool::destroy_all() {
    for (Clock* clock : all) {
        delete[] clock->time;
        delete clock;
    }
    all.clear();
}

ClockPool::~ClockPool() { destroy_all(); }

void ClockPool::reset(unsigned entries) {
    if (entries != entry_count) destroy_all();
    entry_count = entries;
    free = all;
    for (Clock* clock : all) clock->blocks = Known();
    memo_a = memo_b = memo_result = nullptr;
}

Clock* ClockPool::make() {
    Clock* clock;
    if (free.empty()) {
        clock = new Clock{0, Known(), new uint32_t[entry_count]};
        all.push_back(clock);
    } else {
        clock = free.back();
        free.pop_back();
        clock->blocks = Known();
    }
    clock->references = 1;
    memset(clock->time, 0, entry_count * sizeof(uint32_t));
    return clock;
}

Clock* ClockPool::copy(const Clock& from) {
    Clock* clock = make();
    clock->blocks = from.blocks;
    memcpy(clock->time, from.time, entry_count * sizeof(uint32_t));
    return clock;
}

void ClockPool::join_into(Clock& sum, const Clock& other) const {
    for (unsigned i = 0; i < entry_count; i++) sum.time[i] = sum.time[i] > other.time[i] ? sum.time[i] : other.time[i];
    sum.blocks.join(other.blocks);
}

Clock* ClockPool::join(Clock* a, Clock* b) {
    if (a == b) return retain(a);
    if (a == memo_a && b == memo_b) return retain(memo_result);
    Clock* result = copy(*a);
    join_into(*result, *b);
    release(memo_a);
    release(memo_b);
    release(memo_result);
    memo_a = retain(a);
    memo_b = retain(b);
    memo_result = retain(result);
    return result;
}

// ---- Gathering ----------------------------------------------------------------------------------------------------

void Gathering::add(ClockPool& pool, Thread& thread) {
    if (!sum) {
        sum = pool.copy(*thread.knows);
        last = ClockPool::retain(thread.knows);
    } else if (thread.knows != last) {
        pool.join_into(*sum, *thread.knows);
        pool.release(last);
        last = ClockPool::retain(thread.knows);
    }
    sum->time[AGENTS + thread.linear] = thread.time;
    thread.step_time();
    if (thread.time > Stamp::MAX_TIME - 2)
        fail(nullptr, "this thread has synchronised %u times, more than the checker can count", thread.time);
}

void Gathering::add_agent(ClockPool& pool, unsigned agent, uint32_t time) {
    if (!sum) sum = pool.make();
    sum->time[agent] = time;
}

Clock* Gathering::finish(ClockPool& pool) {
    Clock* result = sum ? sum : pool.make();
    pool.release(last);
    abandon();
    return result;
}

}  // namespace emulator
