// Where the processor has AVX-512, its masked loads read the mask's bits. Elsewhere they become a byte per element.
#include "../act_grad.h"

#include <array>
#include <cstring>

#include "bits.h"
#include "half.h"
#include "loop.h"
#include "x86.h"

namespace ensadv {
namespace {

// For each byte of a mask, its bits as eight bytes: 0xff or 0.
constexpr auto kFlags = [] {
  std::array<std::array<uint8_t, 8>, 256> flags{};
  for (int byte = 0; byte < 256; ++byte)
    for (int j = 0; j < 8; ++j) flags[size_t(byte)][size_t(j)] = byte >> j & 1 ? 0xff : 0;
  return flags;
}();

// U: the unsigned integer of the elements' width.
#define ENSADV_SELECT(U)                                                                               \
  ENSADV_CLONES void select(const U* grad, const uint8_t* flags, U* out, int n) {                      \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = U(grad[i] & U(int64_t(int8_t(flags[i])))); \
  }
ENSADV_SELECT(uint16_t)
ENSADV_SELECT(uint32_t)
ENSADV_SELECT(uint64_t)
#undef ENSADV_SELECT

#define ENSADV_SLOPE(T)                                                                               \
  ENSADV_CLONES void slope(const T* grad, const uint8_t* flags, T* out, int n, compute_t<T> factor) { \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                    \
      out[i] = round_to<T>(flags[i] ? to_compute(grad[i]) : to_compute(grad[i]) * factor);            \
  }
ENSADV_SLOPE(float)
ENSADV_SLOPE(double)
ENSADV_SLOPE(bfloat_t)
#undef ENSADV_SLOPE

void slope(const half_t* grad, const uint8_t* flags, half_t* out, int n, float factor) {
  alignas(64) float v[kStrip];
  convert(grad, v, n);
  slope(v, flags, v, n, factor);
  round_in_place(v, out, n);
}

// body(first element, flags, count) for each strip; the flags are the strip's bits as bytes.
template <class Body>
void with_flags(const uint8_t* mask, int64_t numel, Body body) {
  uint8_t flags[kStrip];
  for (int64_t i = 0; i < numel; i += kStrip) {
    const int n = int(std::min<int64_t>(kStrip, numel - i));
    for (int j = 0; j < n; j += 8) memcpy(flags + j, kFlags[mask[(i + j) / 8]].data(), 8);
    body(i, flags, n);
  }
}

template <class U>
void by_flags(const U* grad, const uint8_t* mask, U* out, int64_t numel) {
  with_flags(mask, numel, [&](int64_t i, const uint8_t* flags, int n) { select(grad + i, flags, out + i, n); });
}

#if defined(ENSADV_X86)
ENSADV_AVX512BW inline void select_lanes(const uint16_t* grad, __mmask32 bits, uint16_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(bits, grad));
}
ENSADV_AVX512BW inline void select_lanes(const uint32_t* grad, __mmask16 bits, uint32_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_loadu_epi32(bits, grad));
}
ENSADV_AVX512BW inline void select_lanes(const uint64_t* grad, __mmask8 bits, uint64_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_loadu_epi64(bits, grad));
}

// Lanes: the unsigned integer with a bit for each element of a 64-byte vector.
template <class Lanes, class U>
ENSADV_AVX512BW void by_lanes(const U* grad, const uint8_t* mask, U* out, int64_t numel) {
  constexpr int kLanes = 8 * sizeof(Lanes);
  static_assert(kLanes * sizeof(U) == 64);
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    Lanes lanes;
    memcpy(&lanes, mask + i / 8, sizeof(lanes));
    select_lanes(grad + i, lanes, out + i);
  }
  by_flags(grad + i, mask + i / 8, out + i, numel - i);
}
const bool use_mask_registers = x86::has_avx512bw();
#endif

template <class Lanes, class U>
void run(const ActGradArgs& args, int64_t begin, int64_t end) {
  const int64_t first = begin * kMaskBlock, numel = std::min(end * kMaskBlock, args.numel) - first;
  const U* grad = static_cast<const U*>(args.grad.data) + first;
  const uint8_t* mask = args.mask + first / 8;
  U* out = static_cast<U*>(args.out.data) + first;
#if defined(ENSADV_X86)
  if (use_mask_registers) return by_lanes<Lanes>(grad, mask, out, numel);
#endif
  by_flags(grad, mask, out, numel);
}

void run_sloping(const ActGradArgs& args, int64_t begin, int64_t end) {
  const int64_t first = begin * kMaskBlock, numel = std::min(end * kMaskBlock, args.numel) - first;
  with_dtype(args.grad.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, level_t>) {
      const T* grad = static_cast<const T*>(args.grad.data) + first;
      T* out = static_cast<T*>(args.out.data) + first;
      with_flags(args.mask + first / 8, numel, [&](int64_t i, const uint8_t* flags, int n) {
        slope(grad + i, flags, out + i, n, compute_t<T>(args.slope));
      });
    }
  });
}

}  // namespace

void act_grad_cpu(const ActGradArgs& args, int64_t begin, int64_t end) {
  if (args.sloping) return run_sloping(args, begin, end);
  switch (size_of(args.grad.dtype)) {
    case 2: return run<uint32_t, uint16_t>(args, begin, end);
    case 4: return run<uint16_t, uint32_t>(args, begin, end);
    default: return run<uint8_t, uint64_t>(args, begin, end);
  }
}

}  // namespace ensadv
