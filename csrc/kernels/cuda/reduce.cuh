// The CUDA side of reduce.h: one block per chunk.
#pragma once

#include "../reduce.h"
#include "loop.cuh"

namespace ensadv {

static_assert(kReduceThreads == kThreads);

// Folds a thread's slots, then the warp's lanes, then the block's warps. Thread 0 gets the sum.
__device__ __forceinline__ double fold_block(double (&slots)[kSlotPack]) {
  __shared__ double warps[kReduceThreads / 32];
#pragma unroll
  for (int half = kSlotPack / 2; half > 0; half /= 2)
#pragma unroll
    for (int j = 0; j < half; ++j) slots[j] += slots[j + half];
  double sum = slots[0];
#pragma unroll
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int half = kReduceThreads / 64; half > 0; half /= 2)
#pragma unroll
      for (int j = 0; j < half; ++j) warps[j] += warps[j + half];
    sum = warps[0];
  }
  return sum;
}

// The chunk that this block works on.
struct BlockChunk {
  int64_t sample, first, count;  // first: element of the batch

  __device__ BlockChunk(const Batch& batch, const Chunks& chunks) {
    sample = blockIdx.x / chunks.count;
    const int64_t at = blockIdx.x % chunks.count * chunks.size;
    first = sample * batch.inner + at;
    count = batch.inner - at < chunks.size ? batch.inner - at : chunks.size;
  }
};

// terms(first element, count, whole, double (&)[kSlotPack]) adds a pack's terms to the thread's slots.
template <class Terms>
__device__ __forceinline__ void sum_block(const BlockChunk& chunk, bool aligned, double* out, Terms terms) {
  double slots[kSlotPack] = {};
  const bool whole_packs = aligned && chunk.first % kSlotPack == 0;
  for (int64_t k = int64_t(threadIdx.x) * kSlotPack; k < chunk.count; k += kSlots) {
    const int count = chunk.count - k < kSlotPack ? int(chunk.count - k) : kSlotPack;
    terms(chunk.first + k, count, whole_packs && count == kSlotPack, slots);
  }
  const double sum = fold_block(slots);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// body(first element, count, whole) for the packs of the block's chunk. A pack begins at a multiple of V elements of
// the batch, so that it can move as 16-byte words wherever the sample begins; the packs at the chunk's ends are
// shorter.
template <int V, class Body>
__device__ __forceinline__ void for_each_pack_in(const BlockChunk& chunk, bool aligned, Body body) {
  const int64_t end = chunk.first + chunk.count;
  for (int64_t i = chunk.first / V * V + int64_t(threadIdx.x) * V; i < end; i += int64_t(kThreads) * V) {
    const int64_t from = i < chunk.first ? chunk.first : i;
    const int count = int((end < i + V ? end : i + V) - from);
    body(from, count, aligned && count == V);
  }
}

// Launches one block per chunk of the batch. A launch may have 2^31 - 1 blocks.
template <class... Params, class... Args>
int launch_chunks(void (*kernel)(Params...), const Batch& batch, const Chunks& chunks, void* stream,
                  const Args&... args) {
  const int64_t grid = batch.numel / batch.inner * chunks.count;
  if (grid > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  kernel<<<unsigned(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  return int(cudaGetLastError());
}

}  // namespace ensadv
