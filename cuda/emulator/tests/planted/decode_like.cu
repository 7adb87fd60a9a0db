// One head of decode attention without any art, as a load for the emulator: warps take tokens in turn, keep an online softmax
// each and merge in shared memory. q, out [128] f32; k, v [tokens, 128] bf16.
#include "types.cuh"

KERNEL(128, 1) decode_like(const float* q, const bf16* k, const bf16* v, float* out, uint32_t tokens) {
    DYNAMIC_SHARED(shared);
    float* maxima = reinterpret_cast<float*>(shared);
    float* sums = maxima + 4;
    float* partial = sums + 4;  // [4, 128]
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float query[4], acc[4] = {0, 0, 0, 0}, largest = NEGATIVE_INFINITY, sum = 0;
    for (uint32_t i = 0; i < 4; i++) query[i] = q[lane * 4 + i];
    for (uint32_t token = warp; token < tokens; token += 4) {
        float score = 0;
        for (uint32_t i = 0; i < 4; i++) score += query[i] * to_f32(k[token * 128 + lane * 4 + i]);
        for (uint32_t step = 16; step; step /= 2) score += __shfl_xor_sync(FULL_WARP, score, step);
        const float next = fmaxf(largest, score), shrink = expf(largest - next), weight = expf(score - next);
        largest = next;
        sum = sum * shrink + weight;
        for (uint32_t i = 0; i < 4; i++) acc[i] = acc[i] * shrink + weight * to_f32(v[token * 128 + lane * 4 + i]);
    }
    if (lane == 0) {
        maxima[warp] = largest;
        sums[warp] = sum;
    }
    for (uint32_t i = 0; i < 4; i++) partial[warp * 128 + lane * 4 + i] = acc[i];
    __syncthreads();
    float top = NEGATIVE_INFINITY, total = 0, value = 0;
    for (uint32_t w = 0; w < 4; w++) top = fmaxf(top, maxima[w]);
    for (uint32_t w = 0; w < 4; w++) {
        const float shrink = expf(maxima[w] - top);
        total += sums[w] * shrink;
        value += partial[w * 128 + threadIdx.x] * shrink;
    }
    out[threadIdx.x] = value / total;
}
