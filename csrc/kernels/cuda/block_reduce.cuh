// Reductions over the threads of a block, for several rows at a time.
#pragma once

#include "../logit_grad.h"
#include "loop.cuh"

namespace ensadv {

constexpr int kMaxThreads = 512;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

// The best score's ordinal and its index; of equal scores the first is the best.
template <class A>
struct Best {
  ordinal_t<A> ordinal = kNoOrdinal<A>;
  int32_t index = INT32_MAX;

  __device__ __forceinline__ void take(const Best& other) {
    const bool better = other.ordinal > ordinal || (other.ordinal == ordinal && other.index < index);
    ordinal = better ? other.ordinal : ordinal;
    index = better ? other.index : index;
  }
  __device__ __forceinline__ Best from_lane(int lane_mask) const {
    return {__shfl_xor_sync(kAllLanes, ordinal, lane_mask), __shfl_xor_sync(kAllLanes, index, lane_mask)};
  }
};

// A sum and its largest term.
template <class A>
struct Terms {
  A sum = 0, largest = 0;

  __device__ __forceinline__ void take(const Terms& other) {
    sum += other.sum;
    largest = other.largest > largest ? other.largest : largest;
  }
  __device__ __forceinline__ Terms from_lane(int lane_mask) const {
    return {__shfl_xor_sync(kAllLanes, sum, lane_mask), __shfl_xor_sync(kAllLanes, largest, lane_mask)};
  }
};

template <class X>
struct Sum {
  X value = 0;

  __device__ __forceinline__ void take(const Sum& other) { value += other.value; }
  __device__ __forceinline__ Sum from_lane(int lane_mask) const {
    return {__shfl_xor_sync(kAllLanes, value, lane_mask)};
  }
};

// Combines x[g] over all threads. Every thread gets the result. X{} is the neutral element.
template <class X, int N>
__device__ __forceinline__ void reduce(X (&x)[N]) {
  constexpr int kMaxWarps = kMaxThreads / kWarpLanes;
  __shared__ X partial[N][kMaxWarps];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
#pragma unroll
  for (int mask = kWarpLanes / 2; mask; mask /= 2)
#pragma unroll
    for (int g = 0; g < N; ++g) x[g].take(x[g].from_lane(mask));
  if (warps == 1) return;
  __syncthreads();  // a slower warp may still have read the results of the call before
#pragma unroll
  for (int g = 0; g < N; ++g)
    if (lane == 0) partial[g][warp] = x[g];
  __syncthreads();
#pragma unroll
  for (int g = 0; g < N; ++g) x[g] = lane % kMaxWarps < warps ? partial[g][lane % kMaxWarps] : X{};
#pragma unroll
  for (int mask = kMaxWarps / 2; mask; mask /= 2)
#pragma unroll
    for (int g = 0; g < N; ++g) x[g].take(x[g].from_lane(mask));
}
template <class X>
__device__ __forceinline__ X reduce_one(X x) {
  X one[1] = {x};
  reduce(one);
  return one[0];
}

}  // namespace ensadv
