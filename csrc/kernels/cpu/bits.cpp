// Where the processor has AVX-512, it compares into mask registers. Elsewhere comparisons give a byte per element.
#include "bits.h"

#include <algorithm>
#include <cstring>

#include "loop.h"
#include "x86.h"

namespace ensadv {
namespace {

// A byte per element, 0xff or 0: compilers vectorise that, but not bits.
#define ENSADV_FLAGS(T)                                                                              \
  ENSADV_CLONES void flag_positive(const T* y, uint8_t* flags, int n) {                              \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) flags[i] = is_positive(y[i]) ? 0xff : 0;          \
  }                                                                                                  \
  ENSADV_CLONES void flag_passing(const T* y, uint8_t* flags, int n, BiasAct<compute_t<T>> f) {      \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) flags[i] = f.passes(to_compute(y[i])) ? 0xff : 0; \
  }
ENSADV_FLAGS(float)
ENSADV_FLAGS(double)
ENSADV_FLAGS(half_t)
ENSADV_FLAGS(bfloat_t)
#undef ENSADV_FLAGS

void pack_flags(const uint8_t* flags, int n, uint8_t* bits) {
  int i = 0;
#if defined(ENSADV_X86)
  for (; i + 16 <= n; i += 16) {
    const uint16_t two = uint16_t(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i))));
    memcpy(bits + i / 8, &two, sizeof(two));
  }
#endif
  for (; i < n; i += 8) {
    uint8_t one = 0;
    for (int j = 0; j < std::min(8, n - i); ++j) one |= uint8_t(flags[i + j] & 1u << j);
    bits[i / 8] = one;
  }
}

template <class T>
void by_flags(const T* y, int n, uint8_t* bits) {
  uint8_t flags[kStrip];
  flag_positive(y, flags, n);
  pack_flags(flags, n, bits);
}

template <class T>
void write_passing(const T* y, int n, const BiasAct<compute_t<T>>& f, uint8_t* bits) {
  uint8_t flags[kStrip];
  flag_passing(y, flags, n, f);
  pack_flags(flags, n, bits);
}

#if defined(ENSADV_X86)
ENSADV_AVX512BW inline __mmask16 positive_lanes(const float* y) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(y), _mm512_setzero_ps(), _CMP_GT_OQ);
}
ENSADV_AVX512BW inline __mmask8 positive_lanes(const double* y) {
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(y), _mm512_setzero_pd(), _CMP_GT_OQ);
}
ENSADV_AVX512BW inline __mmask32 positive_patterns(const void* y, uint16_t infinity) {  // is_positive of 16 bits
  const __m512i below = _mm512_sub_epi16(_mm512_loadu_si512(y), _mm512_set1_epi16(1));
  return _mm512_cmplt_epu16_mask(below, _mm512_set1_epi16(short(infinity)));
}
ENSADV_AVX512BW inline __mmask32 positive_lanes(const half_t* y) { return positive_patterns(y, 0x7c00); }
ENSADV_AVX512BW inline __mmask32 positive_lanes(const bfloat_t* y) { return positive_patterns(y, 0x7f80); }

template <class T>
ENSADV_AVX512BW void by_lanes(const T* y, int n, uint8_t* bits) {
  constexpr int kLanes = 64 / sizeof(T);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const auto lanes = positive_lanes(y + i);
    memcpy(bits + i / 8, &lanes, sizeof(lanes));
  }
  if (i < n) by_flags(y + i, n - i, bits + i / 8);
}

const bool use_mask_registers = x86::has_avx512bw();
#endif

template <class T>
void write_positive(const T* y, int n, uint8_t* bits) {
#if defined(ENSADV_X86)
  if (use_mask_registers) return by_lanes(y, n, bits);
#endif
  by_flags(y, n, bits);
}

}  // namespace

void positive_bits(const float* y, int n, uint8_t* bits) { write_positive(y, n, bits); }
void positive_bits(const double* y, int n, uint8_t* bits) { write_positive(y, n, bits); }
void positive_bits(const half_t* y, int n, uint8_t* bits) { write_positive(y, n, bits); }
void positive_bits(const bfloat_t* y, int n, uint8_t* bits) { write_positive(y, n, bits); }

void passing_bits(const float* y, int n, BiasAct<float> f, uint8_t* bits) { write_passing(y, n, f, bits); }
void passing_bits(const double* y, int n, BiasAct<double> f, uint8_t* bits) { write_passing(y, n, f, bits); }
void passing_bits(const half_t* y, int n, BiasAct<float> f, uint8_t* bits) { write_passing(y, n, f, bits); }
void passing_bits(const bfloat_t* y, int n, BiasAct<float> f, uint8_t* bits) { write_passing(y, n, f, bits); }

}  // namespace ensadv
