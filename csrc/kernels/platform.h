// What differs between compilers, processors and devices.
#pragma once

namespace ensadv {

constexpr int kWarpLanes = 32;  // of a CUDA warp; the CPU's reductions add up in the same order

}  // namespace ensadv

#if defined(__CUDACC__)
#define ENSADV_HD __host__ __device__ __forceinline__
#else
#define ENSADV_HD inline __attribute__((always_inline))
#endif

// Marks the functions that hold a CPU loop: the compiler emits one body per instruction set and the loader picks one at
// run time, so that a build for the baseline uses the processor's full width. Everything that such a function calls
// must be ENSADV_HD, so that it is inlined into each body. Sanitizer builds define ENSADV_NO_CLONES, because the loader
// would run the resolvers before the sanitizer has started.
#if defined(__x86_64__) && defined(__linux__) && !defined(__CUDACC__) && !defined(ENSADV_NO_CLONES)
#define ENSADV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ENSADV_CLONES
#endif

// Let the compiler fuse the multiply-adds of a function: one stands before the function, the other first in its body.
#if defined(__clang__)
#define ENSADV_FUSES
#define ENSADV_FUSE _Pragma("clang fp contract(fast)")
#else
#define ENSADV_FUSES __attribute__((optimize("fp-contract=fast")))
#define ENSADV_FUSE
#endif

// Stands before a loop whose iterations are independent: even where input and output are the same memory, an iteration
// reads and writes only its own index.
#if defined(__clang__)
#define ENSADV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ENSADV_INDEPENDENT _Pragma("GCC ivdep")
#endif
