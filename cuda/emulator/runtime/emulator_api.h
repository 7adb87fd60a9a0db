// The interface between kernels and the runtime. `cuda/include/ptx` calls these on the host; kernels call the wrappers.
//
// Addresses of shared memory are 32-bit "shared addresses", as `cvta.to.shared` gives them. Every function here is a
// plain call into the runtime, which is compiled once and without instrumentation, so that only a kernel's own
// accesses reach the checker as such.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <type_traits>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// ---- the running thread -------------------------------------------------------------------------------------------
// The values never change while a thread runs, so the compiler may call these once and keep the result.

__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_extent();
__attribute__((const)) dim3 grid_extent();
[[noreturn]] void trap();
// A thread that waits for others by polling calls this between two looks (`__nanosleep` does).
void yield();

// ---- shared memory ------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes and filled with 0xFF before the block starts.
__attribute__((const)) unsigned char* dynamic_shared();
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address);

// ---- barriers -----------------------------------------------------------------------------------------------------

enum class Vote : uint8_t { None, Count, And, Or };
// `__syncthreads` and its voting forms: every thread of the block must come, to the same line of source.
int block_barrier(Vote vote, int predicate, const char* file, unsigned line);
// `bar.sync id, threads` and `bar.arrive id, threads`: whole warps, `threads` in all.
void named_barrier_sync(unsigned id, unsigned threads);
void named_barrier_arrive(unsigned id, unsigned threads);

// ---- warp operations ----------------------------------------------------------------------------------------------

void warp_barrier(uint32_t mask);
enum class Shuffle : uint8_t { Index, Up, Down, Xor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int lane, int width);
uint32_t ballot(uint32_t mask, bool predicate);
bool vote_any(uint32_t mask, bool predicate);
bool vote_all(uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t value);
uint32_t match_all(uint32_t mask, uint64_t value, int* all_equal);
enum class Reduction : uint8_t { Add, MinS32, MaxS32, MinU32, MaxU32, And, Or, Xor };
uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value);

// ---- tensor cores: D += A * B, registers as in the PTX ISA --------------------------------------------------------

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k32_s8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k32_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k32_s8u8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k32_u8u8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_s8s8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
void mma_m16n8k16_u8s8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
void mma_m16n8k16_s8u8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);
void mma_m16n8k16_u8u8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]);

// `count` is 1, 2 or 4 matrices of 8 x 8 16-bit elements; lane 8 * m + i gives the address of row i of matrix m.
void ldmatrix(uint32_t* r, unsigned count, bool transposed, uint32_t row_address);
void stmatrix(const uint32_t* r, unsigned count, bool transposed, uint32_t row_address);
uint32_t movmatrix_trans(uint32_t r);

// ---- cp.async -----------------------------------------------------------------------------------------------------

// Copies `source_bytes` of `bytes` (4, 8 or 16) and fills the rest with zeros.
void cp_async(uint32_t dst, const void* src, unsigned bytes, unsigned source_bytes);
void cp_async_commit();
void cp_async_wait(unsigned pending);
// The mbarrier gets an arrival once this thread's copies so far are done; its pending count is not raised for it.
void cp_async_mbarrier_arrive_noinc(uint32_t mbar);

// ---- mbarriers ----------------------------------------------------------------------------------------------------

void mbarrier_init(uint32_t mbar, uint32_t count);
void mbarrier_invalidate(uint32_t mbar);
void mbarrier_arrive(uint32_t mbar);
void mbarrier_arrive_expect_tx(uint32_t mbar, uint32_t bytes);
void mbarrier_expect_tx(uint32_t mbar, uint32_t bytes);
// True once the phase of this parity is complete. Suspends the thread first; false only where nobody else can run.
bool mbarrier_try_wait_parity(uint32_t mbar, uint32_t parity);

// ---- bulk copies and TMA ------------------------------------------------------------------------------------------

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes);
void bulk_commit();
void bulk_wait(unsigned pending);
void bulk_wait_read(unsigned pending);

// The 128 bytes that stand for a CUtensorMap here. The Rust side encodes it (`src/tensor_map.rs`).
struct alignas(64) TensorMap {
    uint64_t magic;          // TENSOR_MAP_MAGIC
    uint64_t address;        // of the first element, divisible by 16
    uint64_t columns, rows;  // extent in elements; x runs along columns
    uint64_t row_bytes;      // distance of two rows, divisible by 16
    uint32_t box_columns, box_rows;
    uint32_t element_bytes;
    uint32_t swizzle_128;  // 0: rows of the box are packed; 1: 128-byte rows, 16-byte chunks XOR-swizzled
    uint64_t planes;       // extent of the third dimension, z; 0 for a map of two
    uint64_t plane_bytes;  // distance of two planes, divisible by 16
    uint64_t reserved[6];
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");
constexpr uint64_t TENSOR_MAP_MAGIC = 0x70616d726f736e74;

// Loads the map's box whose first element is column x, row y; elements outside of the tensor are zero.
void tma_load_2d(uint32_t dst, const void* map, uint32_t mbar, int x, int y);
// The same of plane z of a map of three dimensions; a plane outside of the tensor is all zeros.
void tma_load_3d(uint32_t dst, const void* map, uint32_t mbar, int x, int y, int z);

// ---- wgmma --------------------------------------------------------------------------------------------------------

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending);
// D [64, n] = A·B, or += with `add`, of f16 or bf16. Both operands in shared memory, K-major with 128-byte swizzle; or A in four
// registers and B N-major. `d`, n / 2 registers, and `a` must stay in place until the wait.
void wgmma_ss(float* d, unsigned n, uint64_t a_desc, uint64_t b_desc, bool add, bool bf16);
void wgmma_rs(float* d, unsigned n, const uint32_t* a, uint64_t b_desc, bool add, bool bf16);

// ---- fences and order between blocks ------------------------------------------------------------------------------

void fence_proxy_async();
// What the thread initialised so far may be used by asynchronous copies.
void fence_mbarrier_init();
// Blocks are ordered by these alone. A fence with relaxed atomics beside it is an order on a GPU too, but the emulator
// does not accept it: the wrappers say which word carries the order, a fence does not.
uint32_t load_acquire_u32(const uint32_t* word);
void store_release_u32(uint32_t* word, uint32_t value);
uint32_t atomic_add_acq_rel_u32(uint32_t* word, uint32_t value);
uint32_t atomic_add_release_u32(uint32_t* word, uint32_t value);
uint32_t atomic_cas_acq_rel_u32(uint32_t* word, uint32_t compare, uint32_t value);
uint64_t load_acquire_u64(const uint64_t* word);
void store_release_u64(uint64_t* word, uint64_t value);
uint64_t atomic_add_acq_rel_u64(uint64_t* word, uint64_t value);
uint64_t atomic_add_release_u64(uint64_t* word, uint64_t value);
uint64_t atomic_cas_acq_rel_u64(uint64_t* word, uint64_t compare, uint64_t value);
inline void fence_acq_rel_gpu() {}
// Programmatic dependent launch: launches run one after another here, but before its wait a thread may touch no memory that a kernel
// before might write.
void grid_dependency_wait();
inline void grid_dependency_launch() {}

// Relaxed atomics, on global and shared memory.
enum class Atomic : uint8_t {
    Add,
    AddFloat,
    MinSigned,
    MaxSigned,
    MinUnsigned,
    MaxUnsigned,
    And,
    Or,
    Xor,
    Exchange,
    Increment,
    Decrement
};
uint32_t atomic_u32(Atomic operation, void* word, uint32_t value);
uint64_t atomic_u64(Atomic operation, void* word, uint64_t value);
uint32_t atomic_cas_u32(void* word, uint32_t compare, uint32_t value);
uint64_t atomic_cas_u64(void* word, uint64_t compare, uint64_t value);

// ---- approximate functions: here they are exact to a float's rounding ---------------------------------------------

float exp2_approx(float x);
float rcp_approx(float x);
float log2_approx(float x);

// ---- a kernel as the runtime sees it ------------------------------------------------------------------------------

struct Parameter {
    uint32_t bytes;
    uint32_t is_pointer;
};

struct Entry {
    void (*run)(void* const* arguments);  // one thread; arguments as cuLaunchKernel's kernelParams
    const Parameter* parameters;
    uint32_t count;
};

template <class F>
struct Signature;

template <class... P>
struct Signature<void (*)(P...)> {
    static constexpr uint32_t count = sizeof...(P);
    static constexpr Parameter parameters[count + 1] = {{sizeof(P), std::is_pointer<P>::value}..., {0, 0}};

    // Reading the arguments is no access of the kernel's.
    template <void (*kernel)(P...), size_t... i>
    __attribute__((no_sanitize("thread"))) static void call(void* const* arguments, std::index_sequence<i...>) {
        kernel(*static_cast<std::remove_const_t<P>*>(arguments[i])...);
    }

    template <void (*kernel)(P...)>
    __attribute__((no_sanitize("thread"))) static void run(void* const* arguments) {
        call<kernel>(arguments, std::make_index_sequence<count>());
    }
};

}  // namespace emulator
