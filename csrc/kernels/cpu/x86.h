// What x86-64 has beyond its baseline: intrinsics, the instruction sets that functions are compiled for, and whether
// the processor has them. No other file includes intrinsics or asks the processor, so that other architectures need
// only the plain loops. Where ENSADV_X86 is not defined, this header is empty.
#pragma once

#if defined(__x86_64__)
#define ENSADV_X86

#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>

#define ENSADV_F16C __attribute__((target("avx,f16c")))
#define ENSADV_AVX512F __attribute__((target("avx512f")))
#define ENSADV_AVX512BW __attribute__((target("avx512f,avx512bw")))
#define ENSADV_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace ensadv::x86 {

// Registers of a cpuid leaf; zeros if the processor does not have the leaf.
struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;

  explicit Cpuid(uint32_t leaf) { __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx); }
};

// The built-in checks include whether the system saves the registers.
inline bool has_avx512f() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
}
inline bool has_avx512bw() { return has_avx512f() && __builtin_cpu_supports("avx512bw"); }

// Clang's built-in check does not know these two. Whether the system lets tiles be used, amx.cpp asks.
inline bool has_f16c() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx") && Cpuid(1).ecx >> 29 & 1;
}
inline bool has_amx_bf16() {
  const uint32_t features = Cpuid(7).edx;
  return has_avx512bw() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") &&
         features >> 22 & 1 && features >> 24 & 1;  // AMX-BF16, AMX-TILE
}

}  // namespace ensadv::x86
#endif
