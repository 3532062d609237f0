#include "half.h"

#include <algorithm>

#include "x86.h"

namespace ensadv {
namespace {

void widen_plain(const half_t* src, float* dst, int n) {
  for (int i = 0; i < n; ++i) dst[i] = to_compute(src[i]);
}
void round_plain(float* v, half_t* dst, int n) {
  for (int i = 0; i < n; ++i) v[i] = to_compute(dst[i] = round_to<half_t>(v[i]));
}

#if defined(ENSADV_X86)
// Compilers do not vectorise these conversions, so they are spelled out. The elements after the last whole vector are
// copied to a vector of their own, so that every element goes through the same instruction and nothing beyond the ends
// is touched. (The full masks keep GCC 12 from warning about its own header.)
ENSADV_AVX512F inline void widen_vector_16(const half_t* src, float* dst) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  _mm512_storeu_ps(dst, _mm512_maskz_cvtph_ps(0xffff, bits));
}
ENSADV_AVX512F inline void round_vector_16(float* v, half_t* dst) {
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(v), 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), bits);
  _mm512_storeu_ps(v, _mm512_maskz_cvtph_ps(0xffff, bits));
}
ENSADV_F16C inline void widen_vector_8(const half_t* src, float* dst) {
  _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))));
}
ENSADV_F16C inline void round_vector_8(float* v, half_t* dst) {
  const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(v), 0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), bits);
  _mm256_storeu_ps(v, _mm256_cvtph_ps(bits));
}
#define ENSADV_BY_VECTORS(lanes, isa)                                                     \
  isa void widen_##lanes(const half_t* src, float* dst, int n) { \
    int i = 0;                                                                            \
    for (; i + lanes <= n; i += lanes) widen_vector_##lanes(src + i, dst + i);            \
    half_t rest[lanes] = {};                                                              \
    float widened[lanes];                                                                 \
    std::copy(src + i, src + n, rest);                                                    \
    widen_vector_##lanes(rest, widened);                                                  \
    std::copy(widened, widened + (n - i), dst + i);                                       \
  }                                                                                       \
  isa void round_##lanes(float* v, half_t* dst, int n) {         \
    int i = 0;                                                                            \
    for (; i + lanes <= n; i += lanes) round_vector_##lanes(v + i, dst + i);              \
    float rest[lanes] = {};                                                               \
    half_t bits[lanes];                                                                   \
    std::copy(v + i, v + n, rest);                                                        \
    round_vector_##lanes(rest, bits);                                                     \
    std::copy(rest, rest + (n - i), v + i);                                               \
    std::copy(bits, bits + (n - i), dst + i);                                             \
  }
ENSADV_BY_VECTORS(16, ENSADV_AVX512F)
ENSADV_BY_VECTORS(8, ENSADV_F16C)
#undef ENSADV_BY_VECTORS

template <class F>
F choose(F by_16, F by_8, F plain) {
  return x86::has_avx512f() ? by_16 : x86::has_f16c() ? by_8 : plain;
}
const auto widen = choose(widen_16, widen_8, widen_plain);
const auto round_all = choose(round_16, round_8, round_plain);
#else
constexpr auto widen = widen_plain;
constexpr auto round_all = round_plain;
#endif

}  // namespace

void convert(const half_t* src, float* dst, int n) { widen(src, dst, n); }
void round_in_place(float* v, half_t* dst, int n) { round_all(v, dst, n); }

}  // namespace ensadv
