// The CUDA side of the element-wise ops: one grid-stride loop over packs of elements, moved as 16-byte words.
#pragma once

#include <cuda_runtime.h>

#include "../numeric.h"

namespace ensadv {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

// Elements a thread handles at a time: 16 bytes of a 16-bit type, 32 of a wider one.
template <class T>
constexpr int kPack = sizeof(T) == 8 ? 4 : 8;

template <class A>
__device__ __forceinline__ A at(const PerSample& p, int64_t sample) {
  return p.data ? static_cast<const A*>(p.data)[sample] : A(p.value);
}
template <class A>
__device__ __forceinline__ A size_at(const PerSample& p, int64_t sample) {
  const A v = at<A>(p, sample);
  return v > A(0) ? v : A(0);
}

// Which sample element i belongs to. The 32-bit division is several times cheaper.
__device__ __forceinline__ int64_t sample_of(int64_t i, const Batch& batch) {
  return batch.numel <= 0xffffffffLL ? int64_t(uint32_t(i) / uint32_t(batch.inner)) : i / batch.inner;
}

template <class T, int V>
__device__ __forceinline__ void load_pack(const void* base, int64_t i, int count, bool whole, compute_t<T>* dst) {
  const T* src = static_cast<const T*>(base) + i;
  if (whole) {
    constexpr int kWords = V * int(sizeof(T)) / 16;
    uint4 words[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = reinterpret_cast<const uint4*>(src)[k];
    T values[V];
    memcpy(values, words, sizeof(values));
#pragma unroll
    for (int j = 0; j < V; ++j) dst[j] = to_compute(values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) dst[j] = j < count ? to_compute(src[j]) : compute_t<T>(0);
  }
}

template <class T, int V>
__device__ __forceinline__ void store_pack(void* base, int64_t i, int count, bool whole, const T* values) {
  T* dst = static_cast<T*>(base) + i;
  if (whole) {
    constexpr int kWords = V * int(sizeof(T)) / 16;
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int k = 0; k < kWords; ++k) reinterpret_cast<uint4*>(dst)[k] = words[k];
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j < count) dst[j] = values[j];
  }
}

// body(first element, count, whole) for every pack; `whole` packs may move as 16-byte words.
template <int V, class Body>
__device__ __forceinline__ void for_each_pack(int64_t numel, bool aligned, Body body) {
  const int64_t stride = int64_t(gridDim.x) * kThreads * V;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; i < numel; i += stride) {
    const int count = numel - i < V ? int(numel - i) : V;
    body(i, count, aligned && count == V);
  }
}

inline bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }  // null is

// Enough blocks to fill the current device, and no more than there are packs.
inline cudaError_t grid_for(int64_t numel, int pack, unsigned* grid) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int64_t per_block = int64_t(kThreads) * pack;
  const int64_t wanted = (numel + per_block - 1) / per_block;
  *grid = unsigned(wanted < int64_t(sms) * kBlocksPerSm ? wanted : int64_t(sms) * kBlocksPerSm);
  return error;
}

// Launch kernel(args, aligned) over `numel` elements and report what the launch itself said.
template <int V, class Args>
int launch(void (*kernel)(Args, bool), const Args& args, int64_t numel, bool aligned, void* stream) {
  unsigned grid = 0;
  const cudaError_t error = grid_for(numel, V, &grid);
  if (error != cudaSuccess) return int(error);
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, aligned);
  return int(cudaGetLastError());
}

}  // namespace ensadv
