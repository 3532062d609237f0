// Number formats and the final rounding, shared by the CPU and CUDA loops.
//
// The rounding keeps law 1 of DESIGN (the budget holds in every dtype): a value v that float32 arithmetic
// places on the ball |v - c| <= eps may lie a rounding error outside it, and rounding v to 16 bits may carry it
// further out. `finish` rounds to nearest, asks in exact arithmetic (TwoSum) whether the result left the ball, and
// if so takes the neighbour toward c. One step is enough whenever c itself is a 16-bit number: v exceeds the
// ball by less than one float32 spacing, so the neighbour lies inside.
//
// uint8 images stand for level / 255. Their results are rounded to the nearest level that is at most
// floor(255 eps) levels away from the center (the product in float32, which is k for eps = k / 255).
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

ENSADV_HD float to_compute(float x) { return x; }
ENSADV_HD double to_compute(double x) { return x; }
ENSADV_HD float to_compute(level_t x) { return float(x.level) / 255.0f; }
ENSADV_HD float to_compute(bfloat_t x) { return bits_float(uint32_t(x.bits) << 16); }
ENSADV_HD float to_compute(half_t x) {
#if defined(__CUDA_ARCH__)
  float f;  // as PTX: cuda_fp16.h and cuda_bf16.h take a second of every file's compile time
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  // Shift the fraction into place, then let one exact multiplication by 2^112 correct the exponent: it
  // also normalises subnormals. Inf and NaN (exponent all ones) are patched afterwards. Branch-free: vectorises.
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t u = float_bits(bits_float(magnitude << 13) * 0x1p112f);
  u |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(u | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
ENSADV_HD uint32_t round_bits(float v, bfloat_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
#else
  const uint32_t u = float_bits(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
#endif
}
ENSADV_HD uint32_t round_bits(float v, half_t) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
#else
  const uint32_t u = float_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal range: rebias the exponent and round on the bit below the kept fraction. Subnormal range: adding
  // 0.5 makes the float adder itself round at 2^-24, and the low bits of the sum are the result.
  const uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
  uint32_t r = a < 0x38800000u ? subnormal : normal;
  r = a >= 0x477ff000u ? 0x7c00u : r;
  r = a > 0x7f800000u ? 0x7e00u : r;
  return r | sign;
#endif
}

// The nearest number of a float type; from double by way of float where it has 16 bits, as PyTorch does.
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

// 16-bit patterns as integers in the order of the numbers they stand for; both zeros are 0.
ENSADV_HD int32_t ordered(uint32_t bits) {
  const int32_t magnitude = int32_t(bits & 0x7fffu);
  return (bits & 0x8000u) ? -magnitude : magnitude;
}
ENSADV_HD uint32_t unordered(int32_t k) { return k < 0 ? 0x8000u | uint32_t(-k) : uint32_t(k); }

template <class A>
ENSADV_HD A clamp(A v, A lo, A hi) {  // NaN passes through, as torch.clamp
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}
template <class A>
ENSADV_HD A max_nan(A a, A b) {  // torch.maximum: NaN if either is
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

ENSADV_HD int32_t floor_int(float v) {  // of v within int32's range
#if defined(__CUDA_ARCH__)
  return __float2int_rd(v);
#else
  const int32_t cut = int32_t(v);
  return cut - (v < float(cut));
#endif
}

// The range of valid pixels in the output's dtype, its ends rounded inward so that it holds exactly.
template <class T>
struct Box {
  compute_t<T> lo, hi;
};
struct NarrowBox {
  float lo, hi;
  int32_t klo, khi;  // as ordered 16-bit patterns, or as levels
};
template <>
struct Box<half_t> : NarrowBox {};
template <>
struct Box<bfloat_t> : NarrowBox {};
template <>
struct Box<level_t> : NarrowBox {
  float widest = 1.0f;  // eps: beyond it nothing changes
};

template <class T>
inline Box<T> make_box(double lo, double hi) {
  Box<T> box;
  box.lo = compute_t<T>(lo);
  box.hi = compute_t<T>(hi);
  if constexpr (sizeof(T) == 2) {
    T t{};
    box.klo = ordered(round_bits(box.lo, t));
    t.bits = uint16_t(unordered(box.klo));
    box.klo += to_compute(t) < box.lo;
    box.khi = ordered(round_bits(box.hi, t));
    t.bits = uint16_t(unordered(box.khi));
    box.khi -= to_compute(t) > box.hi;
  }
  if constexpr (sizeof(T) == 1) {
    box.lo = std::fmin(std::fmax(box.lo, 0.0f), 1.0f);
    box.hi = std::fmin(std::fmax(box.hi, 0.0f), 1.0f);
    // 255 * float32(k / 255) lies within 1e-4 of k: bounds that mean a level are taken as that level.
    box.klo = int32_t(std::ceil(255.0 * box.lo - 1e-4));
    box.khi = int32_t(std::floor(255.0 * box.hi + 1e-4));
  }
  return box;
}

// Clamp to the box and round v, which lies on or near the ball |v - c| <= eps, to T. See the top of the file.
ENSADV_HD float finish(float v, float, float, const Box<float>& box) { return clamp(v, box.lo, box.hi); }
ENSADV_HD double finish(double v, double, double, const Box<double>& box) { return clamp(v, box.lo, box.hi); }
template <class T>
ENSADV_HD T finish_narrow(float v, float c, float eps, const Box<T>& box) {
  v = clamp(v, box.lo, box.hi);
  T t{};
  t.bits = uint16_t(round_bits(v, t));
  const float r = to_compute(t);
  // r - c = d + e exactly (Knuth's TwoSum); as eps is a float, d + e > eps iff d > eps, or d == eps and e > 0.
  const float d = r - c;
  const float back = d - r;
  const float e = (r - (d - back)) + (-c - back);
  const int32_t above = (d > eps) | ((d == eps) & (e > 0.0f));
  const int32_t below = (d < -eps) | ((d == -eps) & (e < 0.0f));
  int32_t k = ordered(t.bits) - above + below;
  k = k < box.klo ? box.klo : k;
  k = k > box.khi ? box.khi : k;
  t.bits = uint16_t(v != v ? t.bits : unordered(k));
  return t;
}
ENSADV_HD half_t finish(float v, float c, float eps, const Box<half_t>& box) {
  return finish_narrow<half_t>(v, c, eps, box);
}
ENSADV_HD bfloat_t finish(float v, float c, float eps, const Box<bfloat_t>& box) {
  return finish_narrow<bfloat_t>(v, c, eps, box);
}
ENSADV_HD level_t finish(float v, float c, float eps, const Box<level_t>& box) {
  // In a form that GCC vectorises: limits that are constants would have it branch around the conversions.
  v = v != v ? c : v;  // uint8 has no NaN: the pixel stays at its center, or at the box's lower end
  v = v > box.lo ? v : box.lo;
  v = v < box.hi ? v : box.hi;
  // A float32 center may lie outside [0, 1]. From 2 outside the box on it makes no difference where.
  const float far_lo = box.lo - 2.0f, far_hi = box.hi + 2.0f;
  c = c > far_lo ? c : far_lo;
  c = c < far_hi ? c : far_hi;
  const int32_t center = floor_int(c * 255.0f + 0.5f);
  const int32_t reach = int32_t((eps < box.widest ? eps : box.widest) * 255.0f);
  int32_t k = int32_t(v * 255.0f + 0.5f);
  k = k < center - reach ? center - reach : k;
  k = k > center + reach ? center + reach : k;
  k = k < box.klo ? box.klo : k;
  k = k > box.khi ? box.khi : k;
  return {uint8_t(k)};
}

}  // namespace ensadv
