// Number formats and the final rounding, shared by the CPU and CUDA loops.
//
// The rounding keeps law 1 of docs/design.md: the budget holds in every dtype. A value v that float32 arithmetic places
// on the ball |v - c| <= eps may lie a rounding error outside, and rounding v to 16 bits may move it further out.
// `finish` rounds v to nearest. If the rounded number lies outside the ball, which `step_inward` decides exactly,
// `finish` takes the next number toward c. One step is enough whenever c is a 16-bit number: v exceeds the ball by less
// than one float32 spacing, so the next number lies inside.
//
// A uint8 pixel stands for level / 255. Results are rounded to the nearest level that is at most floor(255 eps) levels
// away from the center. The product is computed in float32, where it is k for eps = k / 255.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "platform.h"
#include "tensor_ref.h"

namespace ensadv {

struct half_t {
  uint16_t bits;
};
struct bfloat_t {
  uint16_t bits;
};
struct level_t {
  uint8_t level;
};

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Compute = float;
  static constexpr Dtype dtype = Dtype::f32;
};
template <>
struct Traits<double> {
  using Compute = double;
  static constexpr Dtype dtype = Dtype::f64;
};
template <>
struct Traits<half_t> {
  using Compute = float;
  static constexpr Dtype dtype = Dtype::f16;
};
template <>
struct Traits<bfloat_t> {
  using Compute = float;
  static constexpr Dtype dtype = Dtype::bf16;
};
template <>
struct Traits<level_t> {
  using Compute = float;
  static constexpr Dtype dtype = Dtype::u8;
};
template <class T>
using compute_t = typename Traits<T>::Compute;

ENSADV_HD uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
ENSADV_HD float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

ENSADV_HD int64_t double_bits(double d) {
  int64_t i;
  memcpy(&i, &d, 8);
  return i;
}
ENSADV_HD double bits_double(int64_t i) {
  double d;
  memcpy(&d, &i, 8);
  return d;
}

ENSADV_HD float to_compute(float x) { return x; }
ENSADV_HD double to_compute(double x) { return x; }
ENSADV_HD float to_compute(level_t x) { return float(x.level) / 255.0f; }
ENSADV_HD float to_compute(bfloat_t x) { return bits_float(uint32_t(x.bits) << 16); }
ENSADV_HD float to_compute(half_t x) {
#if defined(__CUDA_ARCH__)
  float f;  // PTX, since cuda_fp16.h and cuda_bf16.h would add a second to every file's compile time
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  // The shift puts the fraction in place; the exact multiplication by 2^112 corrects the exponent and normalises
  // subnormals. Inf and NaN (exponent all ones) are patched afterwards. Without branches, so that loops vectorise.
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t u = float_bits(bits_float(magnitude << 13) * 0x1p112f);
  u |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(u | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

ENSADV_HD uint32_t quiet_nan(bfloat_t) { return 0x7fc0u; }
ENSADV_HD uint32_t quiet_nan(half_t) { return 0x7e00u; }

// Rounds to nearest, ties to even. The result for NaN is unspecified; callers test for NaN first.
ENSADV_HD uint32_t round_number(float v, bfloat_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
#else
  const uint32_t u = float_bits(v);
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#endif
}
ENSADV_HD uint32_t round_number(float v, half_t) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
#else
  const uint32_t u = float_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal range: rebias the exponent and round at the last bit of the shorter fraction. Subnormal range: adding 0.5
  // makes the float adder round at 2^-24; the low bits of the sum are the result.
  const uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t r = a < 0x38800000u ? subnormal : normal;
  return (a >= 0x477ff000u ? 0x7c00u : r) | sign;
#endif
}

template <class T>
ENSADV_HD uint32_t round_bits(float v, T t) {
  return v != v ? quiet_nan(t) : round_number(v, t);
}

// The nearest number of a float type. From double to 16 bits it goes by way of float, as in PyTorch.
template <class T, class A>
ENSADV_HD T round_to(A v) {
  if constexpr (sizeof(T) == 2) {
    T t{};
    t.bits = uint16_t(round_bits(float(v), t));
    return t;
  } else {
    return T(v);
  }
}

template <class A>
ENSADV_HD A clamp(A v, A lo, A hi) {  // NaN stays NaN, as in torch.clamp
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}
template <class A>
ENSADV_HD A max_nan(A a, A b) {  // NaN if either is NaN, as torch.maximum
  const A r = a > b ? a : b;
  return a != a ? a : r;
}
template <class A>
ENSADV_HD A min_nan(A a, A b) {
  const A r = a < b ? a : b;
  return a != a ? a : r;
}
template <class A>
ENSADV_HD A sign(A g) {  // NaN counts as 0
  return A(g > A(0)) - A(g < A(0));
}

ENSADV_HD int32_t floor_int(float v) {  // v must lie in int32's range
#if defined(__CUDA_ARCH__)
  return __float2int_rd(v);
#else
  const int32_t cut = int32_t(v);
  return cut - (v < float(cut));
#endif
}

// The range of valid pixels. For a 16-bit type its ends are rounded inward to numbers of that type, so that the range
// holds exactly.
template <class T>
struct Box {
  compute_t<T> lo, hi;
};
template <>
struct Box<level_t> {
  float lo, hi;
  int32_t klo, khi;      // as levels
  float max_eps = 1.0f;  // a larger eps gives the same results
};

// The 16-bit number next to t, upward or downward.
template <class T>
inline T neighbour(T t, bool upward) {
  const bool negative = t.bits & 0x8000u;
  if ((t.bits & 0x7fffu) == 0) t.bits = upward ? 0x0001u : 0x8001u;
  else t.bits = uint16_t(t.bits + (negative == upward ? -1 : 1));
  return t;
}

template <class T>
inline Box<T> make_box(double lo, double hi) {
  Box<T> box;
  box.lo = compute_t<T>(lo);
  box.hi = compute_t<T>(hi);
  if constexpr (sizeof(T) == 2) {
    T low = round_to<T>(box.lo), high = round_to<T>(box.hi);
    if (to_compute(low) < box.lo) low = neighbour(low, true);
    if (to_compute(high) > box.hi) high = neighbour(high, false);
    box.lo = to_compute(low);
    box.hi = to_compute(high);
  }
  if constexpr (sizeof(T) == 1) {
    box.lo = std::fmin(std::fmax(box.lo, 0.0f), 1.0f);
    box.hi = std::fmin(std::fmax(box.hi, 0.0f), 1.0f);
    // 255 * float32(k / 255) lies within 1e-4 of k: a bound that stands for level k must give k.
    box.klo = int32_t(std::ceil(255.0 * box.lo - 1e-4));
    box.khi = int32_t(std::floor(255.0 * box.hi + 1e-4));
  }
  return box;
}

// By how much the pattern of the 16-bit number r must change to bring r back into the ball around c: -1 or +1 if
// rounding has moved r out of it, else 0. It is 0 too where the change would leave the box, which takes precedence.
//
// Is |r - c| > eps exactly? Flip the signs so that r >= c. Rounding keeps order: if the rounded r - c is larger than
// eps, the answer is yes; if smaller, no. If it equals eps, then r - eps (if r is larger in magnitude) or c + eps (if c
// is) has no rounding error (Dekker), and comparing r - eps with c, or r with c + eps, gives the answer.
template <class T>
ENSADV_HD int32_t step_inward(float r, float c, float eps, const Box<T>& box) {
  const float d = r - c;
  const uint32_t flip = float_bits(d) & 0x80000000u;
  const float far = bits_float(float_bits(r) ^ flip), near = bits_float(float_bits(c) ^ flip);
  const float length = bits_float(float_bits(d) ^ flip);
  const float by_far = far - eps - near, by_near = far - (near + eps);
  float excess = length - eps;
  excess = by_far > excess ? by_far : excess;
  excess = by_near > excess ? by_near : excess;
  const int32_t inward = ~(int32_t(float_bits(far)) >> 31) | 1;
  return ((excess > 0.0f) & (r != (flip ? box.hi : box.lo))) ? inward : 0;
}

// Clamps v to the box and rounds it to T so that |v - c| <= eps still holds. See the top of the file.
ENSADV_HD float finish(float v, float, float, const Box<float>& box) { return clamp(v, box.lo, box.hi); }
ENSADV_HD double finish(double v, double, double, const Box<double>& box) { return clamp(v, box.lo, box.hi); }
template <class T>
ENSADV_HD T finish_clamped(float v, float c, float eps, const Box<T>& box) {
  T t{};
  t.bits = uint16_t(round_number(v, t));
  const uint32_t bits = t.bits + step_inward(to_compute(t), c, eps, box);
  t.bits = uint16_t(v != v ? quiet_nan(t) : bits);
  return t;
}
template <class T>
ENSADV_HD T finish_narrow(float v, float c, float eps, const Box<T>& box) {
  return finish_clamped(clamp(v, box.lo, box.hi), c, eps, box);
}
ENSADV_HD half_t finish(float v, float c, float eps, const Box<half_t>& box) {
  return finish_narrow<half_t>(v, c, eps, box);
}
ENSADV_HD bfloat_t finish(float v, float c, float eps, const Box<bfloat_t>& box) {
  return finish_narrow<bfloat_t>(v, c, eps, box);
}
ENSADV_HD level_t finish(float v, float c, float eps, const Box<level_t>& box) {
  // The form matters to GCC: with constants for limits it would branch around the conversions and not vectorise.
  v = v != v ? c : v;  // uint8 has no NaN: the pixel becomes its center, or the box's lower end if that is NaN too
  v = v > box.lo ? v : box.lo;
  v = v < box.hi ? v : box.hi;
  // A float32 center may lie outside [0, 1]. All centers 2 or more outside the box give the same results.
  const float far_lo = box.lo - 2.0f, far_hi = box.hi + 2.0f;
  c = c > far_lo ? c : far_lo;
  c = c < far_hi ? c : far_hi;
  const int32_t center = floor_int(c * 255.0f + 0.5f);
  const int32_t reach = int32_t((eps < box.max_eps ? eps : box.max_eps) * 255.0f);
  int32_t k = int32_t(v * 255.0f + 0.5f);
  k = k < center - reach ? center - reach : k;
  k = k > center + reach ? center + reach : k;
  k = k < box.klo ? box.klo : k;
  k = k > box.khi ? box.khi : k;
  return {uint8_t(k)};
}

}  // namespace ensadv
