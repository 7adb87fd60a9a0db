// 8x8 matrices of 16-bit values between shared memory and fragments. PTX ISA, "Warp-level Matrix Instructions: ldmatrix",
// "stmatrix" and "movmatrix".
//
// All 32 lanes call together. Lane 8·i + r gives the shared address of row r of matrix i: 16 bytes at a 16-byte boundary
// (lanes of matrices that are not moved are ignored). Register i of a lane, g = lane / 4 and t = lane % 4, holds
//
//   plain:   elements (row g, columns 2t and 2t + 1) of matrix i: the fragment of an A operand, or of a B operand that is
//            stored with K contiguous
//   trans:   elements (rows 2t and 2t + 1, column g) of matrix i
//
// with the first element in the low half. Pairs of 8-bit values move as one 16-bit element (plain only).
#pragma once

#include "core.cuh"

// One matrix. ldmatrix.m8n8.x1
DEVICE void ldmatrix_x1(uint32_t (&r)[1], uint32_t row_address) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(row_address)
                 : "memory");
#else
    emulator::ldmatrix(r, 1, false, row_address);
#endif
}

// One matrix, transposed. ldmatrix.m8n8.x1.trans
DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t row_address) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(row_address)
                 : "memory");
#else
    emulator::ldmatrix(r, 1, true, row_address);
#endif
}

// Two matrices. ldmatrix.m8n8.x2
DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row_address) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row_address)
                 : "memory");
#else
    emulator::ldmatrix(r, 2, false, row_address);
#endif
}

// Two matrices, transposed. ldmatrix.m8n8.x2.trans
DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row_address) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row_address)
                 : "memory");
#else
    emulator::ldmatrix(r, 2, true, row_address);
#endif
}

// Four matrices. ldmatrix.m8n8.x4
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
#else
    emulator::ldmatrix(r, 4, false, row_address);
#endif
}

// Four matrices, transposed. ldmatrix.m8n8.x4.trans
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
#else
    emulator::ldmatrix(r, 4, true, row_address);
#endif
}

// The transpose of one 8x8 matrix across the warp's registers: a lane gives elements (row g, columns 2t and 2t + 1) and
// receives elements (rows 2t and 2t + 1, column g). Turns a rounded accumulator into the operand of the next product.
// movmatrix.m8n8.trans
DEVICE uint32_t movmatrix_trans(uint32_t r) {
#ifdef __CUDACC__
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
    return transposed;
#else
    return emulator::movmatrix_trans(r);
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // stmatrix is sm_90; elsewhere a use does not compile

// One matrix stored. stmatrix.m8n8.x1 (sm_90)
DEVICE void stmatrix_x1(uint32_t row_address, const uint32_t (&r)[1]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row_address), "r"(r[0])
                 : "memory");
#else
    emulator::stmatrix(r, 1, false, row_address);
#endif
}

// One matrix stored, transposed. stmatrix.m8n8.x1.trans (sm_90)
DEVICE void stmatrix_x1_trans(uint32_t row_address, const uint32_t (&r)[1]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row_address), "r"(r[0])
                 : "memory");
#else
    emulator::stmatrix(r, 1, true, row_address);
#endif
}

// Two matrices stored. stmatrix.m8n8.x2 (sm_90)
DEVICE void stmatrix_x2(uint32_t row_address, const uint32_t (&r)[2]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row_address), "r"(r[0]), "r"(r[1])
                 : "memory");
#else
    emulator::stmatrix(r, 2, false, row_address);
#endif
}

// Two matrices stored, transposed. stmatrix.m8n8.x2.trans (sm_90)
DEVICE void stmatrix_x2_trans(uint32_t row_address, const uint32_t (&r)[2]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row_address), "r"(r[0]), "r"(r[1])
                 : "memory");
#else
    emulator::stmatrix(r, 2, true, row_address);
#endif
}

// Four matrices stored. stmatrix.m8n8.x4 (sm_90)
DEVICE void stmatrix_x4(uint32_t row_address, const uint32_t (&r)[4]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    emulator::stmatrix(r, 4, false, row_address);
#endif
}

// Four matrices stored, transposed. stmatrix.m8n8.x4.trans (sm_90)
DEVICE void stmatrix_x4_trans(uint32_t row_address, const uint32_t (&r)[4]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    emulator::stmatrix(r, 4, true, row_address);
#endif
}

#endif
