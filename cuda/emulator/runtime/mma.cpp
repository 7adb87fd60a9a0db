// mma.sync and the matrix moves: ldmatrix, stmatrix, movmatrix.
//
// Fragment maps of the PTX ISA ("Matrix Fragments for mma.m16n8k16 …"). With g = lane / 4, t = lane % 4 and E elements
// per 32-bit register (4 for 8-bit types, 2 for 16-bit types, 1 for tf32):
//
//   A, register i: row g + 8 * (i % 2), k = t * E + e + (i / 2) * 4 * E     for e < E
//   B, register i: column g,            k = t * E + e + i * 4 * E
//   D, register i: row g + 8 * (i / 2), column 2 * t + i % 2
//
// Sums run over k in order, in f32 for floats, and are then added to the accumulator. A tensor core adds in another
// order and truncates, so the last bits of float results differ from a GPU's; integer results do not.
#include <cstring>

#include "checker.h"
#include "formats.h"
#include "report.h"
#include "warp.h"

namespace emulator {

namespace {

#define CALLER __builtin_return_address(0)

constexpr unsigned ROWS = 16, COLUMNS = 8;

struct Operands {
    const uint32_t *a, *b;
    void* d;
};

// Element e of a register, in the type that products are summed in.
struct Bf16 {
    using Sum = float;
    static constexpr unsigned PER_REGISTER = 2;
    static float element(uint32_t r, unsigned e) { return bf16_to_f32(r >> 16 * e & 0xffff); }
};

struct F16 {
    using Sum = float;
    static constexpr unsigned PER_REGISTER = 2;
    static float element(uint32_t r, unsigned e) { return f16_to_f32(r >> 16 * e & 0xffff); }
};

struct Tf32 {
    using Sum = float;
    static constexpr unsigned PER_REGISTER = 1;
    // The tensor core ignores the low 13 bits.
    static float element(uint32_t r, unsigned) { return bits_to_f32(r & 0xffffe000u); }
};

struct S8 {
    using Sum = int32_t;
    static constexpr unsigned PER_REGISTER = 4;
    static int32_t element(uint32_t r, unsigned e) { return (int8_t)(r >> 8 * e); }
};

struct U8 {
    using Sum = int32_t;
    static constexpr unsigned PER_REGISTER = 4;
    static int32_t element(uint32_t r, unsigned e) { return (uint8_t)(r >> 8 * e); }
};

template <class A, class B, unsigned K>
void run_mma(Warp& warp, uint32_t) {
    using Sum = typename A::Sum;
    constexpr unsigned E = A::PER_REGISTER, A_REGISTERS = K / (2 * E), B_REGISTERS = K / (4 * E);
    Sum a[ROWS][K], b[K][COLUMNS], sum[ROWS][COLUMNS] = {};
    for (unsigned lane = 0; lane < LANES; lane++) {
        const Operands& o = operand<Operands>(warp, lane);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < A_REGISTERS; i++)
            for (unsigned e = 0; e < E; e++) a[g + 8 * (i % 2)][t * E + e + i / 2 * 4 * E] = A::element(o.a[i], e);
        for (unsigned i = 0; i < B_REGISTERS; i++)
            for (unsigned e = 0; e < E; e++) b[t * E + e + i * 4 * E][g] = B::element(o.b[i], e);
    }
    for (unsigned row = 0; row < ROWS; row++)
        for (unsigned k = 0; k < K; k++)
            for (unsigned column = 0; column < COLUMNS; column++) sum[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < LANES; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        Sum* d = static_cast<Sum*>(operand<Operands>(warp, lane).d);
        for (unsigned i = 0; i < 4; i++) {
            const Sum s = sum[g + 8 * (i / 2)][2 * t + i % 2];
            if constexpr (std::is_same<Sum, float>::value) {
                d[i] += s;
            } else {
                d[i] = (int32_t)((uint32_t)d[i] + (uint32_t)s);  // wraps
            }
        }
    }
    warp.threads->block->counters.mma++;
}

template <class A, class B, unsigned K>
void mma(const char* name, void* d, const uint32_t* a, const uint32_t* b, const void* pc) {
    static const Meeting meeting{name, run_mma<A, B, K>, false, true};
    Operands o{a, b, d};
    meet(meeting, ~0u, &o, pc);
}

}  // namespace

#define FLOAT_MMA(name, type, k)                                               \
    void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        mma<type, type, k>(#name, d, a, b, CALLER);                            \
    }
FLOAT_MMA(mma_m16n8k16_bf16, Bf16, 16)
FLOAT_MMA(mma_m16n8k16_f16, F16, 16)
FLOAT_MMA(mma_m16n8k8_tf32, Tf32, 8)

#define INTEGER_MMA(types, A, B)                                                             \
    void mma_m16n8k32_##types(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        mma<A, B, 32>("mma_m16n8k32_" #types, d, a, b, CALLER);                              \
    }                                                                                        \
    void mma_m16n8k16_##types(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) { \
        mma<A, B, 16>("mma_m16n8k16_" #types, d, a, b, CALLER);                              \
    }
INTEGER_MMA(s8s8, S8, S8)
INTEGER_MMA(u8s8, U8, S8)
INTEGER_MMA(s8u8, S8, U8)
INTEGER_MMA(u8u8, U8, U8)

// ---- ldmatrix, stmatrix, movmatrix --------------------------------------------------------------------------------
// Matrices are 8 x 8 elements of 16 bits. Register m of lane 4 * i + j holds elements (i, 2 * j) and (i, 2 * j + 1) of
// matrix m, or, transposed, (2 * j, i) and (2 * j + 1, i). Row i of matrix m lies at the address that lane 8 * m + i
// gives.

namespace {

struct MatrixOperand {
    uint32_t* r;
    unsigned count;
    bool transposed;
    uint32_t row_address;
    const void* pc;
};

// Element (row, column) of matrix m is half `half` of the lane's register m.
struct Position {
    unsigned row, column;
};
Position position(unsigned lane, unsigned half, bool transposed) {
    const unsigned i = lane / 4, j = 2 * (lane % 4) + half;
    return transposed ? Position{j, i} : Position{i, j};
}

// The operands of all lanes agree; the rows lie in shared memory.
MatrixOperand& agree(Warp& warp, const char* what) {
    MatrixOperand& first = operand<MatrixOperand>(warp, 0);
    for (unsigned lane = 1; lane < LANES; lane++) {
        const MatrixOperand& o = operand<MatrixOperand>(warp, lane);
        if (o.count != first.count || o.transposed != first.transposed)
            fail(o.pc, "%s: lanes 0 and %u want different shapes", what, lane);
    }
    return first;
}

unsigned char* row_of(Warp& warp, unsigned index, const char* what) {
    const MatrixOperand& o = operand<MatrixOperand>(warp, index);
    return shared_bytes(o.row_address, 16, 16, what, o.pc);
}

void run_ldmatrix(Warp& warp, uint32_t) {
    const MatrixOperand& shape = agree(warp, "ldmatrix");
    for (unsigned m = 0; m < shape.count; m++) {
        uint16_t element[8][8];
        for (unsigned row = 0; row < 8; row++) {
            const unsigned owner = 8 * m + row;
            const MatrixOperand& o = operand<MatrixOperand>(warp, owner);
            memcpy(element[row], row_of(warp, owner, "ldmatrix"), 16);
            // The row goes to other lanes than the one that names it: it must be known to both kinds.
            check_shared(warp.threads[owner], o.row_address, 16, Kind::Read, o.pc);
            check_shared(warp.threads[owner ^ 1], o.row_address, 16, Kind::Read, o.pc);
        }
        for (unsigned lane = 0; lane < LANES; lane++) {
            const Position low = position(lane, 0, shape.transposed), high = position(lane, 1, shape.transposed);
            operand<MatrixOperand>(warp, lane).r[m] =
                element[low.row][low.column] | (uint32_t)element[high.row][high.column] << 16;
        }
    }
}

void run_stmatrix(Warp& warp, uint32_t) {
    const MatrixOperand& shape = agree(warp, "stmatrix");
    for (unsigned m = 0; m < shape.count; m++) {
        uint16_t element[8][8];
        for (unsigned lane = 0; lane < LANES; lane++) {
            const uint32_t r = operand<MatrixOperand>(warp, lane).r[m];
            for (unsigned half = 0; half < 2; half++) {
                const Position p = position(lane, half, shape.transposed);
                element[p.row][p.column] = (uint16_t)(r >> 16 * half);
            }
        }
        for (unsigned row = 0; row < 8; row++) {
            const unsigned owner = 8 * m + row;
            const MatrixOperand& o = operand<MatrixOperand>(warp, owner);
            unsigned char* bytes = row_of(warp, owner, "stmatrix");
            check_shared(warp.threads[owner], o.row_address, 16, Kind::Write, o.pc);
            memcpy(bytes, element[row], 16);
        }
    }
}

void run_movmatrix(Warp& warp, uint32_t) {
    uint16_t element[8][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        const uint32_t r = operand<uint32_t>(warp, lane);
        for (unsigned half = 0; half < 2; half++) {
            const Position p = position(lane, half, false);
            element[p.row][p.column] = (uint16_t)(r >> 16 * half);
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        const Position low = position(lane, 0, true), high = position(lane, 1, true);
        operand<uint32_t>(warp, lane) = element[low.row][low.column] | (uint32_t)element[high.row][high.column] << 16;
    }
}

}  // namespace

void ldmatrix(uint32_t* r, unsigned count, bool transposed, uint32_t row_address) {
    static const Meeting meeting{"ldmatrix", run_ldmatrix, false, true};
    MatrixOperand o{r, count, transposed, row_address, CALLER};
    meet(meeting, ~0u, &o, o.pc);
}

void stmatrix(const uint32_t* r, unsigned count, bool transposed, uint32_t row_address) {
    static const Meeting meeting{"stmatrix", run_stmatrix, false, true};
    MatrixOperand o{const_cast<uint32_t*>(r), count, transposed, row_address, CALLER};
    meet(meeting, ~0u, &o, o.pc);
}

uint32_t movmatrix_trans(uint32_t r) {
    static const Meeting meeting{"movmatrix", run_movmatrix, false, true};
    meet(meeting, ~0u, &r, CALLER);
    return r;
}

}  // namespace emulator
