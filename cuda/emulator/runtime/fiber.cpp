#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl emulator_switch\n"
    ".type emulator_switch, @function\n"
    "emulator_switch:\n"
    "    pushq %rbp\n"
    "    pushq %rbx\n"
    "    pushq %r12\n"
    "    pushq %r13\n"
    "    pushq %r14\n"
    "    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n"
    "    popq %r14\n"
    "    popq %r13\n"
    "    popq %r12\n"
    "    popq %rbx\n"
    "    popq %rbp\n"
    "    ret\n"
    ".size emulator_switch, .-emulator_switch\n");

namespace emulator {

constexpr size_t GUARD_BYTES = 4096;

uintptr_t map_stack() {
    void* memory = mmap(nullptr, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) throw std::bad_alloc();
    return reinterpret_cast<uintptr_t>(memory) + GUARD_BYTES;
}

void unmap_stack(uintptr_t low) { munmap(reinterpret_cast<void*>(low - GUARD_BYTES), STACK_BYTES + GUARD_BYTES); }

void* prepare_stack(uintptr_t low, unsigned number, void (*entry)()) {
    // Stacks lie whole pages apart. Were their tops too, all would compete for the same few sets of the cache.
    const size_t colour = number * 320 % 4096 / 64 * 64;
    void** top = reinterpret_cast<void**>(low + STACK_BYTES - colour);
    *--top = nullptr;                         // where entry would return to; keeps its frame aligned as after a call
    *--top = reinterpret_cast<void*>(entry);  // popped by `ret`
    top -= 6;                                 // the six registers
    memset(top, 0, 6 * sizeof(void*));
    return top;
}

}  // namespace emulator
