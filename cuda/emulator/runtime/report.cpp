#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <map>

#include "image.h"
#include "launch.h"
#include "scheduler.h"

namespace emulator {

namespace {

std::string format_arguments(const char* format, va_list arguments) {
    char text[768];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string result = format_arguments(format, arguments);
    va_end(arguments);
    return result;
}

std::string block_name(const Block& block) {
    return text("block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
}

std::string at(Place place) { return place ? text(" at {@%x}", place) : ""; }

}  // namespace

Place place_of(const void* pc) {
    static const uintptr_t base = Image::get().base;
    const uintptr_t address = reinterpret_cast<uintptr_t>(pc) - 1;  // within the call, not after it
    return address - base < (1ull << 32) ? static_cast<Place>(address - base) : 0;
}

std::string thread_name(const Block& block, unsigned thread) {
    const Launch& launch = *block.launch;
    const uint3 t = {thread % launch.extent.x, thread / launch.extent.x % launch.extent.y,
                     thread / (launch.extent.x * launch.extent.y)};
    std::string name = text("thread %u", thread);
    if (launch.extent.y > 1 || launch.extent.z > 1) name += text(" = (%u, %u, %u)", t.x, t.y, t.z);
    return name + text(" (warp %u, lane %u)", thread / LANES, thread % LANES);
}

void fail(const void* pc, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const std::string message = format_arguments(format, arguments);
    va_end(arguments);
    Block& block = *current->block;
    block.report = message + "\n  by " + thread_name(block, current->linear) + " of " + block_name(block) +
                   at(pc ? place_of(pc) : 0) + "\n";
    abandon_block();
}

void fail_conflict(const void* pc, const char* memory, const Conflict& conflict, const std::string& bytes) {
    Block& block = *current->block;
    const Stamp other = conflict.other;
    std::string message = text("%s memory: ", memory);
    if (other.under_way()) {
        message += "access to bytes of an asynchronous operation that nobody has waited for";
    } else {
        message += conflict.what;
    }
    message += ", " + bytes + "\n  by " + thread_name(block, current->linear) + " of " + block_name(block) +
               at(place_of(pc)) + "\n";
    if (other.bits) {
        message += "  against ";
        message += other.by_agent() ? "an asynchronous copy" : thread_name(block, other.thread());
        if (other.block_tag() == block.tag) {
            message += " of the same block";
        } else {
            const uint64_t linear = other.block_tag() - 1;
            const dim3 grid = block.launch->grid;
            message += text(" of block (%llu, %llu, %llu), which did not release it to this thread",
                            (unsigned long long)(linear % grid.x), (unsigned long long)(linear / grid.x % grid.y),
                            (unsigned long long)(linear / ((uint64_t)grid.x * grid.y)));
        }
        message += at(conflict.place) + "\n";
    }
    block.report = message;
    abandon_block();
}

void fail_deadlock(const char* why) {
    Block& block = *current->block;
    std::string message = text("%s, in ", why) + block_name(block) + "\n";
    // One line for all threads that wait for the same thing in the same place.
    std::map<std::string, std::pair<unsigned, unsigned>> groups;  // what -> first thread, how many
    unsigned finished = 0;
    for (unsigned i = 0; i < block.threads_in_block; i++) {
        const Thread& thread = block.threads[i];
        if (thread.state == State::Finished) {
            finished++;
            continue;
        }
        std::string what;
        switch (thread.state) {
        case State::AtWarp:
            what = text("wait in %s with mask %08x", thread.operation, thread.warp->arrivals[thread.lane].mask);
            break;
        case State::AtBarrier: {
            const Barrier& barrier = block.barriers[thread.detail];
            what = text("wait at %s (barrier %u), where %u of %u threads have arrived", thread.operation, thread.detail,
                        barrier.arrived, barrier.expected);
            break;
        }
        case State::AtMbarrier: {
            what = text("wait at the mbarrier at shared address %u", thread.detail);
            for (const Mbarrier& m : block.mbarriers)
                if (m.address == thread.detail)
                    what += text(" (phase %u lacks %u of %u arrivals and %lld bytes)", m.phase, m.pending, m.count,
                                 (long long)m.transactions);
            break;
        }
        default:
            what = thread.polled ? "poll" : "could go on";
        }
        what += at(thread.pc ? place_of(thread.pc) : 0);
        auto& group = groups.emplace(what, std::make_pair(i, 0u)).first->second;
        group.second++;
    }
    for (const auto& [what, group] : groups) {
        message += group.second == 1 ? "  " : text("  %u threads from ", group.second);
        message += thread_name(block, group.first) + (group.second == 1 ? ": " : " on: ") + what + "\n";
    }
    if (finished) message += text("  %u of %u threads have ended\n", finished, block.threads_in_block);
    block.report = message;
    abandon_block();
}

}  // namespace emulator
