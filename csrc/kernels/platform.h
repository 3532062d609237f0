// What differs between the host compiler and nvcc, in one place.
#pragma once

namespace ensadv {

constexpr int kWarpLanes = 32;  // of a CUDA warp; the CPU's reductions add up in the same order

}  // namespace ensadv

#if defined(__CUDACC__)
#define ENSADV_HD __host__ __device__ __forceinline__
#else
#define ENSADV_HD inline __attribute__((always_inline))
#endif

// Entry points of CPU loops carry this: the compiler emits one body per instruction set and the loader picks
// one at run time, so a wheel built for the baseline still runs at full width. Everything they call must be
// ENSADV_HD to be inlined into each body. Sanitizer builds define ENSADV_NO_CLONES, because the resolvers
// would run before the sanitizer's own start-up.
#if defined(__x86_64__) && defined(__linux__) && !defined(__CUDACC__) && !defined(ENSADV_NO_CLONES)
#define ENSADV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ENSADV_CLONES
#endif

// In-place calls read and write the same address at the same index only, never across indices.
#if defined(__clang__)
#define ENSADV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ENSADV_INDEPENDENT _Pragma("GCC ivdep")
#endif
