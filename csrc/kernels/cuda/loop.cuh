// The CUDA side of the element-wise ops: one grid-stride loop over packs of elements, moved as 16-byte words.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../numeric.h"

namespace ensadv {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

// Elements a thread handles at a time: 16 bytes of the narrowest type among those a kernel moves, 32 of float32.
template <class... T>
constexpr int kPack = ((sizeof(T) == 1) || ...) ? 16 : ((sizeof(T) == 8) || ...) ? 4 : 8;

// The sample of element i. Where 32 bits suffice, their division is several times cheaper.
__device__ __forceinline__ int64_t sample_of(int64_t i, const Batch& batch) {
  return batch.numel <= 0xffffffffLL ? int64_t(uint32_t(i) / uint32_t(batch.inner)) : i / batch.inner;
}

// A pack's bytes as 16-byte words, or as an 8-byte word if it is eight bytes.
template <class T, int V>
struct PackWords {
  using Word = std::conditional_t<V * sizeof(T) % 16 == 0, uint4, uint2>;
  static_assert(V * sizeof(T) % sizeof(Word) == 0);
  static constexpr int kCount = V * sizeof(T) / sizeof(Word);
  Word word[kCount];
};

template <class T, int V>
__device__ __forceinline__ void load_raw(const void* base, int64_t i, int count, bool whole, T* values) {
  const T* src = static_cast<const T*>(base) + i;
  if (whole) {
    using W = PackWords<T, V>;
    W words;
#pragma unroll
    for (int k = 0; k < W::kCount; ++k) words.word[k] = reinterpret_cast<const typename W::Word*>(src)[k];
    memcpy(values, &words, sizeof(words));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = j < count ? src[j] : T{};
  }
}

template <class T, int V>
__device__ __forceinline__ void load_pack(const void* base, int64_t i, int count, bool whole, compute_t<T>* dst) {
  T values[V];
  load_raw<T, V>(base, i, count, whole, values);
#pragma unroll
  for (int j = 0; j < V; ++j) dst[j] = to_compute(values[j]);
}

// body(T()) for the one of the types T that has this dtype. All threads branch alike, so that the branch costs next to
// nothing. A kernel for each combination of dtypes would take minutes to compile.
template <class... T, class Body>
__device__ __forceinline__ void with_one_of(Dtype dtype, Body body) {
  (void)((dtype == Traits<T>::dtype && (body(T()), true)) || ...);
}

// load_pack from memory of one of the types T. Load a pack's other tensors first: this load waits for its words, and
// theirs arrive meanwhile.
template <int V, class... T, class A>
__device__ __forceinline__ void load_any(const In& from, int64_t i, int count, bool whole, A* dst) {
  with_one_of<T...>(from.dtype, [&](auto t) {
    compute_t<decltype(t)> values[V];
    load_pack<decltype(t), V>(from.data, i, count, whole, values);
#pragma unroll
    for (int j = 0; j < V; ++j) dst[j] = A(values[j]);
  });
}

// A gradient, for a step computed in A. It has any float dtype, but float64 if and only if A is double.
template <int V, class A>
__device__ __forceinline__ void load_grad(const In& grad, int64_t i, int count, bool whole, A* dst) {
  if constexpr (std::is_same_v<A, double>)
    load_pack<double, V>(grad.data, i, count, whole, dst);
  else
    load_any<V, float, half_t, bfloat_t>(grad, i, count, whole, dst);
}

template <class T, int V>
__device__ __forceinline__ void store_pack(void* base, int64_t i, int count, bool whole, const T* values) {
  T* dst = static_cast<T*>(base) + i;
  if (whole) {
    using W = PackWords<T, V>;
    W words;
    memcpy(&words, values, sizeof(words));
#pragma unroll
    for (int k = 0; k < W::kCount; ++k) reinterpret_cast<typename W::Word*>(dst)[k] = words.word[k];
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j < count) dst[j] = values[j];
  }
}

// body(first element, count, whole) for every pack. `whole`: the pack may move as 16-byte words.
template <int V, class Body>
__device__ __forceinline__ void for_each_pack(int64_t numel, bool aligned, Body body) {
  const int64_t stride = int64_t(gridDim.x) * kThreads * V;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; i < numel; i += stride) {
    const int count = numel - i < V ? int(numel - i) : V;
    body(i, count, aligned && count == V);
  }
}

inline bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }  // so is null

// Enough blocks to fill the current device, but no more than the packs need.
inline cudaError_t grid_for(int64_t numel, int pack, unsigned* grid) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const int64_t per_block = int64_t(kThreads) * pack;
  const int64_t wanted = (numel + per_block - 1) / per_block;
  *grid = unsigned(wanted < int64_t(sms) * kBlocksPerSm ? wanted : int64_t(sms) * kBlocksPerSm);
  return error;
}

// Launches kernel(args...) over `numel` elements, V per thread at a time. Returns the launch's error code.
template <int V, class... Params, class... Args>
int launch(void (*kernel)(Params...), int64_t numel, void* stream, const Args&... args) {
  unsigned grid = 0;
  const cudaError_t error = grid_for(numel, V, &grid);
  if (error != cudaSuccess) return int(error);
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  return int(cudaGetLastError());
}

// run(X(), Out()) for the C++ types of x and out, if a step takes them: out has x's dtype, or is narrower than float32
// x, or is float32 for uint8 x.
template <class Run>
int with_step_dtypes(Dtype x, Dtype grad, Dtype out, Run run) {
  if (grad == Dtype::u8 || (grad == Dtype::f64) != (x == Dtype::f64)) return int(cudaErrorInvalidValue);
  if (x == Dtype::f32) {
    if (out == Dtype::f32) return run(float(), float());
    if (out == Dtype::f16) return run(float(), half_t());
    if (out == Dtype::bf16) return run(float(), bfloat_t());
    if (out == Dtype::u8) return run(float(), level_t());
  }
  if (x == Dtype::f64 && out == x) return run(double(), double());
  if (x == Dtype::f16 && out == x) return run(half_t(), half_t());
  if (x == Dtype::bf16 && out == x) return run(bfloat_t(), bfloat_t());
  if (x == Dtype::u8 && out == x) return run(level_t(), level_t());
  if (x == Dtype::u8 && out == Dtype::f32) return run(level_t(), float());
  return int(cudaErrorInvalidValue);
}

}  // namespace ensadv
