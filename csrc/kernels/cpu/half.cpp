#include "half.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ensadv {
namespace {

void widen_plain(const half_t* src, float* dst, int n) {
  for (int i = 0; i < n; ++i) dst[i] = to_compute(src[i]);
}
void narrow_plain(const float* src, half_t* dst, int n) {
  for (int i = 0; i < n; ++i) dst[i] = round_to<half_t>(src[i]);
}

#if defined(__x86_64__)
// Compilers do not vectorise these conversions, so they are spelled out. What is left after the whole vectors goes
// through one of its own: the same instruction for every element, and nothing touched beyond the ends. (The full
// masks keep GCC 12 from warning of its own header.)
#define ENSADV_BY_VECTORS(name, isa, From, To, kLanes, ...)                            \
  __attribute__((target(isa))) void name(const From* src, To* dst, int n) {            \
    const auto vector = [](const From* from, To* to) __attribute__((target(isa))) {    \
      __VA_ARGS__;                                                                     \
    };                                                                                 \
    int i = 0;                                                                         \
    for (; i + kLanes <= n; i += kLanes) vector(src + i, dst + i);                     \
    From rest[kLanes] = {};                                                            \
    To done[kLanes];                                                                   \
    std::copy(src + i, src + n, rest);                                                 \
    vector(rest, done);                                                                \
    std::copy(done, done + (n - i), dst + i);                                          \
  }
ENSADV_BY_VECTORS(widen_16, "avx512f", half_t, float, 16,
                  _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))))
ENSADV_BY_VECTORS(narrow_16, "avx512f", float, half_t, 16,
                  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from), 0)))
ENSADV_BY_VECTORS(widen_8, "avx,f16c", half_t, float, 8,
                  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))))
ENSADV_BY_VECTORS(narrow_8, "avx,f16c", float, half_t, 8,
                  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), 0)))
#undef ENSADV_BY_VECTORS

template <class F>
F chosen(F wide, F narrow, F plain) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return wide;
  return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c") ? narrow : plain;
}
const auto widen = chosen(widen_16, widen_8, widen_plain);
const auto narrow = chosen(narrow_16, narrow_8, narrow_plain);
#else
constexpr auto widen = widen_plain;
constexpr auto narrow = narrow_plain;
#endif

}  // namespace

void convert(const half_t* src, float* dst, int n) { widen(src, dst, n); }
void convert(const float* src, half_t* dst, int n) { narrow(src, dst, n); }

}  // namespace ensadv
